import { afterEach, describe, expect, test, vi } from "vitest";
import chat from "../src/chat.js";
import { FakeModel, WRITING, show } from "./fake_model.js";

const TURNS = [
  { role: "user", text: "<b>hi</b>", branch: [0, 1] },
  {
    role: "assistant",
    text: "**yes**",
    html: "<p><strong>yes</strong></p>",
    edited: false,
    branch: [0, 1],
  },
];

/** @param {Record<string, any>} [more] */
const model = (more = {}) =>
  new FakeModel({
    ...WRITING,
    turns: TURNS,
    live: "",
    typed: "",
    edits: [],
    can_restore: false,
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
  test("an answer in which a server had a part that was found wrong says so", () => {
    const said = "local-1 was found wrong. From token 3 on, this answer may be wrong";
    const view = show(chat, model({ turns: [TURNS[0], { ...TURNS[1], suspicion: said }] }));
    expect(view.byId("suspicion").textContent).toBe(said);
    expect(view.all("[data-wrong]").length).toBe(1);
  });

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
    fake.update({ state: "writing", turns: [...TURNS, { role: "user", text: "and?", branch: [0, 1] }] });
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

describe("branches", () => {
  const TWO = [TURNS[0], { ...TURNS[1], branch: [1, 2] }];

  test("‹1/2› steps, says where it is, and keeps the focus", () => {
    const fake = model({ turns: TWO });
    const view = show(chat, fake);
    const steps = () => view.find(".sn-stepper");
    expect(steps().getAttribute("aria-label")).toBe("branch 2 of 2");
    expect(view.byId("place").textContent).toBe("2/2");
    expect(/** @type {HTMLButtonElement} */ (view.byId("next")).disabled).toBe(true);
    view.byId("previous").focus();
    view.byId("previous").click();
    expect(fake.sent).toEqual([{ action: "choose", with: { turn: 1, branch: 0 } }]);
    fake.update({ turns: [TURNS[0], { ...TURNS[1], text: "no", html: "<p>no</p>", branch: [0, 3] }] });
    expect(view.byId("place").textContent).toBe("1/3");
    fake.update({ turns: [TURNS[0], { ...TURNS[1], branch: [1, 3] }] });
    view.byId("next").focus();
    fake.update({ turns: [TURNS[0], { ...TURNS[1], text: "x", html: "x", branch: [1, 3] }] });
    expect(document.activeElement).toBe(view.byId("next"));
    fake.update({ state: "writing" });
    expect(/** @type {HTMLButtonElement} */ (view.byId("previous")).disabled).toBe(true);
  });

  test("what a click does is said before", () => {
    const fake = model({ turns: [{ ...TURNS[0], branch: [2, 3] }, TURNS[1]] });
    const view = show(chat, fake);
    const kept = "this message and the 1 message after it are kept as branch ‹3›";
    expect(view.all("[data-testid=edit]")[0].title).toBe(`Starts a new branch; ${kept}`);
    expect(view.byId("retry").title).toBe("Another answer, as a new branch; this one is kept");
    view.all("[data-testid=edit]")[0].click();
    expect(view.byId("edit-what").textContent).toContain(kept);
    view.byId("clear").click();
    expect(view.byId("clear").title).toContain("can be restored");
    fake.update({ turns: [], can_restore: true });
    expect(view.byId("clear").textContent).toBe("Undo clear");
    view.byId("clear").click();
    expect(fake.sent.map((message) => message.action)).toEqual(["clear", "restore"]);
  });

  test("two branches lie side by side", () => {
    const fake = model({ turns: TWO });
    const view = show(chat, fake);
    view.byId("compare").click();
    expect(fake.sent).toEqual([{ action: "compare", with: { turn: 1, branch: 0 } }]);
    const beside = { role: "assistant", text: "no", html: "<p>no</p>", edited: true, branch: 0, after: [{ role: "user", text: "why?" }] };
    fake.update({ turns: [TURNS[0], { ...TWO[1], beside }] });
    expect(view.byId("beside").textContent).toBe("2/2yes1/2noYouwhy?");
    view.byId("compare").click();
    expect(fake.sent[1]).toEqual({ action: "compare", with: { turn: 1, branch: null } });
  });

  test("a question without an answer is asked again; messages are copied", async () => {
    const fake = model({ turns: [TURNS[0]] });
    const view = show(chat, fake);
    const copied = vi.fn();
    vi.stubGlobal("navigator", { clipboard: { writeText: copied } });
    view.byId("copy").click();
    view.byId("copy-all").click();
    vi.unstubAllGlobals();
    expect(copied.mock.calls).toEqual([["<b>hi</b>"], ["**You**\n\n<b>hi</b>\n"]]);
    view.byId("retry").click();
    expect(fake.sent).toEqual([{ action: "retry", with: {} }]);
  });
});

describe("typing", () => {
  test("what is typed is kept after a pause, is there in a new view, and gone when it is sent", () => {
    vi.useFakeTimers();
    const fake = model();
    const view = show(chat, fake);
    const area = field(view, "message");
    area.focus();
    area.value = "half a sen";
    area.dispatchEvent(new Event("input"));
    expect(fake.saved).toEqual({});
    vi.advanceTimersByTime(500);
    expect(fake.saved).toEqual({ typed: "half a sen" });
    area.value = "half a sentence";
    area.dispatchEvent(new Event("input"));
    fake.update({ typed: "half a sen" }); // the kernel's answer to what was sent before
    expect(area.value).toBe("half a sentence");
    const other = show(chat, fake);
    expect(field(other, "message").value).toBe("half a sen");
    area.blur();
    expect(field(other, "message").value).toBe("half a sentence");
    other.byId("send").click();
    expect(fake.sent).toEqual([{ action: "send", with: { text: "half a sentence" } }]);
    expect([fake.saved.typed, area.value]).toEqual(["", ""]);
    vi.useRealTimers();
  });

  test("an edit inside of a turn is kept, is there in a new view, and waits on its branch", () => {
    vi.useFakeTimers();
    const fake = model();
    const view = show(chat, fake);
    view.byId("edit").click();
    const area = field(view, "edit-text");
    expect([area.value, area.matches(":focus")]).toEqual(["<b>hi</b>", true]);
    area.value = "hello";
    area.dispatchEvent(new Event("input"));
    vi.advanceTimersByTime(500);
    const kept = { turn: 0, of: "<b>hi</b>", text: "hello" };
    expect(fake.saved.edits).toEqual([kept]);
    const other = show(chat, fake);
    expect(field(other, "edit-text").value).toBe("hello");
    area.value = "hello there";
    area.dispatchEvent(new Event("input"));
    // The turn gets a second branch while somebody types: the box is made anew.
    fake.update({ turns: [{ ...TURNS[0], branch: [0, 2] }, TURNS[1]] });
    expect(field(view, "edit-text").value).toBe("hello there");
    expect(field(view, "edit-text").matches(":focus")).toBe(true);
    field(view, "edit-text").blur();
    expect(field(other, "edit-text").value).toBe("hello there");
    fake.update({ turns: [{ ...TURNS[0], text: "another branch", branch: [1, 2] }] });
    expect(view.byId("edit-text")).toBe(null);
    fake.update({ turns: TURNS });
    expect(field(view, "edit-text").value).toBe("hello there");
    fake.update({ state: "writing" });
    press(field(view, "edit-text"), "Enter");
    expect(fake.sent).toEqual([]);
    expect(/** @type {HTMLButtonElement} */ (view.byId("edit-save")).disabled).toBe(true);
    fake.update({ state: "idle" });
    press(field(view, "edit-text"), "Enter");
    expect(fake.sent).toEqual([{ action: "edit", with: { turn: 0, text: "hello there" } }]);
    expect([fake.saved.edits, view.byId("edit-text"), other.byId("edit-text")]).toEqual([[], null, null]);
    vi.useRealTimers();
  });

  test("an edit that was given up leaves the turn as it was", () => {
    const fake = model();
    const view = show(chat, fake);
    view.byId("edit").click();
    field(view, "edit-text").value = "nothing of this stays";
    press(field(view, "edit-text"), "Escape");
    expect([fake.saved.edits, view.byId("edit-text"), fake.sent]).toEqual([[], null, []]);
    expect(view.all("[data-role=user]")[0].textContent).toContain("<b>hi</b>");
  });

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
