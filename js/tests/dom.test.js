import { afterEach, describe, expect, test, vi } from "vitest";
import {
  act, bytes, duration, follow, h, isAlive, isDark, keepItems, number, roving, setHtml, setText, widget,
} from "../src/dom.js";
import { FakeModel, show } from "./fake_model.js";

const asModel = (/** @type {FakeModel} */ fake) => /** @type {any} */ (fake);

afterEach(() => {
  document.body.replaceChildren();
  document.body.removeAttribute("class");
  delete document.body.dataset.jpThemeLight;
  document.documentElement.removeAttribute("class");
  document.documentElement.removeAttribute("theme");
});

describe("elements", () => {
  test("children from elsewhere are text, whatever they hold", () => {
    const element = h("p", { title: "<b>" }, "<img src=x onerror=alert(1)>", null, false, 3);
    expect(element.children.length).toBe(0);
    expect(element.textContent).toBe("<img src=x onerror=alert(1)>3");
  });

  test("listeners and left-out attributes", () => {
    let clicks = 0;
    const button = h("button", { onclick: () => clicks++, disabled: false, hidden: true });
    button.click();
    expect(clicks).toBe(1);
    expect(button.hasAttribute("disabled")).toBe(false);
    expect(button.getAttribute("hidden")).toBe("");
  });
});

describe("the frame of a widget", () => {
  const counter = {
    render: widget("Counter", "counter", ({ model, root }) => [
      follow(model, ["count"], () => {
        root.textContent = String(model.get("count"));
      }),
    ]),
  };

  test("follows its traits until it is closed, and then holds on to nothing", () => {
    const model = new FakeModel({ count: 1 });
    const view = show(counter, model);
    model.update({ count: 2 });
    expect(view.find(".sn-body").textContent).toBe("2");
    expect(view.byId("counter").getAttribute("aria-label")).toBe("Counter");
    view.close();
    expect(model.listening).toBe(0);
  });

  test("two views of one model agree", () => {
    const model = new FakeModel({ count: 1 });
    const views = [show(counter, model), show(counter, model)];
    model.set("count", 7);
    expect(views.map((view) => view.find(".sn-body").textContent)).toEqual(["7", "7"]);
  });

  test("an error of Python's side stands in a panel until it is dismissed", () => {
    const model = new FakeModel({ count: 1 });
    const view = show(counter, model);
    expect(view.byId("error").hidden).toBe(true);
    model.update({ error: "ValueError: <b>no</b>" });
    expect(view.byId("error").hidden).toBe(false);
    expect(view.find(".sn-error-text").textContent).toBe("ValueError: <b>no</b>");
    view.find(".sn-error button").click();
    expect(model.sent).toEqual([{ action: "dismiss", with: {} }]);
    model.update({ error: "" });
    expect(view.byId("error").hidden).toBe(true);
  });

  test("without a sign of life it says so, in place and in grey, until there is one", () => {
    vi.useFakeTimers();
    const model = new FakeModel({ count: 1 });
    const view = show(counter, model);
    const note = () => (view.byId("gone").hidden ? "" : view.byId("gone").textContent);
    model.emit("msg:custom", { alive: true });
    vi.advanceTimersByTime(11_000);
    expect([note(), isAlive(asModel(model))]).toEqual(["", true]);
    vi.advanceTimersByTime(3000);
    expect(note()).toBe("The kernel has ended or was restarted: this is the last state.");
    expect(view.byId("counter").classList.contains("sn-over")).toBe(true);
    expect(isAlive(asModel(model))).toBe(false);
    model.emit("msg:custom", { alive: true });
    expect([note(), isAlive(asModel(model))]).toEqual(["", true]);
    model.update({ gone: "The notebook has left this swarm." });
    expect(note()).toBe("The notebook has left this swarm.");
    view.close();
    expect(model.listening).toBe(0);
    vi.useRealTimers();
  });

  test("a view that fails says so in the same panel", () => {
    const broken = widget("Broken", "broken", () => {
      throw new Error("no data");
    });
    const silent = console.error;
    console.error = () => {};
    const view = show({ render: broken }, new FakeModel({}));
    console.error = silent;
    expect(view.byId("error").textContent).toContain("no data");
  });
});

