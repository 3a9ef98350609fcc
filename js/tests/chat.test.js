import { afterEach, describe, expect, test, vi } from "vitest";
import chat from "../src/chat.js";
import { FakeModel, show } from "./fake_model.js";

const TURNS = [
  { role: "user", text: "<b>hi</b>" },
  { role: "assistant", text: "**yes**", html: "<p><strong>yes</strong></p>" },
];

/** @param {Record<string, any>} [more] */
const model = (more = {}) =>
  new FakeModel({
    title: "tiny",
    has_template: true,
    do_sample: false,
    temperature: 1,
    top_p: 1,
    top_k: 50,
    max_new_tokens: 20,
    seed: null,
    state: "idle",
    progress: [],
    note: "",
    stats: {},
    preview: "",
    bill: "",
    turns: TURNS,
    live: "",
    ...more,
  });

/**
 * @param {Element} on
 * @param {string} key
 * @param {Record<string, any>} [more]
 */
const press = (on, key, more = {}) => {
  const event = new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more });
  on.dispatchEvent(event);
  return event;
};

/**
 * @param {ReturnType<typeof show>} view
 * @param {string} id
 */
const field = (view, id) => /** @type {HTMLTextAreaElement} */ (view.byId(id));

afterEach(() => document.body.replaceChildren());

describe("turns", () => {
  test("the user's are text, the model's are the HTML that Python made", () => {
    const fake = model();
    const view = show(chat, fake);
    const [user, assistant] = view.all("[data-testid=turn] .sn-said");
    expect(user.innerHTML).toBe("&lt;b&gt;hi&lt;/b&gt;");
    expect(assistant.innerHTML).toBe("<p><strong>yes</strong></p>");
    view.close();
    expect(fake.listening).toBe(0);
  });

  test("an answer grows in its place, in all views", () => {
    const fake = model({ turns: [TURNS[0]], state: "writing", live: "<p>y</p>" });
    const views = [show(chat, fake), show(chat, fake)];
    fake.update({ live: "<p>ye</p>" });
    for (const view of views) {
      expect(view.byId("live").querySelector(".sn-said")?.innerHTML).toBe("<p>ye</p>");
    }
    fake.update({ state: "idle", live: "", turns: TURNS });
    for (const view of views) {
      expect(view.byId("live")).toBe(null);
      expect(view.all("[data-testid=turn]").length).toBe(2);
    }
  });

  test("turns stay as they are while the model answers", () => {
    const fake = model();
    const view = show(chat, fake);
    const before = view.all("[data-testid=turn]");
    fake.update({ state: "writing", turns: [...TURNS, { role: "user", text: "and?" }] });
    fake.update({ state: "idle" });
    expect(view.all("[data-testid=turn]").slice(0, 2)).toEqual(before);
    expect(view.all("[data-testid=edit]").length).toBe(3);
  });

  test("retry and edit", () => {
    const fake = model();
    const view = show(chat, fake);
    view.byId("retry").click();
    view.all("[data-testid=edit]")[0].click();
    const area = field(view, "edit-text");
    expect(area.value).toBe("<b>hi</b>");
    expect(document.activeElement).toBe(area);
    press(area, "Escape");
    expect(view.byId("edit-text")).toBe(null);
    view.all("[data-testid=edit]")[0].click();
    field(view, "edit-text").value = "hello";
    view.byId("edit-save").click();
    expect(fake.sent).toEqual([
      { action: "retry", with: {} },
      { action: "edit", with: { turn: 0, text: "hello" } },
    ]);
    expect(view.byId("edit-text")).toBe(null);
  });

  test("while the model answers nothing can be changed", () => {
    const fake = model({ state: "writing" });
    const view = show(chat, fake);
    expect(view.all("[data-testid=edit], [data-testid=retry]")).toEqual([]);
    expect(/** @type {HTMLButtonElement} */ (view.byId("send")).disabled).toBe(true);
    view.byId("stop").click();
    expect(fake.sent).toEqual([{ action: "stop", with: {} }]);
  });
});

describe("typing", () => {
  test("Enter sends, Shift+Enter does not, an empty message does not; no key gets out", () => {
    const fake = model();
    const view = show(chat, fake);
    const outside = vi.fn();
    document.body.addEventListener("keydown", outside);
    const area = field(view, "message");
    press(area, "Enter");
    area.value = "hello";
    expect(press(area, "Enter", { shiftKey: true }).defaultPrevented).toBe(false);
    expect(press(area, "Enter").defaultPrevented).toBe(true);
    expect(fake.sent).toEqual([{ action: "send", with: { text: "hello" } }]);
    expect(area.value).toBe("");
    expect(outside).not.toHaveBeenCalled();
  });

  test("what is typed while the model answers is kept", () => {
    const fake = model({ state: "writing" });
    const view = show(chat, fake);
    field(view, "message").value = "next";
    press(field(view, "message"), "Enter");
    expect(field(view, "message").value).toBe("next");
    expect(fake.sent).toEqual([]);
    fake.update({ state: "idle" });
    view.byId("send").click();
    expect(fake.sent).toEqual([{ action: "send", with: { text: "next" } }]);
  });
});
