// Plays what docs/replay/record.py has recorded of the map, the generation view and the lens: the
// views are the widgets' own, and what answers them here is the recording instead of a kernel.
//
// While it plays, the page lives in the time of the recording (`Clock`), so that what the views say
// of "just now" is true of it. What was not recorded is said to be so, and nothing is made up.

import generate from "../src/generate.js";
import lens from "../src/lens.js";
import map from "../src/map.js";
import { FrontEndModel } from "./front_end.js";

/** @typedef {[number, Record<string, any>]} Frame ms since the start, traits that change */
/** @typedef {{ state: Record<string, any>, frames: Frame[] }} Track */
/** @typedef {{ cells: any[], note: string, stats: any, origin: string, bill: string }} Text */
/** @typedef {{ token: string, ranks: any }} Ranks */
/**
 * @typedef {object} Recording
 * @property {string} recorded the day
 * @property {number} began Unix time
 * @property {number} killed when a server was killed, in ms since the start
 * @property {{
 *   map: Track,
 *   generate: Track & { branches: Record<string, Text> },
 *   lens: { state: Record<string, any>, ranks: Record<string, Ranks> },
 * }} widgets
 */

const ALIVE_MS = 3000; // as widgets/parts/heart.py
const NO_KERNEL = "There is no kernel behind this page";

/** Bytes of a trait as a front end has them. @param {any} value */
function unpacked(value) {
  if (!value?.base64) return value;
  const bytes = Uint8Array.from(atob(value.base64), (letter) => letter.charCodeAt(0));
  return new DataView(bytes.buffer);
}

/**
 * Frames with whole texts: the recording has what is new in each.
 * @param {Frame[]} frames
 * @returns {Frame[]}
 */
function whole(frames) {
  /** @type {any[]} */
  let text = [];
  return frames.map(([at, traits]) => {
    if (!traits.tail) return [at, traits];
    text = [...text.slice(0, traits.tail.kept), ...traits.tail.new];
    return [at, { ...traits, tail: text }];
  });
}

/** A widget whose kernel is a recording. */
export class RecordedModel extends FrontEndModel {
  /**
   * @param {Record<string, any>} state
   * @param {(action: string, options: any) => void} answer
   */
  constructor(state, answer) {
    super(state);
    this.answer = answer;
  }

  /** @param {{ action: string, with: any }} content */
  send(content) {
    this.answer(content.action, content.with);
  }

  /** @param {Record<string, any>} values */
  update(values) {
    const found = Object.entries(values).map(([name, value]) => [name, unpacked(value)]);
    super.update(Object.fromEntries(found));
  }
}

/** The page's time: that of the recording, which stands still while nothing is played. */
class Clock {
  /** @param {number} began Unix time, s */
  constructor(began) {
    this.real = Date.now.bind(Date);
    this.base = 1000 * began;
    /** When it began to run, and at which moment of the recording (ms). */
    this.since = 0;
    this.at = 0;
    this.running = false;
    Date.now = () => this.base + this.now();
  }

  now() {
    return this.running ? this.at + this.real() - this.since : this.at;
  }

  /** @param {number} at */
  run(at) {
    this.at = at;
    this.since = this.real();
    this.running = true;
  }

  stop() {
    this.at = this.now();
    this.running = false;
  }
}

/** Things that happen one after another, each at its time. */
class Timeline {
  /**
   * @param {Array<[number, () => void]>} events ms, in their order
   * @param {Clock} [clock] that goes along
   */
  constructor(events, clock) {
    this.events = events;
    this.clock = clock;
    this.next = 0;
    this.timer = 0;
  }

  get over() {
    return this.next >= this.events.length;
  }

  play() {
    if (this.over) return;
    const from = this.next ? this.events[this.next][0] : 0;
    this.clock?.run(from);
    const began = performance.now() - from;
    const step = () => {
      while (!this.over && this.events[this.next][0] <= performance.now() - began) {
        this.events[this.next++][1]();
      }
      if (this.over) this.clock?.stop();
      else this.timer = window.setTimeout(step, this.events[this.next][0] - performance.now() + began);
    };
    step();
  }

  stop() {
    clearTimeout(this.timer);
    this.clock?.stop();
  }
}

/**
 * Show the recording.
 * @param {Recording} recording
 * @param {{ map: HTMLElement, generate: HTMLElement, lens: HTMLElement, say: (text: string) => void }} page
 */