test("an action is a message with its arguments", () => {
  const model = new FakeModel({});
  act(asModel(model), "stop", { soon: true });
  expect(model.sent).toEqual([{ action: "stop", with: { soon: true } }]);
});

describe("the theme", () => {
  const pages = /** @type {Array<[string, boolean, () => void]>} */ ([
    ["JupyterLab dark", true, () => (document.body.dataset.jpThemeLight = "false")],
    ["JupyterLab light", false, () => (document.body.dataset.jpThemeLight = "true")],
    ["VS Code dark", true, () => (document.body.className = "vscode-dark")],
    ["VS Code high contrast", true, () => (document.body.className = "vscode-high-contrast")],
    ["VS Code light", false, () => (document.body.className = "vscode-light")],
    [
      "VS Code light high contrast",
      false,
      () => (document.body.className = "vscode-high-contrast-light"),
    ],
    ["Colab", true, () => document.documentElement.setAttribute("theme", "dark")],
    ["marimo", true, () => document.documentElement.classList.add("dark")],
  ]);
  test.each(pages)("%s", (_name, dark, dress) => {
    dress();
    expect(isDark()).toBe(dark);
  });
});

test("arrow keys move the focus among items, one of which is a tab stop", () => {
  const items = [0, 1, 2].map((index) => h("li", { tabindex: index ? -1 : 0 }, index));
  const list = h("ul", {}, ...items);
  document.body.append(list);
  roving(list, "li");
  const press = (/** @type {string} */ key) =>
    document.activeElement?.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  items[0].focus();
  press("ArrowDown");
  expect(document.activeElement).toBe(items[1]);
  press("End");
  press("ArrowDown");
  expect(document.activeElement).toBe(items[2]);
  expect(items.map((item) => item.tabIndex)).toEqual([-1, -1, 0]);
  press("x");
  expect(document.activeElement).toBe(items[2]);
});

test("numbers, bytes and durations for people", () => {
  expect([null, 0, 7, 3.14159, 12345.6].map(number)).toEqual(["–", "0", "7", "3.1", "12,346"]);
  expect([0, 999, 1500, 2.5e6].map(bytes)).toEqual(["0 B", "999 B", "1.5 kB", "2.5 MB"]);
  expect([0.0012, 0.5, 3.21, 240, 7200, 260000].map(duration)).toEqual([
    "1.2 ms",
    "500 ms",
    "3.2 s",
    "4 min",
    "2 h",
    "3 days",
  ]);
});

describe("what is kept", () => {
  test("a text changes only where it differs", () => {
    const element = h("p", {}, "announced 60 s ago");
    const node = /** @type {Text} */ (element.firstChild);
    for (const text of ["announced 61 s ago", "aa", "a", "", "announced", "announced announced"]) {
      setText(element, text);
      expect(element.textContent).toBe(text);
      expect(element.firstChild).toBe(node);
    }
    element.append(h("b", {}, "!"));
    setText(element, "plain");
    expect(element.innerHTML).toBe("plain");
  });

  test("items that stay are the same elements, in the order of the list", () => {
    const list = h("ul");
    const make = (/** @type {string} */ word) => h("li", {}, word);
    keepItems(list, ["a", "b", "c"], make);
    const [a, , c] = list.children;
    keepItems(list, ["c", "new", "a"], make);
    expect(list.textContent).toBe("cnewa");
    expect([list.children[0], list.children[2]]).toEqual([c, a]);
    keepItems(list, ["a", "a"], make);
    expect(list.textContent).toBe("aa");
    keepItems(list, [], make);
    expect(list.children.length).toBe(0);
  });

  test("HTML that grows keeps what it begins with", () => {
    const box = h("div");
    setHtml(box, "<p>one</p><p>tw</p>");
    const first = box.firstChild;
    setHtml(box, "<p>one</p><p>two</p>\n<pre>3</pre>");
    expect(box.firstChild).toBe(first);
    expect(box.innerHTML).toBe("<p>one</p><p>two</p>\n<pre>3</pre>");
    setHtml(box, "");
    expect(box.innerHTML).toBe("");
  });
});
