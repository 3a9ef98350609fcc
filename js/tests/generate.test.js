import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import generate from "../src/generate.js";
import { csv } from "../src/export.js";
import { harmless, percent, visible } from "../src/tokens.js";
import { FakeModel, WRITING, show } from "./fake_model.js";

const ALTERNATIVES = [
  [7, " Paris", 0.75],
  [8, " <b>x</b>", 0.2],
];

/**
 * @param {string} text
 * @param {number | null} [probability]
 * @param {boolean} [special]
 */
const cell = (text, probability = 0.75, special = false) => [text, probability, special, ALTERNATIVES];

/** @param {Record<string, any>} [more] */
const model = (more = {}) =>
  new FakeModel({
    ...WRITING,
    prompt: "Hello",
    chat: false,
    pages: 0,
    tail: [],
    texts: 0,
    shown: 0,
    origin: "",
    beside: null,
    aside: [],
    touched: [],
    suspicion: "",
    ...more,
  });

/**
 * @param {Element | null} on
 * @param {string} key
 * @param {Record<string, any>} [more]
 */
const press = (on, key, more = {}) => {
  const event = new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more });
  on?.dispatchEvent(event);
  return event;
};

/** @param {Element} on */
const hover = (on) => on.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));

beforeEach(() => vi.useFakeTimers());
afterEach(() => {
  vi.useRealTimers();
  document.body.replaceChildren();
});

/** @param {ReturnType<typeof show>} view */
const text = (view) => view.all("[data-testid=token]").map((token) => token.textContent).join("");

describe("what may be wrong", () => {
  test("tokens of a server that was found wrong are marked, also those that come later", () => {
    const fake = model({ tail: [cell("a"), cell("b")] });
    const view = show(generate, fake);
    const marked = () => view.all(".sn-touched").map((token) => token.textContent);
    expect([marked(), view.byId("suspicion").hidden]).toEqual([[], true]);
    fake.update({ touched: [[1, 3]], suspicion: "local-1 was found wrong." });
    expect(marked()).toEqual(["b"]);
    fake.update({ tail: [cell("a"), cell("b"), cell("c"), cell("d")] });
    expect(marked()).toEqual(["b", "c"]);
    expect(view.byId("suspicion").textContent).toBe("local-1 was found wrong.");
    fake.update({ touched: [], suspicion: "" });
    expect([marked(), view.byId("suspicion").hidden]).toEqual([[], true]);
  });
});

