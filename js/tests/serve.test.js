import { afterEach, describe, expect, test, vi } from "vitest";
import serve from "../src/serve.js";
import { FakeModel, show } from "./fake_model.js";

afterEach(() => {
  vi.useRealTimers();
  document.body.replaceChildren();
});

function panel(traits = {}) {
  return new FakeModel({
    title: "tiny",
    num_blocks: 30,
    start: 0,
    end: 15,
    state: "stopped",
    weights: [0, 0],
  needs: [],
    addresses: [],
    facts: {},
    since: 0,
    log: "",
    ...traits,
  });
}

/**
 * @param {HTMLElement} input
 * @param {string} value
 */
function type(input, value) {
  /** @type {HTMLInputElement} */ (input).value = value;
  input.dispatchEvent(new Event("change"));
}

describe("the serve panel", () => {
  test("offers blocks and a start, and only those, before it serves", () => {
    const model = panel();
    const view = show(serve, model);
    expect(view.byId("stop")).toHaveProperty("disabled", true);
    expect(view.byId("counts").hidden).toBe(true);
    expect(view.byId("log").hidden).toBe(true);
    type(view.byId("start"), "10");
    type(view.byId("end"), "20");
    expect(model.saved).toEqual({ start: 10, end: 20 });
    expect(view.find(".sn-track").getAttribute("aria-label")).toBe("blocks 10:20 of 30");
    view.byId("begin").click();
    expect(model.sent).toEqual([{ action: "begin", with: {} }]);
  });

  test("does not start with blocks that are no span", () => {
    const model = panel({ start: 20 });
    const view = show(serve, model);
    expect(view.byId("begin")).toHaveProperty("disabled", true);
    type(view.byId("end"), "99");
    expect(model.saved).toEqual({});
  });

  test("shows loading, then what it does for others, and stops", () => {
    vi.useFakeTimers({ now: 1_000_000 });
    const model = panel({ state: "loading", weights: [50e6, 100e6] });
    const view = show(serve, model);
    expect(view.byId("state").textContent).toBe("loading weights: 50 MB of 100 MB");
    expect(view.find("progress")).toHaveProperty("value", 0.5);
    expect(view.byId("start")).toHaveProperty("disabled", true);
    model.update({
      state: "serving",
      since: 995,
      addresses: ["/ip4/127.0.0.1/tcp/1/p2p/Qm"],
      facts: {
        sessions: 2,
        sessions_served: 17,
        tokens_served: 1234,
        requests_served: 99,
        cache_tokens_available: 3,
        cache_tokens_total: 4,
      },
    });
    const text = view.byId("counts").textContent ?? "";
    for (const part of ["sessions now2", "sessions served17", "tokens served1,234", "cache used25 %", "serving for5 s"]) {
      expect(text).toContain(part);
    }
    expect(view.find("code").textContent).toBe(
      "%swarm connect /ip4/127.0.0.1/tcp/1/p2p/Qm --model tiny",
    );
    expect(view.byId("reach").textContent).toMatch(/^tiny stands for .* Only this machine can reach it/);
    expect(view.find("progress").hidden).toBe(true);
    view.byId("stop").click();
    expect(model.sent).toEqual([{ action: "stop", with: {} }]);
    view.close();
    expect(vi.getTimerCount()).toBe(0);
  });

  test("says why a range cannot be served, and copies the line for others", async () => {
    const model = panel({ start: 20, end: 10 });
    const view = show(serve, model);
    expect(view.byId("begin")).toHaveProperty("disabled", true);
    expect(view.byId("refused").textContent).toContain("20:10 contains no block");
    model.update({ start: 5 });
    expect(view.byId("refused").textContent).toBe("");
    const writeText = vi.fn(async () => {});
    vi.stubGlobal("navigator", { clipboard: { writeText } });
    model.update({ state: "serving", addresses: ["/ip4/192.168.1.2/tcp/1/p2p/Qm"] });
    view.byId("copy").click();
    await vi.waitFor(() => expect(view.byId("copy").textContent).toBe("Copied"));
    expect(writeText).toHaveBeenCalledWith("%swarm connect /ip4/192.168.1.2/tcp/1/p2p/Qm --model tiny");
    expect(view.byId("reach").textContent).not.toContain("Only this machine");
    vi.unstubAllGlobals();
  });

  test("opens the log of a server that has failed", () => {
    const model = panel();
    const view = show(serve, model);
    model.update({ state: "failed", log: "out of memory <b>" });
    expect(view.byId("log")).toHaveProperty("open", true);
    expect(view.find("pre").textContent).toBe("out of memory <b>");
    expect(view.byId("begin")).toHaveProperty("disabled", false);
  });
});
