// Chat: turns, a place to type, and an answer that grows. The HTML of answers comes from Python,
// which has made it harmless (widgets/parts/markdown.py); everything else is text.

import { OWN_KEYS, act, endInSight, fill, follow, h, keepItems, setHtml, widget } from "./dom.js";
import { button, isRunning, ownKeys, runFacts, samplingControls, stopButton } from "./controls.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */
/** @typedef {{ role: string, text: string, html?: string }} Turn */

const NAMES = /** @type {Record<string, string>} */ ({
  user: "You",
  assistant: "Model",
  system: "Instructions",
});

/**
 * A text area in which Enter sends and Shift+Enter begins a line.
 * @param {Record<string, any>} attributes
 * @param {(text: string) => boolean} send whether it was sent
 * @param {() => void} [leave] on Escape
 */
function entry(attributes, send, leave) {
  const area = h("textarea", { rows: 2, dir: "auto", ...attributes });
  ownKeys(area, (event) => {
    if (event.key === "Escape" && leave) leave();
    else if (event.key !== "Enter" || event.shiftKey || event.isComposing) return false;
    else if (send(area.value)) area.value = "";
    return true;
  });
  return area;
}

/** @param {{ model: Model, root: HTMLElement }} view */
function build({ model, root }) {
  let editing = -1;
  const log = h("div", {
    class: "sn-log",
    role: "log",
    "aria-label": "Conversation",
    "data-testid": "log",
    tabindex: 0,
    ...OWN_KEYS,
  });
  const past = h("div");
  log.append(past);
  const sight = endInSight(log);
  const live = h("div", { class: "sn-said", dir: "auto" });
  const liveTurn = h(
    "article",
    { class: "sn-turn sn-assistant", "data-testid": "live", "aria-busy": "true" },
    h("header", {}, h("span", { class: "sn-role" }, NAMES.assistant)),
    live,
  );
  const empty = h("p", { class: "sn-dim" }, "No messages yet.");

  /** @param {{ turn: Turn, at: number, edited: boolean }} item */
  function article({ turn, at, edited }) {
    const said = h("div", { class: "sn-said", dir: "auto" });
    if (edited) {
      const area = entry(
        { "aria-label": "Edit this turn", "data-testid": "edit-text" },
        (text) => change(at, text),
        () => edit(-1),
      );
      area.value = turn.text;
      fill(
        said,
        area,
        h(
          "div",
          { class: "sn-bar" },
          button("Save", "edit-save", () => change(at, area.value), "sn-primary"),
          button("Cancel", "edit-cancel", () => edit(-1)),
        ),
      );
    } else if (turn.html === undefined) said.textContent = turn.text;
    else said.innerHTML = turn.html;
    return h(
      "article",
      { class: `sn-turn sn-${turn.role}`, "data-testid": "turn", "data-role": turn.role },
      h(
        "header",
        {},
        h("span", { class: "sn-role" }, NAMES[turn.role] ?? turn.role),
        h("span", { class: "sn-tools" }),
      ),
      said,
    );
  }

  /**
   * The buttons of a turn, which come and go while the turn stays as it is.
   * @param {Turn} turn
   * @param {number} at
   * @param {boolean} last
   */
  function tools(turn, at, last) {
    const idle = !isRunning(model);
    const found = idle && editing !== at ? ["edit"] : [];
    if (idle && last && turn.role === "assistant") found.push("retry");
    return found.map((name) => ({ name, at }));
  }

  /** @param {{ name: string, at: number }} item */
  function tool({ name, at }) {
    return name === "edit"
      ? button("Edit", name, () => edit(at))
      : button("Retry", name, () => act(model, "retry"));
  }

  function show() {
    const turns = /** @type {Turn[]} */ (model.get("turns"));
    const running = isRunning(model);
    const items = turns.map((turn, at) => ({ turn, at, edited: editing === at }));
    sight.during(() => {
      keepItems(past, items, article);
      turns.forEach((turn, at) => {
        const header = /** @type {Element} */ (past.children[at].firstElementChild);
        keepItems(
          /** @type {Element} */ (header.lastElementChild),
          tools(turn, at, at === turns.length - 1),
          tool,
        );
      });
      if (running) log.append(liveTurn);
      else liveTurn.remove();
      if (running || turns.length) empty.remove();
      else log.append(empty);
    });
  }

  /** @param {number} at */
  function edit(at) {
    editing = at;
    show();
    /** @type {HTMLElement | null} */ (log.querySelector("textarea"))?.focus();
  }

  /**
   * @param {number} turn
   * @param {string} text
   */
  function change(turn, text) {
    if (isRunning(model) || !text.trim()) return false;
    act(model, "edit", { turn, text });
    edit(-1);
    return true;
  }

  /** @param {string} text */
  function send(text) {
    if (isRunning(model) || !text.trim()) return false;
    act(model, "send", { text });
    return true;
  }

  const message = entry(
    { placeholder: "Message", "aria-label": "Message", "data-testid": "message" },
    send,
  );
  const start = button(
    "Send",
    "send",
    () => {
      if (send(message.value)) message.value = "";
      message.focus();
    },
    "sn-primary",
  );
  start.title = "Enter; Shift+Enter begins a new line";
  const stop = stopButton(model);
  const resume = button("Continue", "continue", () => act(model, "resume"));
  const clear = button("Clear", "clear", () => act(model, "clear"));
  const controls = samplingControls(model);
  const facts = runFacts(model);
  fill(
    root,
    h("div", { class: "sn-dim sn-title" }, model.get("title")),
    log,
    message,
    h("div", { class: "sn-bar" }, start, stop, resume, clear),
    h("details", {}, h("summary", { class: "sn-dim" }, "Sampling"), controls.element),
    facts.element,
  );
  return [
    controls.end,
    sight.end,
    ...facts.ends,
    follow(model, ["turns", "state"], () => {
      const turns = /** @type {Turn[]} */ (model.get("turns"));
      const running = isRunning(model);
      start.disabled = running;
      stop.disabled = !running;
      resume.disabled = running || turns[turns.length - 1]?.role !== "assistant";
      clear.disabled = running || !turns.length;
      if (running) editing = -1;
      show();
    }),
    follow(model, ["live"], () => {
      sight.during(() => {
        setHtml(live, model.get("live"));
      });
    }),
  ];
}

export default { render: widget("Chat", "chat", build) };
