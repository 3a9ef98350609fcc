// A training run: a chart per curve, what it has cost, and the buttons that steer it.

import { act, button, duration, fill, follow, h, keepItems, number, set, setText, stepped, widget } from "./dom.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */
/** @typedef {Array<number | null>} Point */

const WIDTH = 400;
const HEIGHT = 140;
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
 * @returns {SVGElement & { dataset: DOMStringMap }}
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
  if (size && (size < 0.001 || size >= 100000)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

/**
 * Round values that enclose two others.
 * @param {number} low
 * @param {number} high
 * @param {number} count about how many
 */
export function ticks(low, high, count) {
  if (!(high > low)) [low, high] = [low - (Math.abs(low) || 1) / 2, low + (Math.abs(low) || 1) / 2];
  const rough = (high - low) / count;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = size * ([1, 2, 5, 10].find((factor) => factor * size >= rough * 0.999) ?? 10);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, at) => (first + at) * step);
}

/**
 * Means of what came before, weighted by how long ago it was; the first values count in full.
 * @param {number[]} values
 * @param {number} weight
 */
export function smooth(values, weight) {
  let [mean, part] = [0, 0];
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    part = weight * part + (1 - weight);
    return mean / part;
  });
}

/** @typedef {{ name: string, points: Point[], place: number }} Series values are at `place` of a point */

/**
 * The points of some series on one chart.
 * @param {Series[]} series
 * @param {number} weight of smoothing
 */
export function layout(series, weight = 0) {
  const lines = series.map(({ name, points, place }) => {
    const known = points.filter((point) => place > 0 && typeof point[place] === "number");
    const values = known.map((point) => /** @type {number} */ (point[place]));
    const means = smooth(values, weight);
    return { name, known: known.map((point, at) => ({ step: Number(point[0]), value: values[at], mean: means[at] })) };
  });
  const all = lines.flatMap(({ known }) => known);
  const extreme = (/** @type {(a: number, b: number) => number} */ pick, /** @type {number[]} */ of) =>
    of.reduce((a, b) => pick(a, b), of[0] ?? 0);
  const [values, steps] = [all.map(({ value }) => value), all.map(({ step }) => step)];
  const [low, high] = [extreme(Math.min, values), extreme(Math.max, values)];
  const [first, last] = [extreme(Math.min, steps), extreme(Math.max, steps)];
  const [up, across] = [ticks(low, high, 4), ticks(first, last, 6)];
  const x = (/** @type {number} */ step) =>
    last === first ? WIDTH / 2 : (WIDTH * (step - first)) / (last - first);
  const y = (/** @type {number} */ value) =>
    (HEIGHT * (up[up.length - 1] - value)) / (up[up.length - 1] - up[0]);
  return {
    low,
    high,
    ups: up.map((value) => ({ value, y: y(value) })),
    acrosses: across
      .filter((step) => step >= first && step <= last && Number.isInteger(step))
      .map((step) => ({ step, x: x(step) })),
    lines: lines.map(({ name, known }) => ({
      name,
      placed: known.map((one) => ({ ...one, x: x(one.step), y: y(one.value), smooth: y(one.mean) })),
    })),
  };
}

/** @typedef {ReturnType<typeof layout>["lines"][number]["placed"][number]} Placed */

/**
 * The point nearest to a place.
 * @param {Placed[]} placed
 * @param {number} x
 */
const nearest = (placed, x) =>
  placed.reduce((best, one, at) => (best < 0 || Math.abs(one.x - x) < Math.abs(placed[best].x - x) ? at : best), -1);

/**
 * The curves of one name, of this run and those before, with a mark that follows the pointer or the
 * arrow keys.
 * @param {string} name
 */
