// The swarm map: a row per server, its blocks on a track as wide as the model, the route over it.
// Rows are kept and changed in place, so that hundreds of them cost little per second.

import {
  act, button, bytes, duration, factList, fill, follow, h, keepItems, number, roving, set, setText,
  widget,
} from "./dom.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */

/**
 * A server, from the list that Python's `compact` in widgets/map.py sends.
 * @param {any[]} list
 */
function server(list) {
  const [peer, name, start, end, state, note, rtt, speed, precision] = list;
  const [cacheLeft, cacheTotal, version, announced, heard, needed, retry, audits] = list.slice(9);
  return {
    peer, name, start, end, state, note, rtt, speed, precision,
    cacheLeft, cacheTotal, version, announced, heard, needed, retry, audits,
  };
}

/** @typedef {ReturnType<typeof server>} Server */

/**
 * How long ago a moment was, in words that do not change every second.
 * @param {number | null | undefined} moment Unix time
 */
function ago(moment) {
  if (!moment) return "never";
  const seconds = Date.now() / 1000 - moment;
  return seconds < 10 ? "just now" : `${duration(Math.floor(seconds))} ago`;
}

/**
 * Put an element over blocks of a track.
 * @template {HTMLElement} T
 * @param {T} element
 * @param {number} start
 * @param {number} end
 * @param {number} blocks
 * @returns {T}
 */
function place(element, start, end, blocks) {
  element.style.left = `${((100 * start) / blocks).toFixed(3)}%`;
  element.style.width = `${((100 * (end - start)) / blocks).toFixed(3)}%`;
  return element;
}

const CALM = ["online", "joining", "offline"];

/** @param {Server} facts */
const avoided = (facts) => !CALM.includes(facts.state);

/**
 * The state, and in how long a server that is avoided is tried again.
 * @param {Server} facts
 */
function condition(facts) {
  if (!facts.retry) return facts.state;
  const seconds = Math.round(facts.retry - Date.now() / 1000);
  return `${facts.state} (retrying ${seconds > 0 ? `in ${seconds} s` : "now"})`;
}

/**
 * The same for a row, where it must not need more room than `online`: the tracks would shrink.
 * @param {Server} facts
 */
function brief(facts) {
  const seconds = facts.retry ? Math.round(facts.retry - Date.now() / 1000) : 0;
  return seconds > 0 ? `${facts.state} (${seconds} s)` : facts.state;
}

/**
 * How audits of a server ended, in words; nothing where none are made.
 * @param {Server} facts
 */
function audited(facts) {
  if (!facts.audits) return "";
  const [agreed, wrong, open] = facts.audits;
  if (!agreed && !wrong && !open) return "none yet";
  const parts = [agreed && `${agreed} agreed`, wrong && `${wrong} wrong`, open && `${open} open`];
  return parts.filter(Boolean).join(", ");
}

/**
 * How much of a server's cache is in use, from 0 to 1, if it says so.
 * @param {Server} facts
 */
function cacheUse(facts) {
  const known = facts.cacheTotal && facts.cacheLeft !== null;
  return known ? 1 - Math.min(facts.cacheLeft / facts.cacheTotal, 1) : null;
}

/** One server's row; `show` brings it up to date. */
class Row {
  constructor() {
    this.known = "";
    this.peer = "";
    this.dot = h("span", { class: "sn-dot", "aria-hidden": "true" });
    this.name = h("span");
    this.track = h("div", { class: "sn-track", role: "img" });
    this.rtt = h("td", { class: "sn-num sn-c1" });
    this.speed = h("td", { class: "sn-num sn-c2" });
    this.precision = h("td", { class: "sn-c3" });
    this.cache = h("td", { class: "sn-c3" });
    this.state = h("td", { class: "sn-c2 sn-state" });
    this.audits = h("td", { class: "sn-c3 sn-audits" });
    // In the place of the state's column, where that has no room.
    this.said = h("span", { class: "sn-say" });
    /** @type {Server | null} */
    this.facts = null;
    this.element = h(
      "tr",
      { "data-testid": "server", tabindex: -1 },
      h("th", { scope: "row", class: "sn-name" }, this.dot, this.name),
      h("td", { class: "sn-blocks" }, this.track),
      this.state,
      this.rtt,
      this.speed,
      this.precision,
      this.cache,
      this.audits,
    );
  }

