// The swarm map: a row per server, its blocks on a track as wide as the model.

import { duration, fill, follow, h, number, setText, widget } from "./dom.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */

// A server as Python's `compact` in widgets/map.py sends it.
const [PEER, NAME, START, END, STATE, NOTE, RTT, SPEED, PRECISION] = [0, 1, 2, 3, 4, 5, 6, 7, 8];

/**
 * @param {any[]} server
 * @param {number} blocks
 */
function row(server, blocks) {
  const span = h("div", { class: `sn-span sn-${server[STATE]}` });
  span.style.left = `${(100 * server[START]) / blocks}%`;
  span.style.width = `${(100 * (server[END] - server[START])) / blocks}%`;
  return h(
    "tr",
    { "data-testid": "server", "data-peer": server[PEER], "data-state": server[STATE] },
    h("th", { scope: "row" }, server[NAME]),
    h("td", {}, h("div", { class: "sn-track" }, span)),
    h("td", {}, `${server[START]}:${server[END]}`),
    h("td", { title: server[NOTE] }, server[STATE]),
    h("td", { class: "sn-num" }, duration(server[RTT])),
    h("td", { class: "sn-num" }, number(server[SPEED])),
    h("td", {}, server[PRECISION] ?? "–"),
  );
}

/** @param {{ model: Model, root: HTMLElement }} view */
function build({ model, root }) {
  const headline = h("span", { "data-testid": "headline", role: "status" });
  const head = h(
    "div",
    { class: "sn-head" },
    h("span", { class: "sn-title" }, model.get("title")),
    headline,
  );
  const titles = ["server", "blocks", "", "state", "round trip", "tokens/s", "dtype"];
  const rows = h("tbody");
  const table = h(
    "table",
    { "aria-label": "Servers" },
    h("thead", {}, h("tr", {}, ...titles.map((title) => h("th", { scope: "col" }, title)))),
    rows,
  );
  fill(root, head, h("div", { class: "sn-rows" }, table));
  return [
    follow(model, ["headline", "missing"], () => {
      setText(headline, model.get("headline"));
      headline.className = model.get("missing").length ? "sn-alarm" : "sn-dim";
    }),
    follow(model, ["servers"], () => {
      const blocks = model.get("num_blocks");
      rows.replaceChildren(
        ...model.get("servers").map((/** @type {any[]} */ server) => row(server, blocks)),
      );
    }),
  ];
}

export default { render: widget("Swarm map", "map", build) };
