// The serve panel: which blocks to lend, start and stop, and what the server does for others.

import {
  act, button, bytes, duration, factList, fill, follow, h, number, set, setText, widget,
} from "./dom.js";
import { copyButton } from "./export.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */

const WORDS = /** @type {Record<string, string>} */ ({
  stopped: "not serving",
  starting: "starting a server process",
  loading: "loading weights",
  measuring: "measuring throughput",
  serving: "serving",
  stopping: "finishing requests in flight, then stopping",
  failed: "the server stopped unexpectedly",
});

/**
 * What the server counts, as title and text.
 * @param {Model} model
 * @returns {Array<[string, string]>}
 */
function counts(model) {
  const facts = model.get("facts");
  const free = facts.cache_tokens_available;
  const all = facts.cache_tokens_total;
  const used = all ? `${Math.round(100 * (1 - free / all))} %` : "–";
  return [
    ["sessions now", number(facts.sessions)],
    ["sessions served", number(facts.sessions_served)],
    ["tokens served", number(facts.tokens_served)],
    ["requests served", number(facts.requests_served)],
    ["cache used", used],
    ["serving for", duration(Math.floor(Date.now() / 1000 - model.get("since")))],
  ];
}

/** @param {{ model: Model, root: HTMLElement }} view */
function build({ model, root }) {
  const blocks = model.get("num_blocks");
  const bound = (/** @type {"start" | "end"} */ name, /** @type {string} */ label) => {
    const input = h("input", {
      type: "number",
      min: name === "start" ? 0 : 1,
      max: name === "start" ? blocks - 1 : blocks,
      "aria-label": label,
      "data-testid": name,
      onchange: () => {
        if (input.checkValidity() && input.value !== "") set(model, name, Number(input.value));
      },
    });
    return input;
  };
  const start = bound("start", "first block");
  const end = bound("end", "block after the last");
  const begin = button("Serve", "begin", () => act(model, "begin"), "sn-primary");
  const stop = button("Stop", "stop", () => act(model, "stop"));
  const span = h("div", { class: "sn-span" });
  const track = h("div", { class: "sn-track", role: "img" }, span);
  const words = h("span", { role: "status", "data-testid": "state" });
  const state = h("div", {}, h("span", { class: "sn-dot", "aria-hidden": "true" }), words);
  const progress = h("progress", { max: 1, "aria-label": "weights read" });
  const countList = factList({ class: "sn-counts", "data-testid": "counts" });
  const dl = countList.element;
  const command = h("code", { tabindex: 0, "data-testid": "command" });
  const copy = copyButton("copy", "Copy this line", () => command.textContent ?? "");
  const reach = h("div", { class: "sn-dim", "data-testid": "reach" });
  const needs = h("span", { class: "sn-dim", "data-testid": "needs" });
  const refused = h("span", { class: "sn-refused", role: "alert", "data-testid": "refused" });
  const share = h(
    "div",
    { class: "sn-share" },
    h("div", { class: "sn-line" }, h("span", { class: "sn-dim" }, "Others connect with"), copy),
    command,
    reach,
  );
  const pre = h("pre", { tabindex: 0, "aria-label": "log" });
  const log = h("details", { "data-testid": "log" }, h("summary", {}, "Log"), pre);
  fill(
    root,
    h(
      "div",
      { class: "sn-head" },
      h("span", { class: "sn-title" }, model.get("title")),
      h("span", { class: "sn-dim" }, `${blocks} blocks`),
    ),
    h(
      "div",
      { class: "sn-form" },
      h("label", {}, "blocks", start),
      h("label", {}, ":", end),
      begin,
      stop,
      needs,
      refused,
    ),
    track,
    state,
    progress,
    dl,
    share,
    log,
  );

  const showCounts = () => {
    dl.hidden = model.get("state") !== "serving";
    if (!dl.hidden) countList.show(counts(model));
  };
  const clock = setInterval(showCounts, 1000);

  return [
    () => clearInterval(clock),
    follow(model, ["start", "end", "state"], () => {
      const [first, last] = [model.get("start"), model.get("end")];
      const idle = ["stopped", "failed"].includes(model.get("state"));
      start.value = String(first);
      end.value = String(last);
      start.disabled = end.disabled = !idle;
      begin.disabled = !idle || !(first < last);
      setText(refused, first < last ? "" : `${first}:${last} contains no block: the start must be below the end`);
      stop.disabled = idle || model.get("state") === "stopping";
      span.style.left = `${(100 * first) / blocks}%`;
      span.style.width = `${(100 * Math.max(last - first, 0)) / blocks}%`;
      track.setAttribute("aria-label", `blocks ${first}:${last} of ${blocks}`);
    }),
    follow(model, ["start", "end", "needs"], () => {
      const held = model.get("needs").slice(model.get("start"), Math.max(model.get("end"), 0));
      const sum = held.reduce((/** @type {number} */ a, /** @type {number} */ b) => a + b, 0);
      setText(needs, sum ? `needs ${bytes(sum)} for weights, plus a cache` : "");
    }),
    follow(model, ["state", "weights"], () => {
      const now = model.get("state");
      const [done, total] = model.get("weights");
      state.dataset.state = span.dataset.state = now;
      const amount =
        now === "loading" ? `: ${bytes(done)} of ${bytes(total)}`
        : now === "serving" && total ? ` with ${bytes(total)} of weights`
        : "";
      setText(words, `${WORDS[now] ?? now}${amount}`);
      progress.hidden = !["starting", "loading", "measuring"].includes(now);
      if (now === "loading" && total) progress.value = done / total;
      else progress.removeAttribute("value");
    }),
    follow(model, ["state", "facts"], showCounts),
    follow(model, ["addresses", "state"], () => {
      /** @type {string[]} */
      const addresses = model.get("addresses");
      const address = addresses.find((one) => !one.startsWith("/ip4/127.")) ?? addresses[0];
      share.hidden = !address || model.get("state") !== "serving";
      const title = model.get("title");
      setText(command, `%swarm connect ${address} --model ${title}`);
      const notes = [];
      // A folder's or file's place is another one on each machine.
      if (!title.includes("/")) notes.push(`${title} stands for the model's folder or file on their machine.`);
      if (address?.startsWith("/ip4/127.")) {
        notes.push("Only this machine can reach it: --listen /ip4/0.0.0.0/tcp/0 lets others in.");
      }
      setText(reach, notes.join(" "));
    }),
    follow(model, ["log"], () => {
      log.hidden = !model.get("log");
      setText(pre, model.get("log"));
    }),
    follow(model, ["state"], () => {
      if (model.get("state") === "failed") log.open = true;
    }),
  ];
}

export default { render: widget("Serve panel", "serve", build) };
