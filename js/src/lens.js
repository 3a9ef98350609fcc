// The logit lens: a grid of blocks by tokens, coloured by probability, entropy or a token's rank.
// A long text is shown a page of tokens at a time, so that the page's elements stay few; pages are
// counted from its end, where the predictions are that one mostly looks for.

import { act, button, fill, follow, h, keepItems, set, setText, widget } from "./dom.js";
import { csv, downloadButton, exportBar } from "./export.js";
import { tablePicture } from "./picture.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */
/** @typedef {{ top: Uint32Array, chance: Float32Array, entropy: Float32Array, rank: Uint32Array }} Numbers */

const PAGE = 32;

const COLOURS = /** @type {Record<string, string>} */ ({
  probability: "probability of the top token",
  entropy: "entropy",
  rank: "rank of a token",
});

/**
 * The bytes of a trait, at an address that typed arrays accept.
 * @param {Model} model
 * @param {string} trait
 * @returns {ArrayBuffer}
 */
function bytesOf(model, trait) {
  const view = model.get(trait);
  if (!view || !view.byteLength) return new ArrayBuffer(0);
  return view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
}

/**
 * @param {Model} model
 * @returns {Numbers}
 */
function numbersOf(model) {
  return {
    top: new Uint32Array(bytesOf(model, "tops")),
    chance: new Float32Array(bytesOf(model, "chances")),
    entropy: new Float32Array(bytesOf(model, "entropy")),
    rank: new Uint32Array(bytesOf(model, "ranks")),
  };
}

/** @param {number} chance */
export function percent(chance) {
  const shown = 100 * chance;
  return `${shown >= 99.95 || shown === 0 ? Math.round(shown) : shown.toFixed(shown < 0.1 ? 2 : 1)}%`;
}

/**
 * How strong a cell's colour is, from 0 to 1.
 * @param {Numbers} numbers
 * @param {string} colour
 * @param {number} cell
 * @param {number} top
 * @param {number} size of the model's vocabulary
 */
export function strength(numbers, colour, cell, top, size) {
  const widest = Math.log2(Math.max(size, 2));
  if (colour === "entropy") return numbers.entropy[cell] / widest;
  if (colour === "probability") return numbers.chance[cell * top];
  return numbers.rank.length ? 1 - Math.log2(numbers.rank[cell]) / widest : 0;
}

