// Chat: turns, a place to type, and an answer that grows. The HTML of answers comes from Python,
// which has made it harmless (widgets/parts/markdown.py); everything else is text.

import {
  OWN_KEYS, act, button, endInSight, fill, follow, h, isAlive, keepItems, once, set, setHtml, setText, widget,
} from "./dom.js";
import {
  isRunning, modelTitle, ownKeys, runFacts, samplingControls, stepper, stopButton,
} from "./controls.js";
import { copyButton, downloadButton, exportBar } from "./export.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */
/**
 * @typedef {{ role: string, text: string, html?: string, edited?: boolean, branch: number[],
 *   suspicion?: string, beside?: Turn & { branch: number, after: Turn[] } }} Turn
 */
/** An edit that was begun in a turn, of which text. @typedef {{ turn: number, of: string, text: string }} Edit */

const NAMES = /** @type {Record<string, string>} */ ({
  user: "You",
  assistant: "Model",
  system: "Instructions",
});

const PAUSE = 400; // ms without a key after which what is typed is kept

/** @param {number} count */
const messages = (count) => `${count} message${count === 1 ? "" : "s"}`;

/**
 * What was said, of a turn or of the branch beside it.
 * @param {Turn} turn
 */
function words(turn) {
  const said = h("div", { class: "sn-said", dir: "auto" });
  if (turn.html === undefined) said.textContent = turn.text;
  else said.innerHTML = turn.html;
  return said;
}

/** @param {Turn} turn */
const nameOf = (turn) => `${NAMES[turn.role] ?? turn.role}${turn.edited ? " (edited)" : ""}`;

/**
 * A text area in which Enter sends and Shift+Enter begins a line.
 * @param {Record<string, any>} attributes
 * @param {(text: string) => void} send
 * @param {() => void} [leave] on Escape
 */
function entry(attributes, send, leave) {
  const area = h("textarea", { rows: 2, dir: "auto", ...attributes });
  ownKeys(area, (event) => {
    if (event.key === "Escape" && leave) leave();
    else if (event.key !== "Enter" || event.shiftKey || event.isComposing) return false;
    else send(area.value);
    return true;
  });
  return area;
}

/**
 * Keep what is typed in an area after a pause of typing, and when it is left.
 * @param {HTMLTextAreaElement} area
 * @param {(text: string) => void} keep
 */
function keepTyped(area, keep) {
  /** @type {number | undefined} */
  let timer;
  const typing = () => timer !== undefined;
  const save = () => {
    clearTimeout(timer);
    timer = undefined;
    keep(area.value);
  };
  const touch = () => {
    clearTimeout(timer);
    timer = window.setTimeout(save, PAUSE);
  };
  area.addEventListener("input", touch);
  area.addEventListener("blur", save);
  return {
    area,
    save,
    typing,
    touch,
    /** @param {string} text what was typed elsewhere, which nobody sees who is typing here */
    show: (text) => {
      if (!typing() && !area.matches(":focus")) area.value = text;
    },
    drop: () => {
      clearTimeout(timer);
      timer = undefined;
      area.removeEventListener("blur", save);
    },
    end: () => {
      if (typing()) save();
    },
  };
}