  /**
   * @param {any[]} list
   * @param {any[][]} route its parts on this server
   * @param {boolean} planned
   * @param {number} blocks
   */
  show(list, route, planned, blocks) {
    const key = JSON.stringify([list, route, planned]);
    if (key === this.known) return;
    this.known = key;
    const facts = (this.facts = server(list));
    this.peer = facts.peer;
    this.element.dataset.peer = facts.peer;
    this.element.dataset.state = facts.state;
    this.element.classList.toggle("sn-avoided", avoided(facts));
    setText(this.name, facts.name);
    this.name.title = facts.name;
    fill(this.said, avoided(facts) ? facts.state : "");
    const span = place(h("div", { class: "sn-span" }, this.said), facts.start, facts.end, blocks);
    const ways = route.map(([, start, end]) =>
      place(
        h("div", { class: planned ? "sn-way sn-planned" : "sn-way", "data-testid": "way" }),
        start,
        end,
        blocks,
      ),
    );
    fill(this.track, span, ...ways);
    const taken = route.map(([, start, end]) => `${start}:${end}`).join(", ");
    const why = avoided(facts) ? `, ${facts.state}` : "";
    const label = `blocks ${facts.start}:${facts.end}${why}${taken && `, on the route with ${taken}`}`;
    this.track.setAttribute("aria-label", label);
    this.track.title = label;
    this.tick();
    setText(this.audits, audited(facts));
    setText(this.rtt, duration(facts.rtt));
    setText(this.speed, number(facts.speed));
    setText(this.precision, facts.precision ?? "–");
    const use = cacheUse(facts);
    if (use === null) setText(this.cache, number(facts.cacheLeft));
    else {
      const used = `${Math.round(100 * use)} %`;
      if (this.cache.textContent === used && this.cache.firstElementChild) return;
      const bar = h("span", { style: `width: ${Math.round(100 * use)}%` });
      fill(this.cache, h("span", { class: "sn-meter" }, bar), used);
    }
  }

  /** Let the seconds go down until a server is tried again. */
  tick() {
    if (!this.facts) return;
    setText(this.state, brief(this.facts));
    this.state.title = [condition(this.facts), this.facts.note].filter(Boolean).join(": ");
  }
}

/**
 * What there is to say of one server.
 * @param {Model} model
 * @param {Server} facts
 * @returns {Array<[string, string, boolean?]>} title, text, whether it is loud
 */
function details(model, facts) {
  const seen = model.get("seen")[facts.peer];
  const use = cacheUse(facts);
  const breaks = facts.state === "online" && facts.needed;
  return [
    ["server", `${facts.name} (${facts.peer})`],
    [
      "state",
      facts.note ? `${condition(facts)}: ${facts.note}` : condition(facts),
      avoided(facts),
    ],
    ["blocks", `${facts.start}:${facts.end}`],
    ["round trip", duration(facts.rtt)],
    ["throughput", `${number(facts.speed)} tokens/s through its blocks`],
    ["precision", facts.precision ?? "not announced"],
    [
      "cache",
      use === null
        ? "not announced"
        : `${number(facts.cacheLeft)} of ${number(facts.cacheTotal)} tokens free`,
    ],
    ["version", facts.version ?? "not announced"],
    ["last update", `announced ${ago(facts.announced)}; last answered ${ago(facts.heard)}`],
    ["audits", audited(facts) || "off; connect(verify=\"spot\") audits", Boolean(facts.audits?.[1])],
    [
      "if it leaves",
      breaks
        ? `blocks ${facts.needed} have no other server: the model stops`
        : "nothing breaks: every block of it has another server, or it is not in use",
      Boolean(breaks),
    ],
    [
      "has seen",
      seen
        ? `activations of ${number(seen[2])} tokens of this notebook in blocks ${seen[1]}; ` +
          `${bytes(seen[3])} sent, ${bytes(seen[4])} received, ${ago(seen[5])}`
        : "nothing of this notebook",
    ],
  ];
}

