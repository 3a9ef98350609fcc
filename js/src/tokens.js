// A text whose every token can be pointed at: coloured by how sure the model was, with the tokens
// that it might have written instead. Tokens are appended in paragraphs, so that a long text costs
// the browser no more per token than a short one.

import { OWN_KEYS, endInSight, fill, h, roving, stepped } from "./dom.js";
import { ownKeys } from "./controls.js";

/** @typedef {[number, string, number]} Alternative id, text, probability */
/** @typedef {[string, number | null, boolean, Alternative[]]} Cell as in widgets/parts/token_cells.py */

// Marks that turn the direction of all that follows: shown instead of obeyed.
// eslint-disable-next-line no-control-regex
const HARMFUL = /[\u202a-\u202e\u2066-\u2069\u0000-\u0008\u000b-\u001f\u007f]/g;
const MOST_IN_PARAGRAPH = 1000;
const HIDE_AFTER = 300; // ms in which the pointer can get from a token to its alternatives
const SWITCH_AFTER = 120; // ms on another token before that one's are shown

/**
 * A text as it can be shown anywhere.
 * @param {string} text
 */
export function harmless(text) {
  return text.replace(HARMFUL, (mark) => {
    const code = mark.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
  });
}

/**
 * A single token in a list: its white space is to be seen.
 * @param {string} text
 */
export function visible(text) {
  return harmless(text).replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→") || "∅";
}

/** @param {number | null} part */
export function percent(part) {
  if (part === null) return "not asked";
  const shown = 100 * part;
  if (shown > 0 && shown < 0.1) return "< 0.1 %";
  return `${shown >= 99.95 || shown === 0 ? Math.round(shown) : shown.toFixed(1)} %`;
}

/**
 * A text to be read beside another; what is different in it is marked.
 */
export function plainView() {
  const text = h("div", { class: "sn-text", dir: "auto", tabindex: 0 });
  const element = h("div", { class: "sn-aside", "data-testid": "aside", hidden: true }, text);
  return {
    element,
    /**
     * @param {string | null} name
     * @param {Cell[]} cells
     * @param {Cell[]} other
     */
    show(name, cells, other) {
      element.hidden = name === null;
      text.setAttribute("aria-label", name ?? "");
      text.setAttribute("role", "group");
      const words = (/** @type {Cell[]} */ some) => some.map(([piece, , special]) => (special ? "" : piece));
      let same = 0;
      while (same < cells.length && cells[same][0] === other[same]?.[0]) same++;
      fill(
        text,
        h("span", {}, harmless(words(cells.slice(0, same)).join(""))),
        h("mark", {}, harmless(words(cells.slice(same)).join(""))),
      );
    },
  };
}

/**
 * @param {(position: number, token: number | string) => void} branch what a choice does
 */