function chart(name) {
  const label = LABELS[name] ?? name;
  const value = h("span", { class: "sn-value" });
  const mark = h("i", { class: "sn-mark", hidden: true });
  const svg = s("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  const plot = h("div", { class: "sn-plot", tabindex: 0, role: "img" });
  const axis = h("div", { class: "sn-axis", "aria-hidden": "true" });
  plot.append(svg, axis, mark);
  const runs = h("div", { class: "sn-runs", "data-testid": "runs" });
  const figure = h(
    "figure",
    { "data-testid": `curve-${name}` },
    h("figcaption", {}, h("span", { class: "sn-name" }, label), value),
    plot,
    runs,
  );
  let shape = layout([]);
  let smoothed = false;
  let at = -1; // the marked point of this run; -1 is the last one, unmarked
  const placed = () => shape.lines[shape.lines.length - 1]?.placed ?? [];

  function show() {
    const points = placed();
    const point = points[at] ?? points[points.length - 1];
    mark.hidden = !points[at];
    const near = point && points[at] ? point.x : WIDTH;
    const several = shape.lines.length > 1;
    fill(
      runs,
      ...(several ? shape.lines : []).map(({ name: run, placed: its }, number) => {
        const one = its[nearest(its, near)];
        const swatch = h("i", { class: "sn-swatch" });
        swatch.dataset.run = String(shape.lines.length - 1 - number);
        return h("span", {}, swatch, `${run}${one ? ` ${short(one.value)}` : ""}`);
      }),
    );
    if (!point) return;
    mark.style.left = `${(100 * point.x) / WIDTH}%`;
    mark.style.top = `${(100 * point.y) / HEIGHT}%`;
    const mean = smoothed ? ` (mean ${short(point.mean)})` : "";
    setText(value, short(point.value) + mean + (points[at] ? ` at step ${point.step}` : ""));
    const reach = `from ${short(shape.low)} to ${short(shape.high)}`;
    plot.setAttribute("aria-label", `${label}: ${short(point.value)} at step ${point.step}, ${reach}`);
  }

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    at = nearest(placed(), (WIDTH * (event.clientX - box.left)) / box.width);
    show();
  });
  const leave = () => {
    at = -1;
    show();
  };
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const count = placed().length;
    const next = stepped(event.key, at < 0 ? count - 1 : at, count);
    if (next === null) return;
    event.preventDefault();
    event.stopPropagation();
    at = next;
    show();
  });
  const line = (/** @type {Placed[]} */ points, /** @type {"y" | "smooth"} */ which, kind = "") =>
    s("polyline", {
      class: `sn-line ${kind}`,
      points: points.map((one) => `${one.x.toFixed(1)},${one[which].toFixed(1)}`).join(" "),
    });
  return {
    figure,
    /**
     * @param {Series[]} series the last one is this run
     * @param {number} weight
     */
    draw(series, weight) {
      const followed = at >= 0 ? placed()[at]?.step : undefined;
      shape = layout(series, weight);
      smoothed = weight > 0;
      if (followed !== undefined) at = placed().findIndex((point) => point.step >= followed);
      const grid = shape.ups.map(({ y }) => s("line", { class: "sn-grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
      const lines = shape.lines.flatMap(({ placed: points }, number) => {
        const made = [line(points, "y", smoothed ? "sn-faint" : "")];
        if (smoothed) made.push(line(points, "smooth"));
        for (const one of made) one.dataset.run = String(shape.lines.length - 1 - number);
        return made;
      });
      svg.replaceChildren(...grid, ...lines);
      fill(
        axis,
        ...shape.ups.map(({ value: of, y }) =>
          h("span", { class: "sn-up", style: `top: ${(100 * y) / HEIGHT}%` }, short(of)),
        ),
        ...shape.acrosses.map(({ step, x }) =>
          h("span", { class: "sn-across", style: `left: ${(100 * x) / WIDTH}%` }, number(step)),
        ),
      );
      show();
    },
  };
}

/** @param {{ model: Model, root: HTMLElement }} view */
function build({ model, root }) {
  const state = h("span", { class: "sn-state", role: "status", "data-testid": "state" });
  const progress = h("progress", { "aria-label": "Progress", max: 1, value: 0 });
  const facts = h("span", { class: "sn-dim", "data-testid": "facts" });
  const pause = button("", "pause", () => ask(model.get("state") === "paused" ? "resume" : "pause"));
  const stop = button("", "stop", () => ask("stop"));
  const alarm = h("div", { class: "sn-alarm", role: "alert" });
  const hint = h("div", { class: "sn-hint", role: "status", hidden: true });
  const outcome = h("div", { role: "status", "data-testid": "outcome" });
  const charts = h("div", { class: "sn-charts" });
  const slider = h("input", {
    type: "range",
    min: 0,
    max: 0.99,
    step: 0.01,
    "data-testid": "smoothing",
    oninput: () => set(model, "smoothing", Number(slider.value)),
  });
  const smoothing = h("label", { class: "sn-dim sn-smoothing" }, "smoothing", slider);
  const told = h("ul", { class: "sn-told", "aria-label": "Failovers", "data-testid": "told" });
  fill(
    root,
    h("div", { class: "sn-bar" }, state, progress, facts, h("span", { class: "sn-buttons" }, pause, stop)),
    hint,
    outcome,
    alarm,
    smoothing,
    charts,
    told,
  );
  /** @type {Map<string, ReturnType<typeof chart>>} */
  const known = new Map();
  let waiting = 0;

  /** @param {string} action */
  function ask(action) {
    act(model, action);
    clearTimeout(waiting);
    waiting = window.setTimeout(() => {
      setText(
        hint,
        "Not done yet: the kernel is busy with a cell and will do it when the " +
          "cell ends. To stop and save now, interrupt the kernel (■). Runs that were started by " +
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
    setText(stop, now === "stopping" ? "Stopping…" : model.get("saves") ? "Stop and save" : "Stop");
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
    const now = { name: model.get("run_name"), names: model.get("names"), points: model.get("points") };
    const runs = /** @type {Array<{ name: string, names: string[], points: Point[] }>} */ ([
      ...model.get("runs"),
      now,
    ]);
    const names = [...new Set(runs.flatMap((run) => run.names))];
    const weight = model.get("smoothing");
    if (slider.value !== String(weight)) slider.value = String(weight);
    smoothing.hidden = !names.length;
    for (const name of known.keys()) {
      if (!names.includes(name)) {
        known.get(name)?.figure.remove();
        known.delete(name);
      }
    }
    names.forEach((name) => {
      let one = known.get(name);
      if (!one) {
        one = chart(name);
        known.set(name, one);
        charts.append(one.figure);
      }
      const series = runs.map((run) => ({ ...run, place: run.names.indexOf(name) + 1 }));
      one.draw(series.filter((run) => run.place > 0 || run.points === now.points), weight);
    });
  }

  return [
    follow(model, ["state", "saves", "total"], answered),
    follow(model, ["step", "total", "elapsed", "tokens", "speed", "retries", "failovers", "state"], count),
    follow(model, ["names", "points", "runs", "run_name", "smoothing"], draw),
    follow(model, ["outcome"], () => setText(outcome, model.get("outcome"))),
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