/**
 * A server that was lost, from `Traffic.failovers` in widgets/traffic.py.
 * @param {any[]} loss with, at its end, whether servers hold these blocks now
 */
function lossItem([when, , name, start, end, reason, taken, seconds, covered]) {
  const time = new Date(1000 * when).toLocaleTimeString();
  const blocks = `blocks ${start}:${end}`;
  const then = taken.length
    ? `${blocks} continued on ${taken.join(", ")}${seconds === null ? "…" : ` after ${duration(seconds)}`}`
    : covered ? `${blocks} are served again` : `no replacement for ${blocks} yet`;
  return h(
    "div",
    { "data-testid": "failover", class: seconds === null ? null : "sn-mended", title: reason },
    `${time} ${name} lost, ${then}`,
  );
}

/**
 * Runs of blocks whose number of servers looks the same: none, one, two, more.
 * @param {Array<[number, number, number | null]>} runs `[start, end, count]`; null: they need none
 * @returns {Array<[number, number, number, number]>} `[start, end, lowest count, highest count]`;
 *   both are -1 where they need none
 */
export function looksAlike(runs) {
  /** @type {Array<[number, number, number, number]>} */
  const found = [];
  for (const [start, end, known] of runs) {
    const count = known ?? -1;
    const last = found[found.length - 1];
    if (last && Math.min(last[2], 3) === Math.min(count, 3)) {
      last[1] = end;
      last[2] = Math.min(last[2], count);
      last[3] = Math.max(last[3], count);
    } else found.push([start, end, count, count]);
  }
  return found;
}

/** @returns {HTMLElement} */
function legend() {
  const swatch = (/** @type {string} */ colour) => h("i", { style: `background: ${colour}` });
  return h(
    "div",
    { class: "sn-legend sn-dim sn-c1", "aria-hidden": "true" },
    swatch("color-mix(in srgb, var(--sn-accent) 62%, var(--sn-back))"), "hosted",
    swatch("var(--sn-way)"), "route",
    swatch("#ffca66"), "one server",
    swatch("var(--sn-few)"), "two",
    swatch("var(--sn-more)"), "more",
    swatch("var(--sn-bad)"), "none, lost",
  );
}

