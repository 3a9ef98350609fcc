// Generate: a prompt, Run, Stop, Continue, and the text with its alternatives.

import { act, fill, follow, h, widget } from "./dom.js";
import {
  button,
  isRunning,
  ownKeys,
  runFacts,
  samplingControls,
  set,
  stopButton,
  textArea,
} from "./controls.js";
import { tokenView } from "./tokens.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */

/**
 * The text: it is sent in pages, each once, and the rest of it; see widgets/parts/token_cells.py.
 * @param {Model} model
 */
function cells(model) {
  const pages = Array.from({ length: model.get("pages") }, (_, at) => model.get(`page${at}`));
  return [...pages.flat(), ...model.get("tail")];
}

/** @param {{ model: Model, root: HTMLElement }} view */
function build({ model, root }) {
  const run = () => {
    if (!isRunning(model)) act(model, "run");
  };
  const prompt = textArea(model, "prompt", {
    placeholder: "Prompt",
    "aria-label": "Prompt",
    "data-testid": "prompt",
  });
  ownKeys(prompt.area, (event) => {
    const asked = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (asked) run();
    return asked;
  });
  const chat = h("input", {
    type: "checkbox",
    "data-testid": "chat",
    onchange: () => set(model, "chat", chat.checked),
  });
  const start = button("Run", "run", run, "sn-primary");
  start.title = "Ctrl+Enter in the prompt";
  const stop = stopButton(model);
  const resume = button("Continue", "continue", () => act(model, "resume"));
  const controls = samplingControls(model);
  const tokens = tokenView((position, token) => act(model, "branch", { position, token }));
  const facts = runFacts(model);
  const legend = h(
    "span",
    { class: "sn-legend sn-dim", "aria-hidden": "true" },
    "confident",
    h("span", { class: "sn-scale" }),
    "uncertain",
  );
  fill(
    root,
    h("div", { class: "sn-dim sn-title" }, model.get("title")),
    prompt.area,
    h(
      "div",
      { class: "sn-bar" },
      start,
      stop,
      resume,
      model.get("has_template") && h("label", { class: "sn-as-chat" }, chat, "as a chat message"),
      legend,
    ),
    controls.element,
    tokens.element,
    facts.element,
  );
  return [
    prompt.end,
    controls.end,
    tokens.end,
    ...facts.ends,
    follow(model, ["chat"], () => {
      chat.checked = model.get("chat");
    }),
    follow(model, ["pages", "tail"], () => tokens.show(cells(model))),
    follow(model, ["state", "pages", "tail"], () => {
      const running = isRunning(model);
      const written = model.get("pages") + model.get("tail").length > 0;
      start.disabled = running;
      stop.disabled = !running;
      resume.disabled = running || !written;
      tokens.enable(!running);
      tokens.element.hidden = !written;
      legend.hidden = !written;
    }),
  ];
}

export default { render: widget("Generate", "generate", build) };
