// Taking a text out of a view: to the clipboard, or as a file. Neither needs a kernel.

import { button, h, setText } from "./dom.js";

const SAID_FOR = 1500; // ms that a button says what it has done

/**
 * @param {string} text
 * @returns {Promise<void>}
 */
async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that did not come over https or from this machine have no clipboard of their own.
    const area = h("textarea", { style: "position: fixed; opacity: 0" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/**
 * @param {string} id
 * @param {string} title what is copied
 * @param {() => string} text
 */
export function copyButton(id, title, text) {
  const copy = button("Copy", id, async () => {
    await toClipboard(text());
    setText(copy, "Copied");
    setTimeout(() => setText(copy, "Copy"), SAID_FOR);
  });
  copy.title = title;
  return copy;
}

/**
 * @param {string} label
 * @param {string} id
 * @param {string} name of the file
 * @param {() => string | Promise<Blob>} content
 */
export function downloadButton(label, id, name, content) {
  const download = button(label, id, async () => {
    const found = content();
    const file = typeof found === "string"
      ? new Blob([found], { type: "text/plain;charset=utf-8" })
      : await found;
    const url = URL.createObjectURL(file);
    h("a", { href: url, download: name }).click();
    URL.revokeObjectURL(url);
  });
  download.title = `Download ${name}`;
  return download;
}

/**
 * The ways to take a text out, side by side.
 * @param {...HTMLElement} buttons
 */
export function exportBar(...buttons) {
  return h("span", { class: "sn-export" }, ...buttons);
}

/**
 * Rows as comma-separated values.
 * @param {Array<Array<string | number | null>>} rows
 */
export function csv(rows) {
  const cell = (/** @type {string | number | null} */ value) => {
    const text = String(value ?? "");
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => `${row.map(cell).join(",")}\n`).join("");
}