/** @param {{ model: Model, root: HTMLElement }} view */
function build({ model, root }) {
  /** The boxes in which turns are edited, by turn. @type {Map<number, ReturnType<typeof keepTyped>>} */
  const boxes = new Map();
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

  /**
   * The edit that was begun in a turn, and is neither sent nor given up. One of a turn that another
   * branch has in this place waits until that branch is shown again.
   * @param {number} at
   * @returns {Edit | undefined}
   */
  const editOf = (at) =>
    /** @type {Edit[]} */ (model.get("edits")).find(
      (one) => one.turn === at && one.of === model.get("turns")[at]?.text,
    );

  /**
   * @param {number} at
   * @param {string | null} text null: no edit any more
   */
  function keepEdit(at, text) {
    const known = editOf(at);
    if (known?.text === (text ?? undefined)) return;
    const others = /** @type {Edit[]} */ (model.get("edits")).filter((one) => one !== known);
    const of = model.get("turns")[at].text;
    set(model, "edits", text === null ? others : [...others, { turn: at, of, text }]);
  }

  /** @param {number} at */
  function giveUp(at) {
    boxes.get(at)?.drop();
    keepEdit(at, null);
  }

  /** @param {number} at */
  function editBox(at) {
    const area = entry(
      { "aria-label": "Edit this turn", "data-testid": "edit-text" },
      (text) => change(at, text),
      () => giveUp(at),
    );
    const before = boxes.get(at);
    const box = keepTyped(area, (text) => editOf(at) && keepEdit(at, text));
    if (before?.typing()) {
      area.value = before.area.value;
      box.touch();
    } else area.value = editOf(at)?.text ?? "";
    before?.drop();
    boxes.set(at, box);
    return area;
  }

  /** @param {{ turn: Turn, at: number, edited: boolean }} item */
  function article({ turn, at, edited }) {
    let said = words(turn);
    if (edited) {
      const area = editBox(at);
      const label = turn.role === "user" ? "Send" : "Save";
      fill(
        said,
        area,
        h(
          "div",
          { class: "sn-bar" },
          button(label, "edit-save", () => change(at, area.value), "sn-primary"),
          button("Cancel", "edit-cancel", () => giveUp(at)),
          h("span", { class: "sn-dim", "data-testid": "edit-what" }, whatEditDoes(at)),
        ),
      );
    } else if (turn.beside) {
      const { beside } = turn;
      const column = (/** @type {Turn} */ one, /** @type {number} */ which, /** @type {Turn[]} */ after) =>
        h(
          "div",
          {},
          h("div", { class: "sn-dim" }, `${which + 1}/${turn.branch[1]}`),
          words(one),
          ...after.flatMap((next) => [h("div", { class: "sn-dim" }, nameOf(next)), words(next)]),
        );
      said = h(
        "div",
        { class: "sn-beside", "data-testid": "beside" },
        column(turn, turn.branch[0], []),
        column(beside, beside.branch, beside.after),
      );
    }
    return h(
      "article",
      {
        class: `sn-turn sn-${turn.role}`,
        "data-testid": "turn",
        "data-role": turn.role,
        "data-wrong": Boolean(turn.suspicion),
      },
      h(
        "header",
        {},
        h("span", { class: "sn-role" }, nameOf(turn)),
        h("span", { class: "sn-tools" }),
      ),
      said,
      turn.suspicion &&
        h("p", { class: "sn-suspect", role: "alert", "data-testid": "suspicion" }, turn.suspicion),
    );
  }

  /** @param {number} at */
  function whatEditDoes(at) {
    const later = model.get("turns").length - at - 1;
    const kept = later ? `this message and the ${messages(later)} after it are kept` : "this one is kept";
    return `Starts a new branch; ${kept} as branch ‹${model.get("turns")[at].branch[0] + 1}›`;
  }

  /**
   * The buttons of a turn, which come and go while the turn stays as it is.
   * @param {Turn} turn
   * @param {number} at
   * @param {boolean} last
   */
  function tools(turn, at, last) {
    const idle = !isRunning(model);
    const [which, count] = turn.branch;
    /** @type {Array<{ name: string, at: number, say?: any }>} */
    const found = [];
    if (count > 1) found.push({ name: "step", at, say: [which, count, idle] });
    if (idle && !editOf(at)) found.push({ name: "edit", at, say: whatEditDoes(at) });
    if (idle && last && turn.role !== "system") found.push({ name: "retry", at, say: turn.role });
    if (count > 1) found.push({ name: "compare", at, say: [which, count, Boolean(turn.beside)] });
    return [...found, { name: "copy", at }];
  }

  /** @param {{ name: string, at: number, say?: any }} item */
  function tool({ name, at, say }) {
    if (name === "copy") return copyButton(name, "Copy this message", () => model.get("turns")[at].text);
    if (name === "step") {
      const steps = stepper("branch", (branch) => act(model, "choose", { turn: at, branch }));
      steps.show(say[0], say[1], say[2]);
      return steps.element;
    }
    if (name === "compare") {
      const [which, , open] = say;
      const branch = open ? null : which ? which - 1 : which + 1;
      const made = button(open ? "Single" : "Compare", name, () => act(model, name, { turn: at, branch }));
      made.title = open ? "Show this branch alone" : `Show branch ${Number(branch) + 1} beside this one`;
      return made;
    }
    const made =
      name === "edit"
        ? button("Edit", name, () => edit(at))
        : button("Retry", name, once(() => act(model, "retry")));
    made.title =
      name === "edit" ? say : say === "user" ? "Ask again" : "Another answer, as a new branch; this one is kept";
    return made;
  }

  function show() {
    const turns = /** @type {Turn[]} */ (model.get("turns"));
    const running = isRunning(model);
    const items = turns.map((turn, at) => ({ turn, at, edited: Boolean(editOf(at)) }));
    const focus = focused();
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
    for (const [at, box] of boxes) {
      const text = editOf(at)?.text;
      if (text === undefined) boxes.delete(at);
      else box.show(text);
    }
    root.querySelectorAll('[data-testid="edit-save"]').forEach((one) => {
      /** @type {HTMLButtonElement} */ (one).disabled = running;
    });
    if (!focus) return;
    past.children[focus.at]?.querySelectorAll("button, textarea").forEach((one) => {
      if (one instanceof HTMLElement && one.dataset.testid === focus.id) one.focus();
    });
  }

  /** What of which turn has the focus: a turn that changes is made anew. */
  function focused() {
    const active = /** @type {Document} */ (root.getRootNode()).activeElement;
    const at = [...past.children].findIndex((one) => one.contains(active));
    const id = active instanceof HTMLElement && active.dataset.testid;
    return at >= 0 && id ? { at, id } : null;
  }

  /** @param {number} at */
  function edit(at) {
    keepEdit(at, model.get("turns")[at].text);
    boxes.get(at)?.area.focus();
  }

  /**
   * @param {number} turn
   * @param {string} text
   */
  function change(turn, text) {
    if (isRunning(model) || !text.trim() || !isAlive(model)) return;
    giveUp(turn);
    act(model, "edit", { turn, text });
  }

  /** @param {string} text */
  function send(text) {
    if (isRunning(model) || !text.trim() || !isAlive(model)) return;
    act(model, "send", { text });
    message.value = "";
    typed.save();
  }

  const message = entry(
    { placeholder: "Message", "aria-label": "Message", "data-testid": "message" },
    send,
  );
  const typed = keepTyped(message, (text) => {
    if (text !== model.get("typed")) set(model, "typed", text);
  });
  const start = button(
    "Send",
    "send",
    once(() => {
      send(message.value);
      message.focus();
    }),
    "sn-primary",
  );
  start.title = "Enter sends; Shift+Enter starts a new line";
  const stop = stopButton(model);
  const resume = button("Continue", "continue", once(() => act(model, "resume")));
  resume.title = "Let the model continue its last answer";
  const clear = button("Clear", "clear", once(() => act(model, restorable() ? "restore" : "clear")));
  const restorable = () => model.get("can_restore");
  const said = () => /** @type {Turn[]} */ (model.get("turns"));
  const markdown = () => said().map((turn) => `**${nameOf(turn)}**\n\n${turn.text}\n`).join("\n");
  const json = () =>
    JSON.stringify(said().map(({ role, text }) => ({ role, content: text })), null, 2);
  const title = modelTitle(model);
  const controls = samplingControls(model);
  const facts = runFacts(model);
  fill(
    root,
    title.element,
    log,
    message,
    h(
      "div",
      { class: "sn-bar" },
      start,
      stop,
      resume,
      clear,
      exportBar(
        copyButton("copy-all", "Copy this branch as Markdown", markdown),
        downloadButton("Markdown", "markdown", "chat.md", markdown),
        downloadButton("JSON", "json", "chat.json", json),
      ),
    ),
    h("details", {}, h("summary", { class: "sn-dim" }, "Sampling"), controls.element),
    facts.element,
  );
  return [
    controls.end,
    title.end,
    typed.end,
    () => boxes.forEach((box) => box.end()),
    sight.end,
    ...facts.ends,
    follow(model, ["typed"], () => typed.show(model.get("typed"))),
    follow(model, ["turns", "edits", "state", "can_restore"], () => {
      const turns = /** @type {Turn[]} */ (model.get("turns"));
      const running = isRunning(model);
      start.disabled = running;
      stop.disabled = !running;
      const last = turns[turns.length - 1];
      resume.disabled = running || last?.role !== "assistant" || Boolean(last.edited);
      clear.disabled = running || !(turns.length || restorable());
      setText(clear, restorable() ? "Undo clear" : "Clear");
      clear.title = restorable()
        ? "Restore the conversation"
        : "Start again; this conversation is kept and can be restored";
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
