// What the two widgets that write with a model share: sampling controls, and facts on the run.

import { act, button, duration, fill, follow, h, number, set, setText } from "./dom.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */

// Name, step and bounds of the numbers, as transformers has them; and what a refused one must be.
const NUMBERS = /** @type {Array<[string, string, string, string, string]>} */ ([
  ["temperature", "0.1", "0", "", "0 (greedy) or a positive number"],
  ["top_p", "0.05", "0.000001", "1", "above 0 and at most 1"],
  ["top_k", "1", "0", "", "0 (all tokens) or a positive integer"],
  ["max_new_tokens", "1", "1", "", "a positive integer"],
  ["seed", "1", "0", "", "empty, 0 or a positive integer"],
]);
const ONLY_SAMPLING = ["temperature", "top_p", "top_k", "seed"];

const STATES = /** @type {Record<string, string>} */ ({
  reading: "Processing prompt…",
  writing: "Generating…",
  stopping: "Stopping after this token; press Stop again to stop at once",
});

/** @param {Model} model */
export const isRunning = (model) => model.get("state") !== "idle";

/**
 * Keys typed here are not the notebook's; some do something.
 * @param {HTMLElement} element
 * @param {(event: KeyboardEvent) => boolean} [handle] whether it has dealt with the key
 */
export function ownKeys(element, handle = () => false) {
  element.addEventListener("keydown", (event) => {
    if (handle(event)) event.preventDefault();
    event.stopPropagation();
  });
}

/**
 * A text area that holds a trait and grows with it.
 * @param {Model} model
 * @param {string} trait
 * @param {Record<string, any>} attributes
 */
export function textArea(model, trait, attributes) {
  const area = h("textarea", {
    rows: 2,
    spellcheck: "false",
    dir: "auto",
    oninput: () => set(model, trait, area.value),
    ...attributes,
  });
  const end = follow(model, [trait], () => {
    if (area.value !== model.get(trait)) area.value = model.get(trait);
  });
  return { area, end };
}

/**
 * Whether a number is within its bounds. The step is for the arrows: what lies between is as good.
 * @param {HTMLInputElement} input
 * @param {boolean} whole
 */
function fits(input, whole) {
  const { badInput, rangeUnderflow, rangeOverflow } = input.validity;
  if (input.value === "" || badInput || rangeUnderflow || rangeOverflow) return false;
  return !whole || Number.isInteger(Number(input.value));
}

/**
 * The sampling controls.
 * @param {Model} model
 */
export function samplingControls(model) {
  const sample = h("input", {
    type: "checkbox",
    "data-testid": "do_sample",
    onchange: () => set(model, "do_sample", sample.checked),
  });
  /** @type {Record<string, HTMLInputElement>} */
  const inputs = {};
  const refused = h("span", { class: "sn-refused", role: "alert", "data-testid": "refused" });
  /** @param {HTMLInputElement} input */
  const refuse = (input, message = "") => {
    input.setAttribute("aria-invalid", String(Boolean(message)));
    setText(refused, message);
  };
  for (const [name, step, min, max, wanted] of NUMBERS) {
    const input = h("input", {
      type: "number",
      step,
      min,
      max: max || null,
      placeholder: name === "seed" ? "any" : null,
      "data-testid": name,
      onchange: () => {
        const empty = input.value === "" && !input.validity.badInput && name === "seed";
        if (!empty && !fits(input, step === "1")) return refuse(input, `${name} must be ${wanted}`);
        refuse(input);
        set(model, name, empty ? null : Number(input.value));
      },
    });
    ownKeys(input);
    inputs[name] = input;
  }
  const element = h(
    "div",
    { class: "sn-controls", role: "group", "aria-label": "Sampling" },
    h("label", {}, sample, "do_sample"),
    ...NUMBERS.map(([name]) => h("label", {}, name, inputs[name])),
    refused,
  );
  const end = follow(model, ["do_sample", ...NUMBERS.map(([name]) => name)], () => {
    sample.checked = model.get("do_sample");
    for (const [name, input] of Object.entries(inputs)) {
      const text = String(model.get(name) ?? "");
      if (input.value !== text && input.getAttribute("aria-invalid") !== "true") input.value = text;
      input.disabled = ONLY_SAMPLING.includes(name) && !sample.checked;
    }
  });
  return { element, end };
}

/**
 * The model's name, and the adapters that take part when it writes.
 * @param {Model} model
 */
export function modelTitle(model) {
  const on = h("input", {
    type: "checkbox",
    "data-testid": "adapters-on",
    title: "Switches the adapter on or off for everything that uses this model",
    onchange: () => act(model, "switch_adapters", { on: on.checked }),
  });
  const names = h("span");
  const adapters = h("label", { class: "sn-adapters", "data-testid": "adapters" }, on, names);
  const strength = h("input", {
    type: "range",
    min: -10,
    max: 10,
    step: 0.5,
    "data-testid": "strength",
    title: "How many times the vector is added; applies from the next run",
    onchange: () => set(model, "strength", Number(strength.value)),
  });
  const much = h("output");
  const steering = h("label", { class: "sn-adapters" }, h("span", {}, model.get("steering")), strength, much);
  const element = h(
    "div",
    { class: "sn-heading" },
    h("span", { class: "sn-title" }, model.get("title")),
    adapters,
    model.get("steering") && steering,
  );
  const end = follow(model, ["adapters", "adapters_on", "state", "strength"], () => {
    if (strength.value !== String(model.get("strength"))) strength.value = String(model.get("strength"));
    setText(much, `${number(model.get("strength"))} ×`);
    strength.dataset.sign = model.get("strength") < 0 ? "minus" : "plus";
    const found = model.get("adapters");
    adapters.hidden = !found.length;
    setText(names, `with adapter ${found.join(", ")}`);
    on.checked = model.get("adapters_on");
    on.disabled = isRunning(model);
  });
  return { element, end };
}