/** @param {{ model: Model, root: HTMLElement }} view */
function build({ model, root }) {
  const words = /** @type {string[]} */ (model.get("words"));
  const blocks = /** @type {number[]} */ (model.get("blocks"));
  const vocabulary = /** @type {string[]} */ (model.get("vocabulary"));
  const [top, size, first] = [model.get("top"), model.get("vocabulary_size"), model.get("first")];
  const pages = Math.max(1, Math.ceil(words.length / PAGE));
  let numbers = numbersOf(model);
  let page = pages - 1;
  let shown = -1; // which cell the details are of
  /** @type {Map<number, HTMLElement>} */
  const cells = new Map();

  const choice = h(
    "select",
    { "aria-label": "Colour", onchange: () => set(model, "colour", choice.value) },
    ...Object.entries(COLOURS).map(([value, label]) => h("option", { value }, label)),
  );
  const word = h("input", {
    type: "text",
    size: 12,
    placeholder: "·token",
    title: "· is a space",
    "aria-label": "Token to rank",
  });
  const rank = button("", "rank", askRank);
  const form = h("span", { class: "sn-rank" }, word, rank);
  word.addEventListener("keydown", (event) => {
    if (event.key === "Enter") askRank();
  });
  const earlier = button("‹ earlier", "earlier", () => turn(page - 1));
  const later = button("later ›", "later", () => turn(page + 1));
  const range = h("span", { class: "sn-dim", "data-testid": "range" });
  const low = h("span");
  const high = h("span");
  const legend = h("span", { class: "sn-legend sn-dim" }, low, h("i", { class: "sn-scale" }), high);
  const head = h("tr");
  const body = h("tbody");
  const grid = h(
    "table",
    { role: "grid", "aria-label": "Blocks by tokens: next-token prediction per block" },
    h("thead", {}, head),
    body,
  );
  const box = h("div", { class: "sn-grid" }, grid);
  const exported = exportBar(
    downloadButton("CSV", "csv", "lens.csv", table),
    downloadButton("PNG", "png", "lens.png", () => {
      const kind = COLOURS[model.get("colour")].replace("a token", model.get("token") || "a token");
      return tablePicture(box, grid, `${model.get("title")}: ${kind}`);
    }),
  );
  // What comes next is on the right: in view until somebody takes hold of it. A change of theme or
  // width scrolls as well, so that scrolling itself tells nothing.
  let held = false;
  const toEnd = () => {
    if (!held) box.scrollLeft = box.scrollWidth;
  };
  const hold = () => {
    held = true;
  };
  for (const kind of ["wheel", "pointerdown", "keydown"]) {
    box.addEventListener(kind, hold, { capture: true, passive: true });
  }
  const sized = new ResizeObserver(toEnd);
  sized.observe(box);
  sized.observe(grid);
  const details = h("div", {
    class: "sn-details",
    "aria-live": "polite",
    "data-testid": "details",
  });
  // What the details are made of; they are kept, so that a focused token stays focused.
  const where = h("span");
  const said = h("bdi", { class: "sn-mono" });
  const title = h("div", {}, where, said);
  const candidates = h("ol");
  const entropy = h("div", { class: "sn-dim" });
  const rankedWord = h("bdi", { class: "sn-mono" });
  const rankOf = h("span");
  const ranked = h("div", { class: "sn-dim" }, "rank of ", rankedWord, rankOf);
  const hint = h("div", { class: "sn-dim" });
  fill(
    root,
    h(
      "div",
      { class: "sn-bar" },
      h("span", { class: "sn-title" }, model.get("title")),
      h("label", {}, "Colour ", choice),
      form,
      legend,
      exported,
    ),
    h("div", { class: "sn-bar", hidden: pages === 1 && !first }, earlier, range, later),
    h("div", { class: "sn-split" }, box, details),
  );

  function askRank() {
    if (word.value && !rank.disabled) act(model, "rank", { token: word.value });
  }

  /** Every cell of all pages, the first block first. */
  function table() {
    const ranked = numbers.rank.length > 0;
    const head = ["block", "position", "token", "prediction", "probability", "entropy"];
    const rows = blocks.flatMap((block, row) =>
      words.map((said, at) => {
        const cell = row * words.length + at;
        const [chance, bits] = [numbers.chance[cell * top], numbers.entropy[cell]].map((one) => Number(one.toPrecision(5)));
        const facts = [vocabulary[numbers.top[cell * top]], chance, bits];
        return [block, first + at, said, ...facts, ...(ranked ? [numbers.rank[cell]] : [])];
      }),
    );
    return csv([[...head, ...(ranked ? [`rank of ${model.get("token")}`] : [])], ...rows]);
  }

  /** @param {number} cell */
  function select(cell) {
    set(model, "selected", [blocks[Math.floor(cell / words.length)], first + (cell % words.length)]);
  }

  /** @param {number} to */
  function turn(to) {
    page = Math.max(0, Math.min(to, pages - 1));
    const until = words.length - (pages - 1 - page) * PAGE;
    const from = Math.max(0, until - PAGE);
    setText(range, `tokens ${first + from + 1}–${first + until} of ${first + words.length}`);
    earlier.disabled = page === 0;
    later.disabled = page === pages - 1;
    const titles = words.slice(from, until);
    fill(head, h("th", { scope: "col" }, "block"), ...titles.map((title) => column(title)));
    cells.clear();
    const rows = [];
    for (let row = blocks.length - 1; row >= 0; row--) {
      const line = [];
      for (let at = from; at < until; at++) {
        const cell = row * words.length + at;
        const tag = h("td", { role: "gridcell", tabindex: -1, "data-cell": cell }, h("bdi"));
        cells.set(cell, tag);
        line.push(tag);
      }
      rows.push(h("tr", { "data-block": blocks[row] }, h("th", { scope: "row" }, blocks[row]), ...line));
    }
    fill(body, ...rows);
    colour();
    mark();
    held = false;
    toEnd();
    const entry = cells.get(shown) ?? cells.get((blocks.length - 1) * words.length + until - 1);
    entry?.setAttribute("tabindex", "0");
  }

  /** @param {string} title */
  function column(title) {
    return h("th", { scope: "col", title }, h("bdi", {}, title));
  }

  function colour() {
    const kind = model.get("colour");
    const ranked = kind === "rank" && numbers.rank.length > 0;
    for (const [cell, tag] of cells) {
      const value = strength(numbers, kind, cell, top, size);
      tag.style.setProperty("--strength", Math.max(0, Math.min(value, 1)).toFixed(3));
      const text = ranked ? String(numbers.rank[cell]) : vocabulary[numbers.top[cell * top]];
      setText(/** @type {Element} */ (tag.firstElementChild), text);
    }
    choice.value = kind;
    setText(low, kind === "rank" ? `rank ${size}` : kind === "entropy" ? "0" : "0%");
    setText(high, kind === "rank" ? "1" : kind === "entropy" ? `${Math.log2(size).toFixed(1)} bits` : "100%");
    if (shown >= 0) describe(shown);
  }

  function mark() {
    const [block, position] = model.get("selected");
    const chosen = blocks.indexOf(block) * words.length + position - first;
    for (const [cell, tag] of cells) {
      tag.setAttribute("aria-selected", String(block !== undefined && cell === chosen));
    }
    if (shown >= 0) describe(shown);
  }

  /** @param {{ number: number, chance: number }} item one of a cell's likeliest tokens */
  function candidate({ number, chance }) {
    const bar = h("i", { class: "sn-chance" });
    bar.style.width = `${100 * chance}%`;
    const name = h(
      "button",
      {
        type: "button",
        title: "Show the rank of this token everywhere",
        onclick: () => act(model, "rank_number", { number }),
      },
      h("bdi", {}, vocabulary[number]),
    );
    return h("li", {}, name, h("span", { class: "sn-num" }, percent(chance)), bar);
  }

  /** @param {number} cell */
  function describe(cell) {
    if (shown < 0) fill(details, title, candidates, entropy, ranked, hint);
    shown = cell;
    const [block, at] = [blocks[Math.floor(cell / words.length)], cell % words.length];
    const places = Array.from({ length: top }, (_, place) => cell * top + place);
    const found = places.map((place) => ({ number: numbers.top[place], chance: numbers.chance[place] }));
    keepItems(candidates, found, candidate);
    setText(where, `block ${block}, token ${first + at + 1} `);
    setText(said, words[at]);
    setText(entropy, `entropy ${numbers.entropy[cell].toFixed(1)} bits`);
    ranked.hidden = !numbers.rank.length;
    setText(rankedWord, model.get("token"));
    setText(rankOf, ` ${numbers.rank[cell]}`);
    const [chosenBlock, chosenPosition] = model.get("selected");
    const isChosen = chosenBlock === block && chosenPosition === first + at;
    setText(
      hint,
      isChosen ? "selected: .hidden_state in Python" : "click or Enter: hand it to Python as .hidden_state",
    );
  }

  /** @param {Event} event */
  function cellOf(event) {
    const tag = /** @type {Element} */ (event.target).closest("[data-cell]");
    return tag instanceof HTMLElement ? Number(tag.dataset.cell) : -1;
  }

  /** @param {Event} event */
  function point(event) {
    const cell = cellOf(event);
    if (cell >= 0 && cell !== shown) describe(cell);
  }

  grid.addEventListener("pointerover", point);
  grid.addEventListener("focusin", point);
  grid.addEventListener("click", (event) => {
    const cell = cellOf(event);
    if (cell >= 0) {
      focus(cell);
      select(cell);
    }
  });
  grid.addEventListener("keydown", (event) => {
    const cell = cellOf(event);
    if (cell < 0) return;
    if (event.key === "Enter" || event.key === " ") select(cell);
    else if (!move(cell, event.key)) return;
    event.preventDefault();
    event.stopPropagation();
  });

  /**
   * Focus a cell's neighbour; turns the page at its edge.
   * @param {number} cell
   * @param {string} key
   */
  function move(cell, key) {
    const row = Math.floor(cell / words.length);
    const at = cell % words.length;
    const steps = /** @type {Record<string, number[]>} */ ({
      ArrowUp: [row + 1, at],
      ArrowDown: [row - 1, at],
      ArrowLeft: [row, at - 1],
      ArrowRight: [row, at + 1],
      PageUp: [blocks.length - 1, at],
      PageDown: [0, at],
      Home: [row, 0],
      End: [row, words.length - 1],
    });
    if (!(key in steps)) return false;
    const [up, right] = steps[key];
    const [newRow, newAt] = [
      Math.max(0, Math.min(up, blocks.length - 1)),
      Math.max(0, Math.min(right, words.length - 1)),
    ];
    const newPage = pages - 1 - Math.floor((words.length - 1 - newAt) / PAGE);
    if (newPage !== page) turn(newPage);
    focus(newRow * words.length + newAt);
    return true;
  }

  /** @param {number} cell */
  function focus(cell) {
    for (const tag of cells.values()) if (tag.tabIndex === 0) tag.tabIndex = -1;
    const tag = cells.get(cell);
    if (!tag) return;
    hold();
    tag.tabIndex = 0;
    tag.focus({ preventScroll: false });
  }

  fill(details, h("div", { class: "sn-dim" }, "Point at a cell, or move with the arrow keys."));
  turn(page);
  return [
    () => sized.disconnect(),
    follow(model, ["colour"], colour),
    follow(model, ["ranks", "token"], () => {
      numbers = numbersOf(model);
      if (model.get("token")) word.value = model.get("token");
      colour();
    }),
    follow(model, ["ranking"], () => {
      rank.disabled = model.get("ranking");
      setText(rank, model.get("ranking") ? "Ranking…" : "Rank");
    }),
    follow(model, ["selected"], mark),
  ];
}

export default { render: widget("Logit lens", "lens", build) };
