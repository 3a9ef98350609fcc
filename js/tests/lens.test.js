import { afterEach, expect, test, vi } from "vitest";
import lens, { percent, strength } from "../src/lens.js";
import { FakeModel, show } from "./fake_model.js";

const BLOCKS = [0, 3];
const TOP = 2;

/** @param {Float32Array | Uint32Array} array */
const view = (array) => new DataView(array.buffer);

/**
 * @param {number} count of the words
 * @param {Record<string, any>} [more]
 */
function model(count, more = {}) {
  const cells = BLOCKS.length * count;
  const numbers = Array.from({ length: cells }, (_, cell) => cell);
  return new FakeModel({
    title: "tiny",
    words: Array.from({ length: count }, (_, at) => `w${at}`),
    first: 0,
    blocks: BLOCKS,
    vocabulary: ["yes", "<b>no</b>"],
    vocabulary_size: 1024,
    top: TOP,
    tops: view(new Uint32Array(numbers.flatMap((cell) => [cell % 2, 1 - (cell % 2)]))),
    chances: view(new Float32Array(numbers.flatMap(() => [0.75, 0.25]))),
    entropy: view(new Float32Array(numbers)),
    token: "",
    ranks: new DataView(new ArrayBuffer(0)),
    ranking: false,
    colour: "probability",
    selected: [],
    ...more,
  });
}

/** @param {ReturnType<typeof show>} shown */
const cells = (shown) => shown.all("td");

/**
 * @param {Element} on
 * @param {string} key
 */
const press = (on, key) => on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));

afterEach(() => document.body.replaceChildren());

test("the last block is on top, and each cell says the top token, as text", () => {
  const shown = show(lens, model(3));
  expect(shown.all("tr[data-block]").map((row) => row.dataset.block)).toEqual(["3", "0"]);
  expect(cells(shown).map((cell) => cell.textContent)).toEqual(
    ["<b>no</b>", "yes", "<b>no</b>", "yes", "<b>no</b>", "yes"],
  );
  expect(shown.all("td b").length).toBe(0);
  expect(cells(shown)[0].style.getPropertyValue("--strength")).toBe("0.750");
});

test("pointing and focus show the top tokens, a click and Enter select", () => {
  const fake = model(3);
  const shown = show(lens, fake);
  cells(shown)[1].dispatchEvent(new Event("pointerover", { bubbles: true }));
  expect(shown.byId("details").textContent).toContain("block 3, token 2 w1");
  expect(shown.byId("details").textContent).toContain("75.0%");
  cells(shown)[5].click();
  expect(fake.saved.selected).toEqual([0, 2]);
  expect(cells(shown)[5].getAttribute("aria-selected")).toBe("true");
  press(cells(shown)[5], "ArrowUp");
  expect(document.activeElement).toBe(cells(shown)[2]);
  press(cells(shown)[2], "Home");
  press(cells(shown)[0], "Enter");
  expect(fake.saved.selected).toEqual([3, 0]);
  expect(cells(shown).filter((cell) => cell.tabIndex === 0).length).toBe(1);
});

test("a long text is shown a page at a time, and arrows turn it", () => {
  const shown = show(lens, model(20_000, { first: 10 }));
  expect(cells(shown).length).toBe(2 * 32);
  expect(shown.byId("range").textContent).toBe("tokens 19979–20010 of 20010");
  press(cells(shown)[0], "ArrowLeft");
  expect(shown.byId("range").textContent).toBe("tokens 19947–19978 of 20010");
  expect(document.activeElement?.getAttribute("data-cell")).toBe(String(20_000 + 19_967));
});

test("a text of one token more than a page opens on its last 32", () => {
  const shown = show(lens, model(33));
  expect(cells(shown).length).toBe(2 * 32);
  expect(shown.byId("range").textContent).toBe("tokens 2–33 of 33");
  press(cells(shown)[0], "ArrowLeft");
  expect(shown.byId("range").textContent).toBe("tokens 1–1 of 33");
});

test("ranks are asked for by word or by a shown token, and shown when they come", () => {
  const fake = model(2);
  const shown = show(lens, fake);
  const word = /** @type {HTMLInputElement} */ (shown.find("input"));
  word.value = "maybe";
  press(word, "Enter");
  cells(shown)[0].dispatchEvent(new Event("focusin", { bubbles: true }));
  const candidate = shown.find("li button");
  candidate.focus();
  candidate.click();
  expect(fake.sent).toEqual([
    { action: "rank", with: { token: "maybe" } },
    { action: "rank_number", with: { number: 0 } },
  ]);
  fake.update({ ranking: true });
  expect(shown.find(".sn-rank button").textContent).toBe("Ranking…");
  fake.update({ ranking: false, token: "maybe", colour: "rank", ranks: view(new Uint32Array([1024, 32, 1, 2])) });
  expect(cells(shown).map((cell) => cell.textContent)).toEqual(["1", "2", "1024", "32"]);
  expect(cells(shown)[3].style.getPropertyValue("--strength")).toBe("0.500");
  expect(shown.byId("details").textContent).toContain("rank of maybe 1");
  expect(document.activeElement).toBe(candidate);
});

test("all of it is taken away as a table", async () => {
  /** @type {Blob[]} */
  const files = [];
  const made = vi.spyOn(URL, "createObjectURL").mockImplementation((blob) => {
    files.push(/** @type {Blob} */ (blob));
    return "blob:it";
  });
  const fake = model(40, { first: 5, token: "yes", ranks: view(new Uint32Array(80).fill(7)) });
  show(lens, fake).byId("csv").click();
  await vi.waitFor(() => expect(files.length).toBe(1));
  const lines = (await files[0].text()).trim().split("\n");
  expect(lines.length).toBe(1 + 2 * 40); // also of tokens that are on another page
  expect(lines[0]).toBe("block,position,token,prediction,probability,entropy,rank of yes");
  expect(lines[1]).toBe("0,5,w0,yes,0.75,0,7");
  expect(lines[80]).toBe("3,44,w39,<b>no</b>,0.75,79,7");
  made.mockRestore();
});

test("two views agree, and one that is closed hears nothing", () => {
  const fake = model(2);
  const one = show(lens, fake);
  const two = show(lens, fake);
  cells(one)[3].click();
  expect(cells(two)[3].getAttribute("aria-selected")).toBe("true");
  one.close();
  two.close();
  expect(fake.listening).toBe(0);
});

test("numbers for people", () => {
  expect([percent(0), percent(1), percent(0.9999), percent(0.123), percent(0.0001)]).toEqual(
    ["0%", "100%", "100%", "12.3%", "0.01%"],
  );
  const numbers = {
    top: new Uint32Array([0]),
    chance: new Float32Array([0.5]),
    entropy: new Float32Array([5]),
    rank: new Uint32Array([]),
  };
  expect(strength(numbers, "entropy", 0, 1, 1024)).toBe(0.5);
  expect(strength(numbers, "rank", 0, 1, 1024)).toBe(0);
});
