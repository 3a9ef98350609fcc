import { afterEach, expect, test, vi } from "vitest";
import monitor, { layout, short, smooth, ticks } from "../src/monitor.js";
import { FakeModel, show } from "./fake_model.js";

const START = {
  state: "running",
  step: 2,
  total: 10,
  names: ["loss"],
  points: [[1, 4], [2, 3]],
  alarm: "",
  elapsed: 6,
  tokens: 300,
  speed: 50,
  retries: 0,
  failovers: 0,
  told: [],
  runs: [],
  run_name: "run 1",
  smoothing: 0,
  outcome: "",
  saves: true,
  background: true,
};

/** @param {ReturnType<typeof show>} shown */
const buttons = (shown) => shown.all(".sn-buttons button");

afterEach(() => {
  document.body.replaceChildren();
  vi.useRealTimers();
});

test("facts, curves, and new curves as they come", () => {
  const fake = new FakeModel(START);
  const shown = show(monitor, fake);
  expect(shown.byId("state").textContent).toBe("running");
  expect(shown.byId("facts").textContent).toBe(
    "step 2 of 10 · 6 s · about 24 s left · 300 tokens · 50 tokens/s · 0 retries, 0 failovers",
  );
  expect(shown.find(".sn-value").textContent).toBe("3");
  expect(shown.all(".sn-up").map((tick) => tick.textContent)).toEqual(["3", "3.5", "4"]);
  expect(shown.all(".sn-across").map((tick) => tick.textContent)).toEqual(["1", "2"]);
  fake.update({ names: ["loss", "<i>"], points: [[1, 4, null], [2, 3, null], [3, null, 7]], step: 3 });
  expect(shown.byId("curve-<i>").textContent).toContain("<i>7");
  expect(shown.all("i:not(.sn-mark)").length).toBe(0);
  fake.update({ failovers: 1, retries: 2, told: ["step 3: server b is gone"] });
  expect(shown.byId("facts").textContent).toContain("2 retries, 1 failover");
  expect(shown.byId("told").textContent).toBe("step 3: server b is gone");
});

test("buttons ask; what Python answers is shown", () => {
  const fake = new FakeModel(START);
  const shown = show(monitor, fake);
  buttons(shown)[0].click();
  fake.update({ state: "paused" });
  expect(buttons(shown).map((button) => button.textContent)).toEqual(["Resume", "Stop and save"]);
  buttons(shown)[0].click();
  buttons(shown)[1].click();
  expect(fake.sent.map(({ action }) => action)).toEqual(["pause", "resume", "stop"]);
  fake.update({ state: "stopped" });
  expect(buttons(shown).every((button) => button.hidden)).toBe(true);
});

test("a click that a busy kernel does not take is explained", () => {
  vi.useFakeTimers();
  const fake = new FakeModel(START);
  const shown = show(monitor, fake);
  buttons(shown)[0].click();
  expect(shown.find(".sn-hint").hidden).toBe(true);
  vi.advanceTimersByTime(3000);
  expect(shown.find(".sn-hint").textContent).toContain("interrupt the kernel");
  expect(shown.find(".sn-hint").hidden).toBe(false);
  fake.update({ state: "paused" });
  expect(shown.find(".sn-hint").hidden).toBe(true);
});

test("arrow keys walk along a curve", () => {
  const shown = show(monitor, new FakeModel(START));
  const plot = shown.find(".sn-plot");
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
  expect(shown.find(".sn-value").textContent).toBe("4 at step 1");
  expect(plot.getAttribute("aria-label")).toBe("loss: 4 at step 1, from 3 to 4");
  plot.dispatchEvent(new Event("blur"));
  expect(shown.find(".sn-value").textContent).toBe("3");
});

test("runs before lie under the present one, each with its value where the pointer is", () => {
  const before = { name: "run 1", names: ["loss"], points: [[1, 5], [4, 2]] };
  const shown = show(monitor, new FakeModel({ ...START, runs: [before], run_name: "run 2" }));
  expect(shown.all("polyline").map((line) => line.getAttribute("data-run"))).toEqual(["1", "0"]);
  expect(shown.byId("runs").textContent).toBe("run 1 2run 2 3");
  const plot = shown.find(".sn-plot");
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "Home", bubbles: true }));
  expect(shown.byId("runs").textContent).toBe("run 1 5run 2 4");
});

test("smoothing is a trait and draws the mean over the values", () => {
  const fake = new FakeModel(START);
  const shown = show(monitor, fake);
  const slider = /** @type {HTMLInputElement} */ (shown.byId("smoothing"));
  slider.value = "0.5";
  slider.dispatchEvent(new Event("input"));
  expect(fake.saved).toEqual({ smoothing: 0.5 });
  expect(shown.all("polyline").length).toBe(2);
  expect(shown.find(".sn-value").textContent).toBe("3 (mean 3.333)");
});

test("what became of a stopped run is said", () => {
  const fake = new FakeModel(START);
  const shown = show(monitor, fake);
  fake.update({ state: "stopped", outcome: "saved to my-adapter" });
  expect(shown.byId("outcome").textContent).toBe("saved to my-adapter");
});

test("places on a chart", () => {
  expect(layout([]).lines).toEqual([]);
  const one = layout([{ name: "a", points: [[5, 2], [6, null], [9, 1]], place: 1 }]);
  expect([one.low, one.high, one.lines[0].placed.map(({ x }) => x)]).toEqual([1, 2, [0, 400]]);
  expect(ticks(0.13, 0.92, 4)).toEqual([0, 0.2, 0.4, 0.6000000000000001, 0.8, 1]);
  expect(ticks(3, 3, 4).length).toBeGreaterThan(1);
  expect(smooth([4, 3], 0.5)).toEqual([4, (0.25 * 4 + 0.5 * 3) / 0.75]);
  expect([short(0), short(0.00001234), short(1.23456), short(1234567)]).toEqual(
    ["0", "1.23e-5", "1.235", "1.23e+6"],
  );
});

test("a closed view hears nothing", () => {
  const fake = new FakeModel(START);
  show(monitor, fake).close();
  expect(fake.listening).toBe(0);
});
