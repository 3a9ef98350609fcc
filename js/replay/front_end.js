// The front end's side of a widget, without a kernel: traits, and who listens to their changes.

export class FrontEndModel {
  /** @param {Record<string, any>} state */
  constructor(state) {
    /** @type {Record<string, any>} */
    this.traits = {};
    /** @type {Map<string, Set<(...args: any[]) => void>>} */
    this.listeners = new Map();
    this.update(state);
  }

  /** @param {string} name */
  get(name) {
    return this.traits[name];
  }

  /**
   * As the view does it.
   * @param {string} name
   * @param {any} value
   */
  set(name, value) {
    this.update({ [name]: value });
  }

  save_changes() {}

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
}
