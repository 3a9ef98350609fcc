// A widget on the page of a test: what it sent and saved, and what its view shows.

import { FrontEndModel } from "../replay/front_end.js";

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */

export class FakeModel extends FrontEndModel {
  /** @param {Record<string, any>} traits */
  constructor(traits) {
    super({ error: "", ...traits });
    /** @type {any[]} */
    this.sent = [];
    /** @type {Record<string, any>} */
    this.saved = {};
    /** @type {Record<string, any>} */
    this.unsaved = {};
  }

  /**
   * The kernel learns of it with `save_changes`.
   * @param {string} name
   * @param {any} value
   */
  set(name, value) {
    this.unsaved[name] = value;
    super.set(name, value);
  }

  save_changes() {
    Object.assign(this.saved, this.unsaved);
    this.unsaved = {};
  }

  /** @param {any} content */
  send(content) {
    this.sent.push(content);
  }

  get listening() {
    return [...this.listeners.values()].reduce((count, found) => count + found.size, 0);
  }
}

/** What the widgets that write with a model have in common, as widgets/writing.py has it. */
export const WRITING = {
  title: "tiny",
  steering: "",
  strength: 1,
  adapters: [],
  adapters_on: true,
  has_template: true,
  do_sample: false,
  temperature: 1,
  top_p: 1,
  top_k: 50,
  max_new_tokens: 20,
  seed: null,
  state: "idle",
  progress: [],
  note: "",
  stats: {},
  preview: "",
  obstacle: "",
  bill: "",
  waiting: {},
};

/**
 * Show a widget on the page of the test.
 * @param {{ render: import("@anywidget/types").Render<any> }} widget
 * @param {FakeModel} model
 */
export function show(widget, model) {
  const el = document.createElement("div");
  document.body.append(el);
  const end = /** @type {() => void} */ (
    widget.render(/** @type {any} */ ({ model, el, signal: new AbortController().signal }))
  );
  return {
    el,
    close: () => {
      end();
      el.remove();
    },
    /** @param {string} selector */
    find: (selector) => /** @type {HTMLElement} */ (el.querySelector(selector)),
    /** @param {string} selector */
    all: (selector) => /** @type {HTMLElement[]} */ ([...el.querySelectorAll(selector)]),
    /** @param {string} id */
    byId: (id) => /** @type {HTMLElement} */ (el.querySelector(`[data-testid="${id}"]`)),
  };
}