export function play(recording, page) {
  const { widgets } = recording;
  const clock = new Clock(recording.began);
  const prompt = widgets.generate.state.prompt;
  /** @type {Text[]} those that were written here */
  let texts = [];
  /** @type {Timeline | null} */
  let timeline = null;

  const refuse = (/** @type {string} */ what) => page.say(`${NO_KERNEL}, and ${what}.`);

  const maps = new RecordedModel(widgets.map.state, () => page.say("The map is as it was recorded."));
  const lenses = new RecordedModel(widgets.lens.state, (action, options) => {
    /** @type {string[]} */
    const vocabulary = lenses.get("vocabulary");
    const word = options.token?.replaceAll(" ", "·");
    const number =
      action === "rank"
        ? [word, `·${word}`].map((one) => vocabulary.indexOf(one)).find((at) => widgets.lens.ranks[at])
        : options.number;
    const found = widgets.lens.ranks[number];
    if (found) lenses.update({ ...found, colour: "rank" });
    else refuse("ranks were recorded only of words in the last token's column");
  });
  const writer = new RecordedModel(widgets.generate.state, (action, options) => {
    page.say("");
    const asked = /** @type {Record<string, (options: any) => void>} */ ({
      run, stop, resume, branch, choose, compare,
    })[action];
    asked?.(options);
  });

  const cells = () => {
    const pages = Array.from({ length: writer.get("pages") }, (_, at) => writer.get(`page${at}`));
    return [...pages.flat(), ...writer.get("tail")];
  };
  const keep = (/** @type {number} */ at) => {
    const facts = ["note", "stats", "origin", "bill"].map((name) => [name, writer.get(name)]);
    texts[at] = /** @type {Text} */ ({ cells: cells(), ...Object.fromEntries(facts) });
  };

  function run() {
    if (writer.get("prompt") !== prompt) {
      return refuse("only one prompt was recorded; the page asks that one again when it is reloaded");
    }
    texts = [];
    maps.update(widgets.map.state);
    writer.update({ ...widgets.generate.state, aside: [], beside: null });
    /** @type {Array<[number, () => void]>} */
    const events = [];
    for (const [model, { frames }] of /** @type {const} */ ([[maps, widgets.map], [writer, widgets.generate]])) {
      for (const [at, traits] of whole(frames)) events.push([at, () => model.update(traits)]);
    }
    events.sort(([one], [other]) => one - other);
    events.push([events[events.length - 1][0], () => keep(0)]);
    timeline = new Timeline(events, clock);
    timeline.play();
  }

  function stop() {
    timeline?.stop();
    const [passed] = maps.get("pace");
    maps.update({ pace: [passed, 0, 0] });
    writer.update({ state: "idle", note: "stopped" });
    keep(writer.get("shown"));
  }

  function resume() {
    if (!timeline || timeline.over) return refuse("nothing was recorded after this text");
    writer.update({ state: "writing", note: "" });
    timeline.play();
  }

  /** @param {{ position: number, token: number | string }} options */
  function branch({ position, token }) {
    const found = widgets.generate.branches[`${position}:${token}`];
    if (writer.get("shown") !== 0) return refuse("only branches of the first text were recorded");
    if (!found) return refuse("only likely tokens were tried in its place");
    timeline?.stop();
    keep(0);
    const before = texts[0].cells.slice(0, position);
    const { first, rate, tokens } = found.stats;
    const shown = texts.length;
    const grow = (/** @type {number} */ count) =>
      writer.update({ pages: 0, tail: [...before, ...found.cells.slice(0, count)] });
    writer.update({
      state: "writing", note: "", stats: {}, origin: found.origin, texts: shown + 1, shown,
      beside: null, aside: [],
    });
    grow(1);
    /** @type {Array<[number, () => void]>} */
    const events = Array.from({ length: tokens }, (_, at) => [
      1000 * (first + (rate ? at / rate : 0)), () => grow(at + 2),
    ]);
    events.push([events.length ? events[events.length - 1][0] : 0, () => {
      const { note, stats, bill } = found;
      writer.update({ state: "idle", note, stats, bill });
      keep(shown);
    }]);
    timeline = new Timeline(events);
    timeline.play();
  }

  /** @param {{ text: number }} options */
  function choose({ text }) {
    const { cells: tail, ...facts } = texts[text];
    writer.update({ pages: 0, tail, shown: text, beside: null, aside: [], ...facts });
  }

  /** @param {{ text: number | null }} options */
  function compare({ text }) {
    writer.update({ beside: text, aside: text === null ? [] : texts[text].cells });
  }

  const all = /** @type {const} */ ([
    [map, maps, page.map],
    [generate, writer, page.generate],
    [lens, lenses, page.lens],
  ]);
  for (const [widget, model, el] of all) {
    widget.render(/** @type {any} */ ({ model, el, signal: new AbortController().signal }));
    setInterval(() => model.emit("msg:custom", { alive: true }), ALIVE_MS);
  }
}