describe("running", () => {
  test("Run, Stop and Continue are offered when they can do something", () => {
    const fake = model();
    const view = show(generate, fake);
    const disabled = () =>
      ["run", "stop", "continue"].map((id) => /** @type {any} */ (view.byId(id)).disabled);
    expect(disabled()).toEqual([false, true, true]);
    view.byId("run").click();
    fake.update({ state: "writing", tail: [cell("a")] });
    expect(disabled()).toEqual([true, false, true]);
    view.byId("stop").click();
    fake.update({ state: "idle", note: "stopped" });
    expect(disabled()).toEqual([false, true, false]);
    expect(view.byId("status").textContent).toBe("stopped");
    view.byId("continue").click();
    expect(fake.sent.map((message) => message.action)).toEqual(["run", "stop", "resume"]);
    view.close();
    expect(fake.listening).toBe(0);
  });

  test("the prompt is a trait; Ctrl+Enter runs; no key reaches the notebook", () => {
    const fake = model();
    const views = [show(generate, fake), show(generate, fake)];
    const area = /** @type {HTMLTextAreaElement} */ (views[0].byId("prompt"));
    const outside = vi.fn();
    document.body.addEventListener("keydown", outside);
    area.value = "new";
    area.dispatchEvent(new Event("input"));
    expect(fake.saved.prompt).toBe("new");
    expect(/** @type {HTMLTextAreaElement} */ (views[1].byId("prompt")).value).toBe("new");
    expect(press(area, "a").defaultPrevented).toBe(false);
    expect(press(area, "Enter", { ctrlKey: true }).defaultPrevented).toBe(true);
    expect(fake.sent).toEqual([{ action: "run", with: {} }]);
    expect(outside).not.toHaveBeenCalled();
  });

  test("the controls are traits; what does not count without sampling is off", () => {
    const fake = model();
    const view = show(generate, fake);
    const input = (/** @type {string} */ id) => /** @type {HTMLInputElement} */ (view.byId(id));
    const change = (/** @type {string} */ id, /** @type {string} */ value) => {
      input(id).value = value;
      input(id).dispatchEvent(new Event("change"));
    };
    expect(input("temperature").disabled).toBe(true);
    expect(input("max_new_tokens").disabled).toBe(false);
    input("do_sample").checked = true;
    input("do_sample").dispatchEvent(new Event("change"));
    expect(input("temperature").disabled).toBe(false);
    change("temperature", "0.75");
    change("seed", "5");
    change("top_k", "2.5");
    expect(fake.saved).toEqual({ do_sample: true, temperature: 0.75, seed: 5 });
    // What is refused stays, and the field says why.
    expect(input("top_k").value).toBe("2.5");
    expect(input("top_k").getAttribute("aria-invalid")).toBe("true");
    const refused = () => view.byId("refused").textContent;
    expect(refused()).toBe("top_k must be 0 (all tokens) or a positive integer");
    change("temperature", "-1");
    expect(refused()).toBe("temperature must be 0 (greedy) or a positive number");
    expect(fake.get("temperature")).toBe(0.75);
    change("temperature", "0");
    expect(refused()).toBe("");
    expect(fake.get("temperature")).toBe(0);
    change("seed", "");
    expect(fake.saved.seed).toBe(null);
  });

  test("a missing server is one sentence, with how long it is waited for", () => {
    const text = "No server holds blocks 0:15 (a had them until now); asking the swarm every second";
    const fake = model({ state: "reading" });
    const view = show(generate, fake);
    fake.update({ waiting: { text, since: Date.now() / 1000 - 12, limit: 30 } });
    expect(view.byId("status").textContent).toBe(text);
    expect(view.byId("waited").textContent).toBe("12 of 30 s");
    vi.advanceTimersByTime(2000);
    expect(view.byId("waited").textContent).toBe("14 of 30 s");
    fake.update({ waiting: {}, state: "idle", note: "stopped", obstacle: "no server holds blocks 0:15" });
    expect(view.byId("status").textContent).toBe("stopped");
    expect(view.byId("waited").textContent).toBe("");
    expect(view.byId("cost").textContent).toBe(
      "The next run waits for servers: no server holds blocks 0:15.",
    );
    view.close();
  });

  test("facts of the run", () => {
    const fake = model({ state: "reading", progress: [256, 1000] });
    const view = show(generate, fake);
    expect(view.byId("status").textContent).toBe("Processing prompt: 256 of 1,000 tokens");
    const stats = { tokens: 3, computed: 9, first: 0.2, rate: 12.34, shares: [["a", 0.5]], lost: 1 };
    fake.update({ state: "idle", progress: [], note: "finished", stats, bill: "6 requests" });
    expect(view.byId("stats").textContent).toBe(
      "3 tokens · first after 200 ms · 12.3 tokens/s · 9 prompt tokens processed · 1 server lost and replaced",
    );
    expect(view.byId("shares").textContent).toBe("a 50 %notebook 50 %");
    expect(view.byId("cost").textContent).toBe("Used 6 requests. ");
  });
});