/** @param {{ model: Model, root: HTMLElement }} view */
function build({ model, root }) {
  const blocks = model.get("num_blocks");
  const headline = h("span", { "data-testid": "headline", role: "status" });
  const age = h("span", { class: "sn-dim", "data-testid": "age" });
  const refresh = button("Refresh", "refresh", () => act(model, "refresh"));
  const pace = h("span", { "data-testid": "pace" });
  const bill = h("span", { class: "sn-dim", "data-testid": "bill" });
  const privacy = h("span", { class: "sn-dim", "data-testid": "privacy" });
  const cover = h("div", { class: "sn-track sn-cover", "data-testid": "coverage" });
  const way = h("div", { class: "sn-track", "data-testid": "route" });
  const home = h("div", { class: "sn-track sn-home" });
  const body = h("tbody");
  const strip = (/** @type {string} */ title, /** @type {HTMLElement} */ track) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, title),
      h("td", { class: "sn-blocks" }, track),
      ...["sn-c2", "sn-c1", "sn-c2", "sn-c3", "sn-c3", "sn-c3 sn-audits"].map((kind) =>
        h("td", { class: kind }),
      ),
    );
  const own = strip("this notebook", home);
  own.dataset.testid = "home";
  const table = h(
    "table",
    { "aria-label": "Servers", role: "grid" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        h("th", { scope: "col" }, "server"),
        h("th", { scope: "col" }, `blocks 0 to ${blocks - 1}`),
        h("th", { scope: "col", class: "sn-c2" }, "state"),
        h("th", { scope: "col", class: "sn-num sn-c1" }, "round trip"),
        h("th", { scope: "col", class: "sn-num sn-c2" }, "tokens/s"),
        h("th", { scope: "col", class: "sn-c3" }, "dtype"),
        h("th", { scope: "col", class: "sn-c3" }, "cache used"),
        h("th", { scope: "col", class: "sn-c3 sn-audits" }, "audits"),
      ),
      strip("redundancy", cover),
      strip("route", way),
      own,
    ),
    body,
  );
  const facts = factList({ class: "sn-detail", "data-testid": "detail", hidden: true });
  const detail = facts.element;
  const log = h("div", { class: "sn-log", role: "log", "aria-label": "Servers lost" });
  fill(
    root,
    h("div", { class: "sn-head" }, h("span", { class: "sn-title" }, model.get("title")), headline,
      h("span", { class: "sn-side" }, age, refresh)),
    h("div", { class: "sn-activity" }, pace, bill, privacy),
    h("div", { class: "sn-rows" }, table),
    detail,
    log,
    legend(),
    h("div", { class: "sn-narrow sn-dim" }, "More columns in a wider cell; select a server to see all of it."),
  );

  /** @type {Row[]} */
  const rows = [];
  const choose = (/** @type {string} */ peer) =>
    set(model, "selected", model.get("selected") === peer ? "" : peer);
  const rowOf = (/** @type {Event} */ event) => {
    const element = /** @type {Element} */ (event.target).closest("tbody tr");
    return rows.find((row) => row.element === element);
  };
  body.addEventListener("click", (event) => {
    const row = rowOf(event);
    if (row) choose(row.peer);
  });
  body.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    const row = rowOf(event);
    if (!row) return;
    event.preventDefault();
    choose(row.peer);
  });
  roving(body, "tr");

  const showRows = () => {
    /** @type {any[][]} */
    const servers = model.get("servers");
    /** @type {Record<string, any[][]>} */
    const ways = {};
    for (const part of model.get("route")) (ways[part[0]] ??= []).push(part);
    while (rows.length < servers.length) {
      rows.push(new Row());
      body.append(rows[rows.length - 1].element);
    }
    while (rows.length > servers.length) rows.pop()?.element.remove();
    servers.forEach((list, index) => {
      const [peer, , start, end] = list;
      const mine = (ways[peer] ?? []).filter((part) => part[1] < end && start < part[2]);
      rows[index].show(list, mine, model.get("planned"), blocks);
    });
    table.classList.toggle("sn-unaudited", !rows.some((row) => row.facts?.audits));
    if (!body.querySelector('[tabindex="0"]')) rows[0]?.element.setAttribute("tabindex", "0");
  };
  const showWay = () => {
    const planned = model.get("planned");
    way.className = planned ? "sn-track sn-planned" : "sn-track";
    const hint = planned ? "a new request would use" : "the latest tokens used";
    const legs = model.get("route").map((/** @type {any[]} */ [peer, start, end]) => {
      const row = rows.find((one) => one.peer === peer);
      const name = row?.name.textContent ?? "a server that has left";
      return { peer, start, end, name, title: `${hint} ${name} for blocks ${start}:${end}` };
    });
    keepItems(way, legs, ({ peer, start, end, name, title }) => {
      const onclick = () => {
        set(model, "selected", peer);
        rows.find((one) => one.peer === peer)?.element.scrollIntoView({ block: "nearest" });
      };
      const leg = h("button", { type: "button", class: "sn-leg", title, "aria-label": title, onclick });
      setText(leg, name);
      return place(leg, start, end, blocks);
    });
  };
  const showDetail = () => {
    const peer = model.get("selected");
    for (const row of rows) row.element.setAttribute("aria-selected", String(row.peer === peer));
    const list = model.get("servers").find((/** @type {any[]} */ one) => one[0] === peer);
    detail.hidden = !list;
    if (!list) return;
    facts.show(details(model, server(list)));
  };
  const showAge = () => {
    const known = model.get("connected") ? `updated ${ago(model.get("read"))}` : "disconnected";
    setText(age, known);
    age.className = model.get("connected") ? "sn-dim" : "sn-loud";
  };
  const clock = setInterval(() => {
    showAge();
    showDetail();
    for (const row of rows) row.tick();
  }, 1000);

  return [
    () => clearInterval(clock),
    follow(model, ["headline", "missing"], () => {
      setText(headline, model.get("headline"));
      headline.className = model.get("missing").length ? "sn-alarm" : "sn-dim";
    }),
    follow(model, ["read", "connected"], showAge),
    follow(model, ["coverage"], () => {
      keepItems(cover, looksAlike(model.get("coverage")), (run) => coverRun(run, blocks));
    }),
    follow(model, ["home"], () => {
      own.hidden = !model.get("home").length;
      keepItems(home, model.get("home"), ([start, end]) => {
        const title = `blocks ${start}:${end} run in this notebook`;
        return place(h("div", { title, role: "img", "aria-label": title }), start, end, blocks);
      });
    }),
    follow(model, ["servers", "route", "planned"], () => {
      showRows();
      showWay();
    }),
    follow(model, ["pace"], () => {
      const [tokens, rate, seconds] = model.get("pace");
      table.classList.toggle("sn-busy", rate > 0);
      const now = rate > 0 ? `${number(rate)} tokens/s, ${duration(seconds)} per pass` : "idle";
      setText(pace, tokens ? `${now}; ${number(tokens)} tokens so far` : "no tokens yet");
    }),
    follow(model, ["seen"], () => {
      /** @type {any[][]} */
      const seen = Object.values(model.get("seen"));
      const names = seen.slice(0, 4).map((one) => one[0]).join(", ");
      const more = seen.length > 4 ? ` and ${seen.length - 4} more` : "";
      const who = seen.length ? `${names}${more}` : "none";
      setText(privacy, `Servers that saw your activations: ${who}`);
    }),
    follow(model, ["bill"], () => setText(bill, model.get("bill") || "no requests yet")),
    follow(model, ["selected", "servers", "seen"], showDetail),
    follow(model, ["failovers", "coverage"], () => {
      const without = model.get("coverage").filter((/** @type {any[]} */ run) => run[2] === 0);
      const losses = model.get("failovers").slice(-5).reverse();
      keepItems(
        log,
        losses.map((/** @type {any[]} */ loss) => [
          ...loss,
          !without.some((/** @type {any[]} */ [start, end]) => start < loss[4] && loss[3] < end),
        ]),
        lossItem,
      );
    }),
  ];
}

/**
 * Blocks with about as many servers, as a part of the strip above all servers.
 * @param {[number, number, number, number]} run
 * @param {number} blocks
 */
function coverRun([start, end, low, high], blocks) {
  if (low < 0) {
    const title = `blocks ${start}:${end}: in this notebook, no server needed`;
    const run = h("div", { class: "sn-many", title, role: "img", "aria-label": title }, "home");
    return place(run, start, end, blocks);
  }
  const kind = ["sn-none", "sn-alone", "sn-few"][low] ?? "sn-many";
  const count = low === high ? String(low) : `${low}–${high}`;
  const title = `blocks ${start}:${end}: ${low ? count : "no"} server${count === "1" ? "" : "s"}`;
  const roomy = (end - start) / blocks > 0.06;
  const text = low ? (roomy ? `×${count}` : "") : roomy ? `${start}:${end} missing` : "!";
  const run = h("div", { class: kind, title, role: "img", "aria-label": title }, text);
  return place(run, start, end, blocks);
}

export default { render: widget("Swarm map", "map", build) };
