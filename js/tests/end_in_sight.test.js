import { afterEach, expect, test, vi } from "vitest";
import chat from "../src/chat.js";
import { endInSight, h } from "../src/dom.js";
import generate from "../src/generate.js";
import { FakeModel } from "./fake_model.js";

const ROW = 50; // pixels
const HEIGHT = 200;
const RUN = { prompt: "", seed: null, state: "idle", progress: [], stats: {}, waiting: {}, adapters: [], typed: "", edits: [], touched: [], suspicion: "" };

// A browser's layout, as far as scrolling needs it: what is not on the page has no size and cannot
// be scrolled.
/** @type {WeakMap<HTMLElement, number>} */
const tops = new WeakMap();
/** @type {PropertyDescriptorMap & ThisType<HTMLElement>} */
const LAYOUT = {
  scrollHeight: {
    get() {
      return this.isConnected ? ROW * this.querySelectorAll("*").length : 0;
    },
  },
  clientHeight: {
    get() {
      return Math.min(HEIGHT, this.scrollHeight);
    },
  },
  scrollTop: {
    get() {
      return tops.get(this) ?? 0;
    },
    set(value) {
      tops.set(this, Math.max(0, Math.min(value, this.scrollHeight - this.clientHeight)));
      this.dispatchEvent(new Event("scroll"));
    },
  },
};
Object.defineProperties(HTMLElement.prototype, LAYOUT);

/** @type {Map<() => void, HTMLElement>} */
const observed = new Map();
vi.stubGlobal(
  "ResizeObserver",
  class {
    /** @param {() => void} tell */
    constructor(tell) {
      this.tell = tell;
    }

    /** @param {HTMLElement} box */
    observe(box) {
      observed.set(this.tell, box);
    }

    disconnect() {
      observed.delete(this.tell);
    }
  },
);

/**
 * Put an element on the page, and tell those that watch its size.
 * @param {HTMLElement} element
 */
function attach(element) {
  document.body.append(element);
  for (const [tell, box] of observed) if (box.isConnected) tell();
}

const rows = (/** @type {number} */ count) => Array.from({ length: count }, () => h("p"));

/** @param {HTMLElement} box */
const fromEnd = (box) => box.scrollHeight - box.clientHeight - box.scrollTop;

afterEach(() => {
  document.body.replaceChildren();
  expect(observed.size).toBe(0); // what has ended watches nothing
});

test("a box that was filled before it was shown shows its end, and keeps it in sight", () => {
  const box = h("div");
  const sight = endInSight(box);
  sight.during(() => box.append(...rows(10)));
  attach(box);
  expect(box.scrollTop).toBe(10 * ROW - HEIGHT);
  sight.during(() => box.append(...rows(5)));
  expect(box.scrollTop).toBe(15 * ROW - HEIGHT);
  sight.end();
});

test("who has scrolled up to read stays there, also if the box goes and comes back", () => {
  const box = h("div", {}, ...rows(10));
  const sight = endInSight(box);
  attach(box);
  box.scrollTop = 120;
  sight.during(() => box.append(...rows(5)));
  expect(box.scrollTop).toBe(120);
  box.remove();
  sight.during(() => box.append(...rows(5)));
  attach(box);
  expect(box.scrollTop).toBe(120);
  box.scrollTop = 20 * ROW;
  sight.during(() => box.append(...rows(5)));
  expect(fromEnd(box)).toBe(0);
  sight.end();
});

test.each([
  {
    kind: "text",
    widget: generate,
    traits: {
      pages: 0,
      tail: Array.from({ length: 40 }, () => [" word", 0.5, false, []]),
      beside: null,
      aside: [],
    },
  },
  {
    kind: "log",
    widget: chat,
    traits: {
      turns: Array.from({ length: 40 }, () => ({ role: "user", text: "hi", branch: [0, 1] })),
      live: "",
    },
  },
])("a view that is opened on a long $kind begins at its end", ({ kind, widget, traits }) => {
  const fake = new FakeModel({ ...RUN, ...traits });
  const el = h("div");
  const end = /** @type {() => void} */ (
    widget.render(/** @type {any} */ ({ model: fake, el, signal: new AbortController().signal }))
  );
  attach(el);
  const box = /** @type {HTMLElement} */ (el.querySelector(`[data-testid=${kind}]`));
  expect(box.scrollTop).toBeGreaterThan(10 * ROW);
  expect(fromEnd(box)).toBe(0);
  end();
});