describe("the text", () => {
  test("grows, is cut off, and is text whatever it holds", () => {
    const fake = model({ pages: 1, page0: [cell("<b>a</b>")], tail: [cell(" b")] });
    const view = show(generate, fake);
    const first = view.all("[data-testid=token]")[0];
    expect(first.children.length).toBe(0);
    fake.update({ tail: [cell(" b"), cell("\n"), cell("c", null)] });
    expect(text(view)).toBe("<b>a</b> b\nc");
    expect(view.all("[data-testid=token]")[0]).toBe(first);
    expect(view.all(".sn-paragraph").length).toBe(2);
    fake.update({ page1: [cell(" b"), cell("\n")] });
    fake.update({ pages: 2, tail: [] });
    expect(text(view)).toBe("<b>a</b> b\n");
    fake.update({ pages: 1, tail: [cell(" b")] });
    expect(text(view)).toBe("<b>a</b> b");
    expect(view.all(".sn-paragraph").length).toBe(1);
    fake.update({ pages: 0, tail: [cell("z")] });
    expect(text(view)).toBe("z");
  });

  test("a long text without a line break stay in paragraphs of bounded size", () => {
    const fake = model({ pages: 1, page0: Array.from({ length: 3000 }, (_, at) => cell(`w${at} `)) });
    const view = show(generate, fake);
    expect(view.all("[data-testid=token]").length).toBe(3000);
    expect(Math.max(...view.all(".sn-paragraph").map((one) => one.childElementCount))).toBe(1000);
    const last = view.all("[data-testid=token]")[2999];
    fake.update({ tail: [cell("end")] });
    expect(view.all("[data-testid=token]")[2999]).toBe(last);
    expect(view.all("[data-testid=token]").length).toBe(3001);
  });

  test("marks that turn the direction of text, and control characters, are shown", () => {
    expect(harmless("a\u202eb\u2066c\u0000d\ne")).toBe("a[U+202E]b[U+2066]c\u2400d\ne");
    expect(visible(" a\n")).toBe("·a↵");
    expect(visible("")).toBe("∅");
    expect([0.5, 0.99999, 0.0000001, 0, null].map(percent)).toEqual([
      "50.0 %",
      "100 %",
      "< 0.1 %",
      "0 %",
      "not asked",
    ]);
  });

  test("part of a character, a mark of the format and an edited token look different", () => {
    const fake = model({ tail: [cell(""), cell("🦜"), cell("<|end|>", 0.9, true), cell("x", null)] });
    const kinds = show(generate, fake)
      .all("[data-testid=token]")
      .map((token) => token.className);
    expect(kinds).toEqual([
      "sn-token sn-partial",
      "sn-token",
      "sn-token sn-special",
      "sn-token sn-edited",
    ]);
  });
});

test("an adapter in the model is named, and can be switched off", () => {
  const fake = model();
  const view = show(generate, fake);
  expect(view.byId("adapters").hidden).toBe(true);
  fake.update({ adapters: ["my-style"] });
  expect(view.byId("adapters").hidden).toBe(false);
  expect(view.byId("adapters").textContent).toBe("with adapter my-style");
  view.byId("adapters-on").click();
  expect(fake.sent).toEqual([{ action: "switch_adapters", with: { on: false } }]);
});

test("how strongly a vector steers is a trait", () => {
  const fake = model({ steering: "steering, block 14", strength: 4 });
  const view = show(generate, fake);
  const slider = /** @type {HTMLInputElement} */ (view.byId("strength"));
  expect(slider.value).toBe("4");
  slider.value = "-2.5";
  slider.dispatchEvent(new Event("change"));
  expect(fake.saved).toEqual({ strength: -2.5 });
  expect(view.find("output").textContent).toBe("-2.5 ×");
  expect(show(generate, model()).byId("strength")).toBe(null);
});

describe("texts", () => {
  test("all are kept: ‹1/2› goes from one to the other, two lie side by side", () => {
    const fake = model({ texts: 2, shown: 1, origin: "after “Hello”", tail: [cell("a"), cell(" b")] });
    const view = show(generate, fake);
    expect(view.byId("place").textContent).toBe("2/2");
    expect(view.byId("origin").textContent).toBe("after “Hello”");
    view.byId("previous").click();
    view.byId("compare").click();
    expect(fake.sent).toEqual([
      { action: "choose", with: { text: 0 } },
      { action: "compare", with: { text: 0 } },
    ]);
    fake.update({ beside: 0, aside: [cell("a"), cell(" <b>"), cell("</s>", 0.5, true)] });
    expect(view.byId("aside").hidden).toBe(false);
    expect(view.byId("aside").textContent).toBe("a <b>");
    expect(view.find("mark").textContent).toBe(" <b>");
    view.byId("compare").click();
    expect(fake.sent[2]).toEqual({ action: "compare", with: { text: null } });
    fake.update({ beside: null, aside: [], state: "reading", tail: [] });
    expect(view.byId("aside").hidden).toBe(true);
    expect(/** @type {HTMLButtonElement} */ (view.byId("previous")).disabled).toBe(true);
  });

  test("tokens as a table", () => {
    expect(csv([["a", 'say "x"', null], [1, "two\nlines", 0.5]])).toBe(
      'a,"say ""x""",\n1,"two\nlines",0.5\n',
    );
  });
});