export function tokenView(branch) {
  const text = h("div", {
    class: "sn-text",
    role: "group",
    "aria-label": "Generated text",
    "data-testid": "text",
  });
  const popover = h("div", {
    class: "sn-popover",
    role: "dialog",
    popover: "manual", // above everything, and cut off by no cell
    "data-testid": "alternatives",
    hidden: true,
  });
  const element = h("div", { class: "sn-output", ...OWN_KEYS }, text, popover);
  const sight = endInSight(text);
  /** @type {Cell[]} */
  let cells = [];
  /** @type {HTMLElement[]} */
  const spans = [];
  let shown = -1;
  // Escape has sent it away from this token: neither the focus that returns nor the pointer that
  // rests there brings it back.
  let dismissed = -1;
  let enabled = true;
  /** @type {Array<[number, number]>} */
  let touched = [];
  /** @type {number | undefined} */
  let timer;

  const position = (/** @type {EventTarget | null} */ target) =>
    target instanceof HTMLElement && target.dataset.at !== undefined ? Number(target.dataset.at) : -1;

  /** @param {Cell} cell */
  function span(cell, /** @type {number} */ at) {
    const [piece, probability, special] = cell;
    const partial = piece === "";
    const kind = special ? " sn-special" : partial ? " sn-partial" : "";
    const token = h(
      "span",
      {
        class: `sn-token${kind}`,
        "data-at": at,
        "data-testid": "token",
        tabindex: at ? -1 : 0,
        title: partial ? "part of a character" : null,
      },
      harmless(piece),
    );
    if (probability !== null) token.style.setProperty("--unsure", (1 - probability).toFixed(2));
    else token.classList.add("sn-edited");
    doubt(token, at);
    return token;
  }

  /**
   * @param {HTMLElement} token
   * @param {number} at
   */
  function doubt(token, at) {
    const wrong = touched.some(([start, end]) => start <= at && at < end);
    token.classList.toggle("sn-touched", wrong);
  }

  function paragraph() {
    const last = text.lastElementChild;
    const before = spans[spans.length - 1]?.textContent ?? "";
    if (last && !before.endsWith("\n") && last.childElementCount < MOST_IN_PARAGRAPH) return last;
    const added = h("div", { class: "sn-paragraph", dir: "auto" });
    text.append(added);
    return added;
  }

  function cut(/** @type {number} */ length) {
    for (const gone of spans.splice(length)) {
      const parent = gone.parentElement;
      gone.remove();
      if (parent && !parent.childElementCount) parent.remove();
    }
    if (shown >= length) hide();
  }

  function show(/** @type {Cell[]} */ now) {
    let same = Math.min(spans.length, now.length);
    // Cells never change but by being cut off; the last ones tell.
    while (same && JSON.stringify(cells[same - 1]) !== JSON.stringify(now[same - 1])) same--;
    const change = () => {
      cut(same);
      for (let at = same; at < now.length; at++) {
        const parent = paragraph();
        spans.push(span(now[at], at));
        parent.append(spans[at]);
      }
      cells = now;
    };
    if (shown < 0) sight.during(change);
    else change(); // the alternatives stay beside their token
  }

  function hide() {
    clearTimeout(timer);
    spans[shown]?.classList.remove("sn-shown");
    shown = -1;
    if (!popover.hidden) popover.hidePopover?.();
    popover.hidden = true;
  }

  /** @param {number} at */
  function open(at) {
    clearTimeout(timer);
    if (at === shown || !cells[at]) return;
    hide();
    shown = at;
    dismissed = -1;
    const [piece, probability, , alternatives] = cells[at];
    const name = visible(piece);
    popover.setAttribute("aria-label", `Alternatives to ${name}`);
    const rows = alternatives.map(([id, word, part], index) => {
      const bar = h("span", { class: "sn-chance" });
      bar.style.width = `${100 * part}%`;
      return h(
        "li",
        {},
        h(
          "button",
          {
            type: "button",
            disabled: !enabled,
            tabindex: index ? -1 : 0,
            "data-testid": "alternative",
            title: "Continue from here as a new text; this one is kept",
            "aria-label": `Branch with ${visible(word)}, ${percent(part)}`,
            onclick: () => choose(at, id),
          },
          h("bdi", { class: "sn-word" }, visible(word)),
          h("span", { class: "sn-num" }, percent(part)),
          bar,
        ),
      );
    });
    const other = h("input", {
      type: "text",
      placeholder: "other text, then Enter",
      title: "Continue with other words as a new text; this one is kept",
      disabled: !enabled,
      "aria-label": "Other text to branch with",
      "data-testid": "other",
    });
    ownKeys(other, (event) => {
      if (event.key === "Enter" && other.value) choose(at, other.value);
      else if (event.key === "Escape") back();
      return event.key === "Enter" || event.key === "Escape";
    });
    const list = h("ol", {}, ...rows);
    roving(list, "button:not(:disabled)");
    fill(
      popover,
      h("div", { class: "sn-head" }, h("bdi", { class: "sn-word" }, name), h("span", { class: "sn-num" }, percent(probability))),
      list,
      other,
    );
    spans[at].classList.add("sn-shown");
    popover.hidden = false;
    popover.showPopover?.();
    place(spans[at]);
  }

  /** @param {HTMLElement} token */
  function place(token) {
    const { left, top, bottom } = [...token.getClientRects()].pop() ?? token.getBoundingClientRect();
    const [width, height] = [popover.offsetWidth, popover.offsetHeight];
    const below = bottom + height <= window.innerHeight || top < height;
    popover.style.left = `${Math.max(0, Math.min(left - 6, window.innerWidth - width))}px`;
    popover.style.top = `${below ? bottom : top - height}px`;
  }

  /**
   * @param {number} at
   * @param {number | string} token
   */
  function choose(at, token) {
    if (!enabled) return;
    hide();
    branch(at, token);
  }

  function back() {
    dismissed = shown;
    hide();
    spans[dismissed]?.focus();
  }

  const soon = (/** @type {() => void} */ work, /** @type {number} */ ms) => {
    clearTimeout(timer);
    timer = window.setTimeout(work, ms);
  };
  text.addEventListener("mouseover", (event) => {
    const at = position(event.target);
    // Who comes from elsewhere did not rest there; a list that vanishes under the pointer may leave
    // null, or itself.
    const from = event.relatedTarget;
    if (from instanceof Node && !element.contains(from)) dismissed = -1;
    if (at < 0 || at === dismissed || popover.contains(document.activeElement)) return;
    if (shown < 0) open(at);
    else soon(() => open(at), SWITCH_AFTER);
  });
  popover.addEventListener("mouseenter", () => clearTimeout(timer));
  element.addEventListener("mouseleave", () => {
    dismissed = -1;
    if (!element.contains(document.activeElement)) soon(hide, HIDE_AFTER);
  });
  text.addEventListener("focusin", (event) => {
    const at = position(event.target);
    if (at !== dismissed) open(at);
  });
  element.addEventListener("focusout", (event) => {
    if (!element.contains(/** @type {Node | null} */ (event.relatedTarget))) soon(hide, HIDE_AFTER);
  });
  const scrolled = (/** @type {Event} */ event) => {
    if (!popover.contains(/** @type {Node} */ (event.target))) hide();
  };
  window.addEventListener("scroll", scrolled, { capture: true, passive: true });
  // Opened by the pointer alone, it has no focus that would hear the key.
  const escaped = (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Escape" || shown < 0 || event.composedPath().includes(element)) return;
    dismissed = shown;
    hide();
  };
  window.addEventListener("keydown", escaped, { capture: true });
  ownKeys(element, (event) => {
    if (event.key === "Escape") back();
    else if ((event.key === "Enter" || event.key === "ArrowDown") && position(event.target) >= 0) {
      open(position(event.target));
      /** @type {HTMLElement | null} */ (popover.querySelector("button, input"))?.focus();
    } else return false;
    return true;
  });
  // After the keys above: left and right walk along the text, up stays for the page.
  text.addEventListener("keydown", (event) => {
    const at = position(event.target);
    const next = spans[stepped(event.key, at, spans.length) ?? -1];
    if (at < 0 || !next) return;
    event.preventDefault();
    spans[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  return {
    element,
    show,
    /** @param {Array<[number, number]>} runs of tokens that may be wrong */
    mark: (runs) => {
      touched = runs;
      spans.forEach(doubt);
    },
    /** @param {boolean} value whether a choice can be made now */
    enable: (value) => {
      enabled = value;
      for (const control of popover.querySelectorAll("button, input")) {
        /** @type {HTMLButtonElement} */ (control).disabled = !value;
      }
    },
    end: () => {
      hide();
      sight.end();
      window.removeEventListener("scroll", scrolled, { capture: true });
      window.removeEventListener("keydown", escaped, { capture: true });
    },
  };
}
