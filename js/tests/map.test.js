import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import map, { looksAlike } from "../src/map.js";
import { FakeModel, show } from "./fake_model.js";

const NOW = Date.UTC(2026, 0, 1) / 1000;

beforeEach(() => {
  vi.useFakeTimers({ now: 1000 * NOW });
});
afterEach(() => {
  vi.useRealTimers();
  document.body.replaceChildren();
});

/**
 * @param {string} name
 * @param {number} start
 * @param {number} end
 * @param {Record<number, any>} [other]
 */
function server(name, start, end, other = {}) {
  const list = [
    `peer-${name}`, name, start, end, "online", "", 0.0123, 42.5, "float32",
    2048, 8192, "0.1.0", NOW - 60, NOW - 5, `${start}:${end}`, null, null,
  ];
  for (const [index, value] of Object.entries(other)) list[Number(index)] = value;
  return list;
}

function swarm(traits = {}) {
  return new FakeModel({
    title: "tiny",
    num_blocks: 10,
    headline: "2 servers online, all 10 blocks served",
    missing: [],
    coverage: [[0, 10, 1]],
    home: [],
    servers: [server("a", 0, 6), server("b", 6, 10)],
    read: NOW,
    route: [["peer-a", 0, 6], ["peer-b", 6, 10]],
    planned: true,
    pace: [0, 0, 0],
    seen: {},
    bill: "",
    failovers: [],
    connected: true,
    selected: "",
    ...traits,
  });
}

