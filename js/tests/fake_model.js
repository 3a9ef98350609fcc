// The front end's side of a widget, without a kernel: traits, their events, and what was sent.

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */

export class FakeModel {
  /** @param {Record<string, any>} traits */
  constructor(traits) {
    /** @type {Record<string, any>} */
    this.traits = { error: "", ...traits };
    /** @type {any[]} */
    this.sent = [];
    /** @type {Record<string, any>} */
    this.saved = {};
    /** @type {Map<string, Set<(...args: any[]) => void>>} */
    this.listeners = new Map();
    /** @type {Record<string, any>} */
    this.unsaved = {};
  }

  /** @param {string} name */
  get(name) {
    return this.traits[name];
  }

  /**
   * As the view does it: the kernel learns of it with `save_changes`.
   * @param {string} name
   * @param {any} value
   */
  set(name, value) {
    this.traits[name] = value;
    this.unsaved[name] = value;
    this.emit(`change:${name}`);
  }

  save_changes() {
    Object.assign(this.saved, this.unsaved);
    this.unsaved = {};
  }

  /** @param {any} content */
  send(content) {
    this.sent.push(content);
  }

  /**
   * @param {string} event
   * @param {(...args: any[]) => void} listener
   */
  on(event, listener) {
    if (!this.listeners.has(event)) this.listeners.set(event, new Set());
    this.listeners.get(event)?.add(listener);
  }

  /**
   * @param {string} event
   * @param {(...args: any[]) => void} listener
   */
  off(event, listener) {
    this.listeners.get(event)?.delete(listener);
  }

  /**
   * As the kernel does it: one message changes traits.
   * @param {Record<string, any>} values
   */
  update(values) {
    Object.assign(this.traits, values);
    for (const name of Object.keys(values)) this.emit(`change:${name}`);
  }

  /**
   * @param {string} event
   * @param {...any} args
   */
  emit(event, ...args) {
    for (const listener of [...(this.listeners.get(event) ?? [])]) listener(...args);
  }

  get listening() {
    return [...this.listeners.values()].reduce((count, found) => count + found.size, 0);
  }
}

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
