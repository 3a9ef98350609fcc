// Generate: a prompt, Run, Stop, Continue, and the text with its alternatives.

import { act, button, fill, follow, h, once, set, setText, widget } from "./dom.js";
import {
  isRunning, modelTitle, ownKeys, runFacts, samplingControls, stepper, stopButton, textArea,
} from "./controls.js";
import { copyButton, csv, downloadButton, exportBar } from "./export.js";
import { plainView, tokenView } from "./tokens.js";

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
  const start = button("Run", "run", once(run), "sn-primary");
  start.title = "Generate a new text (Ctrl+Enter in the prompt); earlier texts are kept";
  const stop = stopButton(model);
  const resume = button("Continue", "continue", once(() => act(model, "resume")));
  resume.title = "Continue from the end of this text";
  const title = modelTitle(model);
  const controls = samplingControls(model);
  const steps = stepper("text", (text) => act(model, "choose", { text }));
  const origin = h("span", { class: "sn-dim sn-origin", "data-testid": "origin" });
  const compare = button("Compare", "compare", () => {
    const [shown, beside] = [model.get("shown"), model.get("beside")];
    act(model, "compare", { text: beside !== null ? null : shown ? shown - 1 : 1 });
  });
  const aside = plainView();
  const written = () => cells(model).map(([text, , special]) => (special ? "" : text)).join("");
  const table = () =>
    csv([
      ["position", "text", "probability", "alternatives"],
      ...cells(model).map(([text, probability, , alternatives], at) => [
        at,
        text,
        probability,
        alternatives.map((/** @type {[number, string, number]} */ [, word, part]) => `${JSON.stringify(word)} ${part}`).join(" "),
      ]),
    ]);
  const history = h(
    "div",
    { class: "sn-bar sn-history" },
    steps.element,
    origin,
    compare,
    exportBar(
      copyButton("copy", "Copy this text", written),
      downloadButton("CSV", "csv", "tokens.csv", table),
    ),
  );
  let height = 0; // of the last whole text
  const tokens = tokenView((position, token) => act(model, "branch", { position, token }));
  const facts = runFacts(model);
  const doubt = h("div", { class: "sn-suspect", role: "alert", "data-testid": "suspicion" });
  const legend = h(
    "span",
    { class: "sn-legend sn-dim", "aria-hidden": "true" },
    "confident",
    h("span", { class: "sn-scale" }),
    "uncertain",
  );
  fill(
    root,
    title.element,
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
    history,
    doubt,
    h("div", { class: "sn-texts" }, tokens.element, aside.element),
    facts.element,
  );
  return [
    prompt.end,
    controls.end,
    title.end,
    tokens.end,
    ...facts.ends,
    follow(model, ["chat"], () => {
      chat.checked = model.get("chat");
    }),
    follow(model, ["pages", "tail"], () => tokens.show(cells(model))),
    follow(model, ["touched", "suspicion"], () => {
      tokens.mark(model.get("touched"));
      setText(doubt, model.get("suspicion"));
      doubt.hidden = !model.get("suspicion");
    }),
    follow(model, ["beside", "aside"], () => {
      const beside = model.get("beside");
      aside.show(beside === null ? null : `text ${beside + 1}`, model.get("aside"), cells(model));
    }),
    follow(model, ["texts", "shown", "origin", "beside", "state"], () => {
      const [count, shown, beside] = ["texts", "shown", "beside"].map((name) => model.get(name));
      steps.show(shown, count, !isRunning(model));
      setText(origin, model.get("origin"));
      compare.disabled = count < 2 || isRunning(model);
      setText(compare, beside === null ? "Compare" : "Single");
      compare.title =
        beside === null ? "Show another text beside this one" : "Show this text alone";
    }),
    follow(model, ["state", "pages", "tail", "texts"], () => {
      const running = isRunning(model);
      const written = model.get("pages") + model.get("tail").length > 0;
      start.disabled = running;
      stop.disabled = !running;
      resume.disabled = running || !written;
      tokens.enable(!running);
      // A new text begins in the room of the one before, so that what is below stays where it is.
      tokens.element.style.minHeight = running ? `${height}px` : "";
      if (!running) height = tokens.element.offsetHeight;
      // Before there is a text, what belongs to it has its place: nothing moves when it comes.
      history.classList.toggle("sn-blank", !written && !model.get("texts"));
      legend.classList.toggle("sn-blank", !written);
    }),
  ];
}

export default { render: widget("Generate", "generate", build) };