describe("the swarm map", () => {
  test("has a row per server with its blocks and the route over them", () => {
    const view = show(map, swarm());
    const rows = view.all('[data-testid="server"]');
    expect(rows.map((row) => row.querySelector("th")?.textContent)).toEqual(["a", "b"]);
    expect(rows[1].textContent).toContain("12.3 ms");
    expect(rows[1].textContent).toContain("75 %"); // of its cache is in use
    const span = /** @type {HTMLElement} */ (rows[1].querySelector(".sn-span"));
    expect([span.style.left, span.style.width]).toEqual(["60.000%", "40.000%"]);
    expect(rows[0].querySelector(".sn-track")?.getAttribute("aria-label")).toBe(
      "blocks 0:6, on the route with 0:6",
    );
    expect(view.all(".sn-way.sn-planned").length).toBe(2);
    expect(view.byId("route").textContent).toBe("ab");
    expect(view.byId("pace").textContent).toBe("no tokens yet");
    expect(view.byId("bill").textContent).toBe("no requests yet");
    expect(view.byId("privacy").textContent).toContain("activations: none");
  });

  test("has a row for the blocks that run in the notebook, while there are any", () => {
    const model = swarm({ home: [[2, 3], [9, 10]], coverage: [[0, 9, 1], [9, 10, null]] });
    const view = show(map, model);
    const row = view.byId("home");
    expect(row.hidden).toBe(false);
    const spans = /** @type {HTMLElement[]} */ ([...row.querySelectorAll("[role=img]")]);
    expect(spans.map((span) => span.title)).toEqual([
      "blocks 2:3 run in this notebook", "blocks 9:10 run in this notebook",
    ]);
    expect([spans[0].style.left, spans[0].style.width]).toEqual(["20.000%", "10.000%"]);
    expect(view.byId("coverage").querySelectorAll(".sn-none").length).toBe(0);
    expect(view.byId("coverage").textContent).toContain("home");
    model.update({ home: [] });
    expect(row.hidden).toBe(true);
  });

  test("keeps its rows when facts change, and shows traffic and who has seen it", () => {
    const model = swarm();
    const view = show(map, model);
    const [first] = view.all('[data-testid="server"]');
    model.update({
      servers: [server("a", 0, 6, { 6: 0.2 }), server("c", 6, 10)],
      route: [["peer-a", 0, 6], ["peer-c", 6, 10]],
      planned: false,
      pace: [120, 12.5, 0.08],
      seen: { "peer-a": ["a", "0:6", 120, 5000, 4000, NOW] },
      bill: "120 requests to 1 server",
    });
    expect(view.byId("bill").textContent).toBe("120 requests to 1 server");
    expect(view.all('[data-testid="server"]')[0]).toBe(first);
    expect(first.textContent).toContain("200 ms");
    expect(view.all(".sn-planned").length).toBe(0);
    expect(view.byId("pace").textContent).toBe("12.5 tokens/s, 80 ms per pass; 120 tokens so far");
    expect(view.find("table").classList.contains("sn-busy")).toBe(true);
    expect(view.byId("privacy").textContent).toContain("activations: a");
    model.update({ servers: [server("c", 6, 10)] });
    expect(view.all('[data-testid="server"]').length).toBe(1);
    expect(view.byId("route").textContent).toBe("a server that has leftc");
  });

  test("shows a server that audits found wrong as one that is avoided, with the reason", () => {
    const wrong = server("b", 6, 10, { 4: "found wrong", 5: "by c, d: gain 0.02", 16: [3, 1, 0] });
    const view = show(map, swarm({ servers: [server("a", 0, 6), wrong] }));
    const row = view.all('[data-testid="server"]')[1];
    expect(row.textContent).toContain("found wrong");
    expect(row.classList.contains("sn-avoided")).toBe(true);
    row.click();
    const detail = view.byId("detail").textContent;
    for (const said of ["by c, d: gain 0.02", "3 agreed, 1 wrong"]) expect(detail).toContain(said);
  });

  test("says why a server is avoided, and in how long it is tried again", () => {
    const gone = server("b", 6, 10, { 4: "unreachable", 5: "it is gone", 15: NOW + 3 });
    const view = show(map, swarm({ servers: [server("a", 0, 6), gone] }));
    const row = view.all('[data-testid="server"]')[1];
    expect(row.textContent).toContain("unreachable (3 s)");
    expect(row.classList.contains("sn-avoided")).toBe(true);
    vi.advanceTimersByTime(2000);
    expect(row.textContent).toContain("unreachable (1 s)");
    vi.advanceTimersByTime(5000);
    expect(row.textContent).not.toContain(" s)");
    row.click();
    expect(view.byId("detail").textContent).toContain("unreachable (retrying now): it is gone");
  });

  test("counts the audits of each server where there are any", () => {
    const model = swarm();
    const view = show(map, model);
    expect(view.find("table").classList.contains("sn-unaudited")).toBe(true);
    const wrong = server("b", 6, 10, { 4: "found wrong", 5: "by a", 16: [2, 1, 0] });
    model.update({ servers: [server("a", 0, 6, { 16: [0, 0, 0] }), wrong] });
    expect(view.find("table").classList.contains("sn-unaudited")).toBe(false);
    const rows = view.all('[data-testid="server"]');
    expect(rows[0].lastElementChild?.textContent).toBe("none yet");
    expect(rows[1].lastElementChild?.textContent).toBe("2 agreed, 1 wrong");
    rows[1].click();
    expect(view.byId("detail").textContent).toContain("found wrong: by a");
  });

  test("is loud about blocks that nobody serves", () => {
    const model = swarm();
    const view = show(map, model);
    expect(view.byId("headline").className).toBe("sn-dim");
    model.update({
      missing: [8, 9],
      headline: "1 server online, MISSING blocks 8:10: no server",
      coverage: [[0, 8, 1], [8, 10, 0]],
    });
    expect(view.byId("headline").className).toBe("sn-alarm");
    expect(view.find(".sn-none").textContent).toBe("8:10 missing");
  });

  test("tells all about a server on click or Enter, and what breaks without it", () => {
    const model = swarm({ seen: { "peer-a": ["a", "0:6", 120, 5000, 4000, NOW] } });
    const view = show(map, model);
    expect(view.byId("detail").hidden).toBe(true);
    view.all('[data-testid="server"]')[0].click();
    expect(model.saved).toEqual({ selected: "peer-a" });
    const text = view.byId("detail").textContent ?? "";
    expect(text).toContain("blocks 0:6 have no other server: the model stops");
    expect(text).toContain("activations of 120 tokens of this notebook in blocks 0:6");
    expect(text).toContain("announced 60 s ago; last answered just now");
    expect(view.all('[aria-selected="true"]').length).toBe(1);
    const second = view.all('[data-testid="server"]')[1];
    second.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
    expect(view.byId("detail").textContent).toContain("nothing of this notebook");
    second.click();
    expect(view.byId("detail").hidden).toBe(true);
  });

  test("what is selected in the details stays so while they are brought up to date", () => {
    const model = swarm({ selected: "peer-a" });
    const view = show(map, model);
    const texts = [...view.byId("detail").querySelectorAll("dd")];
    const age = texts[8];
    const [first, last] = [/** @type {Text} */ (texts[0].firstChild), /** @type {Text} */ (age.firstChild)];
    const selection = /** @type {Selection} */ (getSelection());
    selection.setBaseAndExtent(first, 0, last, "announced".length);
    const before = [...view.byId("detail").querySelectorAll("*")];
    const range = selection.getRangeAt(0);
    vi.advanceTimersByTime(3000);
    model.update({ servers: [server("a", 0, 6, { 6: 0.2 }), server("b", 6, 10)] });
    expect(age.textContent).toBe("announced 63 s ago; last answered just now");
    expect([...view.byId("detail").querySelectorAll("*")]).toEqual(before);
    expect([range.startContainer, range.startOffset]).toEqual([first, 0]);
    expect([range.endContainer, range.endOffset]).toEqual([last, "announced".length]);
  });

  test("a part of the route that stays keeps the focus", () => {
    const model = swarm();
    const view = show(map, model);
    const [leg] = [...view.byId("route").querySelectorAll("button")];
    leg.focus();
    model.update({
      servers: [server("a", 0, 6, { 13: NOW }), server("c", 6, 10)],
      route: [["peer-a", 0, 6], ["peer-c", 6, 10]],
    });
    expect(document.activeElement).toBe(leg);
    expect(view.byId("route").textContent).toBe("ac");
    leg.click();
    expect(model.saved).toEqual({ selected: "peer-a" });
  });

  test("one row is a tab stop and arrows move on", () => {
    const view = show(map, swarm());
    const rows = view.all('[data-testid="server"]');
    expect(rows.map((row) => row.tabIndex)).toEqual([0, -1]);
    rows[0].focus();
    rows[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
    expect(document.activeElement).toBe(rows[1]);
  });

  test("shows a failover as it happens", () => {
    const model = swarm();
    const view = show(map, model);
    const lost = [NOW, "peer-b", "b", 6, 10, "is gone", [], null];
    model.update({ failovers: [lost], coverage: [[0, 6, 1], [6, 10, 0]] });
    expect(view.byId("failover").textContent).toMatch(/b lost, no replacement for blocks 6:10 yet$/);
    model.update({ coverage: [[0, 10, 1]] });
    expect(view.byId("failover").textContent).toMatch(/b lost, blocks 6:10 are served again$/);
    model.update({ failovers: [[...lost.slice(0, 6), ["c"], 0.42]] });
    expect(view.byId("failover").textContent).toMatch(/continued on c after 420 ms$/);
  });

  test("says how old it is, also when nobody sends anything any more", () => {
    const view = show(map, swarm());
    expect(view.byId("age").textContent).toBe("updated just now");
    vi.advanceTimersByTime(75_000);
    expect(view.byId("age").textContent).toBe("updated 75 s ago");
    view.close();
    expect(vi.getTimerCount()).toBe(0);
  });

  test("asks for fresh facts with a button", () => {
    const model = swarm();
    show(map, model).find(".sn-side button").click();
    expect(model.sent).toEqual([{ action: "refresh", with: {} }]);
  });

  test("what servers say is text", () => {
    const view = show(map, swarm({ servers: [server("<img src=x>", 0, 10)] }));
    expect(view.all("img").length).toBe(0);
    expect(view.byId("server").textContent).toContain("<img src=x>");
  });

  test("a hundred servers with 126 blocks stay a few thousand elements", () => {
    const servers = Array.from({ length: 100 }, (_, n) => server(`s${n}`, n, n + 26));
    const model = swarm({ num_blocks: 126, servers });
    const view = show(map, model);
    expect(view.all("*").length).toBeLessThan(2500);
    const rows = view.all('[data-testid="server"]');
    const before = rows.map((row) => row.querySelector(".sn-span"));
    model.update({ servers: servers.map((one, n) => (n === 7 ? server("new", 7, 9) : one)) });
    const kept = rows.filter((row, n) => row.querySelector(".sn-span") === before[n]);
    expect(kept.length).toBe(99);
  });
});

test("runs that look the same are one", () => {
  /** @type {Array<[number, number, number | null]>} */
  const runs = [[0, 2, 3], [2, 4, 7], [4, 5, 2], [5, 6, 1], [6, 7, 0], [7, 9, null]];
  expect(looksAlike(runs)).toEqual([
    [0, 4, 3, 7],
    [4, 5, 2, 2],
    [5, 6, 1, 1],
    [6, 7, 0, 0],
    [7, 9, -1, -1],
  ]);
});
