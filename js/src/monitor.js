// A training run: a chart per curve, what it has cost, and the buttons that steer it.

import { act, duration, fill, follow, h, keepItems, number, setText, widget } from "./dom.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */
/** @typedef {Array<number | null>} Point */

const WIDTH = 240;
const HEIGHT = 90;
const PATIENCE = 2000; // ms until an unanswered click is explained

const LABELS = /** @type {Record<string, string>} */ ({
  loss: "loss",
  learning_rate: "learning rate",
  grad_norm: "gradient norm",
  eval_loss: "evaluation loss",
});

/**
 * An SVG element.
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @returns {SVGElement}
 */
function s(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  return element;
}

/**
 * A value with four digits, however large or small.
 * @param {number} value
 */
export function short(value) {
  const size = Math.abs(value);
  if (size && (size < 0.001 || size >= 100000)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/**
 * The curve's points on the chart, a list per stretch without a gap.
 * @param {Point[]} points
 * @param {number} place of the curve's value in a point
 */
export function layout(points, place) {
  const known = points.filter((point) => typeof point[place] === "number");
  const values = known.map((point) => /** @type {number} */ (point[place]));
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const first = points.length ? Number(points[0][0]) : 0;
  const last = points.length ? Number(points[points.length - 1][0]) : 0;
  const placed = known.map((point) => ({
    step: Number(point[0]),
    value: /** @type {number} */ (point[place]),
    x: last === first ? WIDTH / 2 : (WIDTH * (Number(point[0]) - first)) / (last - first),
    y: high === low ? HEIGHT / 2 : 4 + ((HEIGHT - 8) * (high - Number(point[place]))) / (high - low),
  }));
  return { low, high, placed };
}

/**
 * One curve with a mark that follows the pointer or the arrow keys.
 * @param {string} name
 */
function chart(name) {
  const label = LABELS[name] ?? name;
  const value = h("span", { class: "sn-value" });
  const range = h("span", { class: "sn-dim" });
  const line = s("polyline", { class: "sn-line" });
  const mark = h("i", { class: "sn-mark", hidden: true });
  const svg = s("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  svg.append(line);
  const plot = h("div", { class: "sn-plot", tabindex: 0, role: "img" });
  plot.append(svg, mark);
  const figure = h(
    "figure",
    { "data-testid": `curve-${name}` },
    h("figcaption", {}, h("span", { class: "sn-name" }, label), value),
    plot,
    range,
  );
  let shape = layout([], 1);
  let at = -1; // the marked point; -1 is the last one, unmarked

  function show() {
    const point = shape.placed[at] ?? shape.placed[shape.placed.length - 1];
    mark.hidden = !shape.placed[at];
    if (!point) return;
    mark.style.left = `${(100 * point.x) / WIDTH}%`;
    mark.style.top = `${(100 * point.y) / HEIGHT}%`;
    setText(value, short(point.value) + (shape.placed[at] ? ` at step ${point.step}` : ""));
    const reach = `from ${short(shape.low)} to ${short(shape.high)}`;
    setText(range, reach);
    plot.setAttribute("aria-label", `${label}: ${short(point.value)} at step ${point.step}, ${reach}`);
  }

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = (WIDTH * (event.clientX - box.left)) / box.width;
    const near = (/** @type {number} */ place) => Math.abs(shape.placed[place].x - x);
    at = shape.placed.reduce((best, _, place) => (best < 0 || near(place) < near(best) ? place : best), -1);
    show();
  });
  const leave = () => {
    at = -1;
    show();
  };
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const last = shape.placed.length - 1;
    const here = at < 0 ? last : at;
    const steps = /** @type {Record<string, number>} */ ({
      ArrowLeft: here - 1,
      ArrowRight: here + 1,
      Home: 0,
      End: last,
    });
    if (!(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    at = Math.max(0, Math.min(steps[event.key], last));
    show();
  });
  return {
    figure,
    /**
     * @param {Point[]} points
     * @param {number} place
     */
    draw(points, place) {
      const followed = at >= 0 ? shape.placed[at]?.step : undefined;
      shape = layout(points, place);
      if (followed !== undefined) at = shape.placed.findIndex((point) => point.step >= followed);
      line.setAttribute("points", shape.placed.map(({ x, y }) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" "));
      show();
    },
  };
}

/** @param {{ model: Model, root: HTMLElement }} view */
function build({ model, root }) {
  const state = h("span", { class: "sn-state", role: "status", "data-testid": "state" });
  const progress = h("progress", { "aria-label": "Progress", max: 1, value: 0 });
  const facts = h("span", { class: "sn-dim", "data-testid": "facts" });
  const pause = h("button", { type: "button", onclick: () => ask(paused() ? "resume" : "pause") });
  const stop = h("button", { type: "button", onclick: () => ask("stop") });
  const alarm = h("div", { class: "sn-alarm", role: "alert" });
  const hint = h("div", { class: "sn-hint", role: "status", hidden: true });
  const charts = h("div", { class: "sn-charts" });
  const told = h("ul", { class: "sn-told", "aria-label": "Failovers", "data-testid": "told" });
  fill(
    root,
    h("div", { class: "sn-bar" }, state, progress, facts, h("span", { class: "sn-buttons" }, pause, stop)),
    hint,
    alarm,
    charts,
    told,
  );
  /** @type {Map<string, ReturnType<typeof chart>>} */
  const known = new Map();
  let waiting = 0;

  function paused() {
    return model.get("state") === "paused";
  }

  /** @param {string} action */
  function ask(action) {
    act(model, action);
    clearTimeout(waiting);
    waiting = window.setTimeout(() => {
      setText(
        hint,
        "Python has not taken this click yet: the kernel is busy with a cell and takes it when the " +
          "cell ends. To stop and save now, interrupt the kernel (■). Runs that are started by " +
          "monitor.run(…) obey at once.",
      );
      hint.hidden = false;
    }, PATIENCE);
  }

  function answered() {
    clearTimeout(waiting);
    hint.hidden = true;
    const [now, step, total] = [model.get("state"), model.get("step"), model.get("total")];
    setText(state, now);
    state.dataset.state = now;
    const goes = ["running", "paused", "stopping"].includes(now);
    pause.hidden = stop.hidden = !goes;
    pause.disabled = stop.disabled = now === "stopping";
    setText(pause, now === "paused" ? "Resume" : "Pause");
    setText(stop, now === "stopping" ? "Stopping …" : model.get("saves") ? "Stop and save" : "Stop");
    progress.hidden = !total;
    if (total) {
      progress.max = total;
      progress.value = Math.min(step, total);
    }
  }

  function count() {
    const [step, total] = [model.get("step"), model.get("total")];
    const elapsed = model.get("elapsed");
    const left = total > step && step ? (elapsed / step) * (total - step) : 0;
    if (total) progress.value = Math.min(step, total);
    const [retries, lost] = [model.get("retries"), model.get("failovers")];
    const parts = [
      `step ${number(step)}${total ? ` of ${number(total)}` : ""}`,
      duration(elapsed),
      left && model.get("state") === "running" ? `about ${duration(left)} left` : "",
      model.get("tokens") ? `${number(model.get("tokens"))} tokens` : "",
      model.get("speed") === null ? "" : `${number(model.get("speed"))} tokens/s`,
      `${retries} retries, ${lost} ${lost === 1 ? "failover" : "failovers"}`,
    ];
    setText(facts, parts.filter(Boolean).join(" · "));
  }

  function draw() {
    const names = /** @type {string[]} */ (model.get("names"));
    const points = /** @type {Point[]} */ (model.get("points"));
    for (const name of known.keys()) {
      if (!names.includes(name)) {
        known.get(name)?.figure.remove();
        known.delete(name);
      }
    }
    names.forEach((name, place) => {
      let one = known.get(name);
      if (!one) {
        one = chart(name);
        known.set(name, one);
        charts.append(one.figure);
      }
      one.draw(points, place + 1);
    });
  }

  return [
    follow(model, ["state", "saves", "total"], answered),
    follow(model, ["step", "total", "elapsed", "tokens", "speed", "retries", "failovers", "state"], count),
    follow(model, ["names", "points"], draw),
    follow(model, ["alarm"], () => {
      setText(alarm, model.get("alarm"));
      alarm.hidden = !model.get("alarm");
    }),
    follow(model, ["told"], () => {
      keepItems(told, model.get("told"), (/** @type {string} */ line) => h("li", {}, line));
      told.hidden = !model.get("told").length;
    }),
    () => clearTimeout(waiting),
  ];
}

export default { render: widget("Training", "monitor", build) };