describe("alternatives", () => {
  const open = (/** @type {Record<string, any>} */ more = {}) => {
    const fake = model({ tail: [cell("a"), cell(" b"), cell(" c")], ...more });
    const view = show(generate, fake);
    return { fake, view, tokens: view.all("[data-testid=token]"), popover: view.byId("alternatives") };
  };

  test("the pointer shows them, a click branches", () => {
    const { fake, view, tokens, popover } = open();
    expect(popover.hidden).toBe(true);
    hover(tokens[1]);
    expect(popover.hidden).toBe(false);
    expect(popover.getAttribute("aria-label")).toBe("Alternatives to ·b");
    const choices = view.all("[data-testid=alternative]");
    expect(choices.map((one) => one.textContent)).toEqual(["·Paris75.0 %", "·<b>x</b>20.0 %"]);
    choices[1].click();
    expect(fake.sent).toEqual([{ action: "branch", with: { position: 1, token: 8 } }]);
    expect(popover.hidden).toBe(true);
  });

  test("on the way to them other tokens do not take their place; away from all they go", () => {
    const { view, tokens, popover } = open();
    hover(tokens[0]);
    hover(tokens[2]);
    popover.dispatchEvent(new MouseEvent("mouseenter"));
    vi.advanceTimersByTime(1000);
    expect(popover.getAttribute("aria-label")).toBe("Alternatives to a");
    hover(tokens[2]);
    vi.advanceTimersByTime(1000);
    expect(popover.getAttribute("aria-label")).toBe("Alternatives to ·c");
    view.find(".sn-output").dispatchEvent(new MouseEvent("mouseleave"));
    vi.advanceTimersByTime(1000);
    expect(popover.hidden).toBe(true);
  });

  test("with keys alone: walk, enter, choose, write something else, leave", () => {
    const { fake, view, tokens, popover } = open();
    tokens[0].focus();
    press(document.activeElement, "ArrowRight");
    expect(document.activeElement).toBe(tokens[1]);
    expect(tokens.map((token) => token.tabIndex)).toEqual([-1, 0, -1]);
    press(document.activeElement, "Enter");
    expect(document.activeElement).toBe(view.all("[data-testid=alternative]")[0]);
    press(document.activeElement, "ArrowDown");
    expect(document.activeElement).toBe(view.all("[data-testid=alternative]")[1]);
    press(document.activeElement, "Escape");
    expect(document.activeElement).toBe(tokens[1]);
    expect(popover.hidden).toBe(true);
    press(document.activeElement, "ArrowDown");
    const other = /** @type {HTMLInputElement} */ (view.byId("other"));
    other.focus();
    other.value = " Rome";
    press(other, "Enter");
    expect(fake.sent).toEqual([{ action: "branch", with: { position: 1, token: " Rome" } }]);
    expect(popover.hidden).toBe(true);
  });

  test("Escape sends them away for good, also where the pointer rests on their token", () => {
    const { view, tokens, popover } = open();
    hover(tokens[1]);
    press(document.body, "Escape");
    expect(popover.hidden).toBe(true);
    hover(tokens[1]);
    vi.advanceTimersByTime(5000);
    expect(popover.hidden).toBe(true);
    hover(tokens[2]);
    expect(popover.getAttribute("aria-label")).toBe("Alternatives to ·c");
    view.all("[data-testid=alternative]")[0].focus();
    press(document.activeElement, "Escape");
    hover(tokens[2]);
    vi.advanceTimersByTime(5000);
    expect(document.activeElement).toBe(tokens[2]);
    expect(popover.hidden).toBe(true);
    tokens[1].focus();
    expect(popover.hidden).toBe(false);
  });

  test("while the model writes they are seen but not chosen", () => {
    const { fake, view, tokens } = open({ state: "writing" });
    hover(tokens[0]);
    const choice = () => /** @type {HTMLButtonElement} */ (view.byId("alternative"));
    expect(choice().disabled).toBe(true);
    fake.update({ state: "idle" });
    expect(choice().disabled).toBe(false);
  });
});