/**
 * ‹ 1/2 ›: which of several is shown.
 * @param {string} what one of them
 * @param {(to: number) => void} choose
 */
export function stepper(what, choose) {
  let [at, count] = [0, 1];
  const back = button("‹", "previous", () => choose(at - 1));
  const next = button("›", "next", () => choose(at + 1));
  const place = h("span", { class: "sn-place", "data-testid": "place" });
  const element = h("span", { class: "sn-stepper", role: "group" }, back, place, next);
  back.title = `Previous ${what}; nothing is lost`;
  next.title = `Next ${what}; nothing is lost`;
  back.setAttribute("aria-label", `Previous ${what}`);
  next.setAttribute("aria-label", `Next ${what}`);
  return {
    element,
    /**
     * @param {number} which from 0
     * @param {number} of
     * @param {boolean} enabled
     */
    show(which, of, enabled) {
      [at, count] = [which, of];
      setText(place, `${at + 1}/${count}`);
      element.setAttribute("aria-label", `${what} ${at + 1} of ${count}`);
      back.disabled = !enabled || at <= 0;
      next.disabled = !enabled || at >= count - 1;
    },
  };
}

/** @param {Model} model */
export const stopButton = (model) => button("Stop", "stop", () => act(model, "stop"));

/** @param {Record<string, any>} stats */
function sentence(stats) {
  if (!stats.tokens) return "";
  const parts = [`${number(stats.tokens)} token${stats.tokens === 1 ? "" : "s"}`];
  parts.push(`first after ${duration(stats.first)}`);
  if (stats.rate) parts.push(`${number(stats.rate)} tokens/s`);
  const { computed } = stats;
  parts.push(`${number(computed)} prompt token${computed === 1 ? "" : "s"} processed`);
  if (stats.lost) parts.push(`${stats.lost} server${stats.lost === 1 ? "" : "s"} lost and replaced`);
  return parts.join(" · ");
}

/**
 * Where the time went: a bar with a part per server, and the rest.
 * @param {Array<[string, number]>} shares
 */
function shareBar(shares) {
  if (!shares.length) return [];
  const rest = 1 - shares.reduce((sum, [, part]) => sum + part, 0);
  const all = /** @type {Array<[string, number]>} */ ([...shares, ["notebook", Math.max(0, rest)]]);
  const parts = all.map(([name, part], index) => {
    const element = h("span", { class: "sn-part", title: `${name}: ${Math.round(100 * part)} %` });
    element.style.flexGrow = String(part);
    element.dataset.hue = index === all.length - 1 ? "rest" : String(index % 4);
    return element;
  });
  const names = all.map(([name, part], index) => {
    const dot = h("span", { class: "sn-dot" });
    dot.dataset.hue = index === all.length - 1 ? "rest" : String(index % 4);
    return h("span", { class: "sn-name" }, dot, `${name} ${Math.round(100 * part)} %`);
  });
  return [
    h("div", { class: "sn-shares", "aria-hidden": "true" }, ...parts),
    h("div", { class: "sn-names", "aria-label": "Share of time" }, ...names),
  ];
}

/**
 * The lines below the text: what goes on, how fast, what it costs.
 * @param {Model} model
 */
export function runFacts(model) {
  const status = h("span", { role: "status", "data-testid": "status" });
  const clock = h("span", { class: "sn-dim", "aria-hidden": "true", "data-testid": "waited" });
  const stats = h("span", { class: "sn-dim", "data-testid": "stats" });
  const shares = h("div", { "data-testid": "shares" });
  const cost = h("div", { class: "sn-dim sn-cost", "data-testid": "cost" });
  const element = h(
    "div",
    { class: "sn-facts" },
    h("div", { class: "sn-line" }, status, clock, stats),
    shares,
    cost,
  );
  let drawn = "";
  const tick = () => {
    const { since, limit } = model.get("waiting");
    const seconds = Math.max(0, Math.round(Date.now() / 1000 - since));
    setText(clock, since ? `${Math.min(seconds, limit)} of ${number(limit)} s` : "");
  };
  const ticking = setInterval(tick, 1000);
  const ends = [
    () => clearInterval(ticking),
    follow(model, ["state", "note", "progress", "waiting"], () => {
      const [read, total] = model.get("progress");
      const working = STATES[model.get("state")] ?? model.get("note");
      const missing = model.get("waiting").text;
      const known = total
        ? `${working.replace(/…$/, "")}: ${number(read)} of ${number(total)} tokens`
        : working;
      setText(status, missing && isRunning(model) ? missing : known);
      status.className = isRunning(model) ? "sn-busy" : "";
      tick();
    }),
    follow(model, ["stats"], () => {
      const found = model.get("stats");
      setText(stats, sentence(found));
      const now = JSON.stringify(found.shares ?? []);
      if (now !== drawn) fill(shares, ...shareBar(found.shares ?? []));
      drawn = now;
    }),
    follow(model, ["preview", "obstacle", "bill", "state"], () => {
      const bill = model.get("bill") && `Used ${model.get("bill")}. `;
      const next = model.get("obstacle")
        ? `The next run waits for servers: ${model.get("obstacle")}.`
        : model.get("preview") && `Next run (estimate): up to ${model.get("preview")}.`;
      setText(cost, isRunning(model) ? "" : `${bill}${next}`);
    }),
  ];
  return { element, ends };
}
