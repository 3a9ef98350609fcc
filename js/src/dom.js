// What all widgets build on: elements, the frame around a view, its theme, actions, numbers.
// A view is built once and then changed in place; whatever came from elsewhere is text, never HTML.

/** @typedef {import("@anywidget/types").AnyModel<any>} Model */
/** @typedef {Node | string | number | null | undefined | false} Child */

// For what is operated with arrow keys: JupyterLab, which sees every key first, would go to another
// cell.
export const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };

const SILENCE = 12_000; // ms without a sign of life after which nobody is there

/** What `keepItems` has made each child of. @type {WeakMap<Element, string>} */
const shownItems = new WeakMap();

/**
 * An element. Attributes of the form `onclick` are listeners; `null` and `false` leave one out.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, any>} [attributes]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  fill(element, ...children);
  return element;
}

/**
 * Replace what is in an element.
 * @param {Element} element
 * @param {...Child} children
 */
export function fill(element, ...children) {
  const shown = children.filter((child) => child !== null && child !== undefined && child !== false);
  element.replaceChildren(...shown.map((child) => (child instanceof Node ? child : String(child))));
}

/**
 * Set an element's text, touching only the letters that change: what is selected around them stays
 * selected.
 * @param {Element} element
 * @param {string} text
 */
export function setText(element, text) {
  const node = element.firstChild;
  if (!(node instanceof Text) || node !== element.lastChild) {
    if (node || text) element.textContent = text;
    return;
  }
  const before = node.data;
  if (before === text) return;
  const shorter = Math.min(before.length, text.length);
  let start = 0;
  while (start < shorter && before[start] === text[start]) start++;
  let end = 0;
  while (end < shorter - start && before.at(-1 - end) === text.at(-1 - end)) end++;
  node.replaceData(start, before.length - end - start, text.slice(start, text.length - end));
}

/**
 * Show HTML of Python, touching only what follows the first element that is another than before.
 * @param {Element} element
 * @param {string} html made harmless there
 */
export function setHtml(element, html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  const now = [...template.content.childNodes];
  const before = [...element.childNodes];
  let same = 0;
  while (same < now.length && before[same]?.isEqualNode(now[same])) same++;
  for (const gone of before.slice(same)) gone.remove();
  element.append(...now.slice(same));
}

/**
 * A list of titles and texts (`dl`) that is kept and changed in place: somebody may be selecting in
 * it, or have the pointer on it.
 * @param {Record<string, any>} attributes of the list
 */
export function factList(attributes) {
  const element = h("dl", attributes);
  return {
    element,
    /** @param {Array<[string, string, boolean?]>} facts title, text, whether it is loud */
    show(facts) {
      while (element.children.length > facts.length) element.lastElementChild?.remove();
      facts.forEach(([title, text, loud], index) => {
        if (index === element.children.length) element.append(h("div", {}, h("dt"), h("dd")));
        const [dt, dd] = element.children[index].children;
        setText(dt, title);
        setText(dd, text);
        dd.classList.toggle("sn-loud", Boolean(loud));
      });
    },
  };
}

/**
 * Let the children of an element be a list of items, one each: a child whose item has not changed
 * stays as it is, so that what is selected in it, or has the focus, stays so.
 * @template T
 * @param {Element} parent
 * @param {T[]} items
 * @param {(item: T) => HTMLElement} make
 */
export function keepItems(parent, items, make) {
  /** @type {Map<string, Element>} */
  const known = new Map();
  for (const child of parent.children) known.set(shownItems.get(child) ?? "", child);
  const children = items.map((item) => {
    const key = JSON.stringify(item);
    const child = known.get(key) ?? make(item);
    known.delete(key);
    shownItems.set(child, key);
    return child;
  });
  for (const child of [...parent.children]) if (!children.includes(child)) child.remove();
  children.forEach((child, index) => {
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
}

/** Models whose views have said that nobody is there. @type {WeakSet<Model>} */
const dead = new WeakSet();

/**
 * Whether somebody is there to answer.
 * @param {Model} model
 */
export const isAlive = (model) => !dead.has(model) && !model.get("gone");

/**
 * Say in place that the kernel has ended, or that the swarm was left, and grey the view out. Python
 * sends a sign of life every three seconds (widgets/parts/heart.py).
 * @param {Model} model
 * @param {HTMLElement} frame
 */
function followLife(model, frame) {
  const note = h("div", { class: "sn-gone", role: "status", "data-testid": "gone", hidden: true });
  frame.prepend(note);
  let heard = Date.now();
  let ever = false;
  const show = () => {
    // The class is JupyterLab's, on a view whose kernel was restarted or is none.
    const cut = frame.closest(".jupyter-widgets-disconnected") !== null;
    if (cut || Date.now() - heard > SILENCE) dead.add(model);
    else dead.delete(model);
    const silent = ever ? "The kernel has ended or was restarted" : "No kernel is connected";
    const why = dead.has(model) ? `${silent}: this is the last state.` : (model.get("gone") ?? "");
    note.hidden = !why;
    setText(note, why);
    frame.classList.toggle("sn-over", Boolean(why));
  };
  const hear = (/** @type {any} */ message) => {
    if (!message?.alive) return;
    heard = Date.now();
    ever = true;
    show();
  };
  model.on("msg:custom", hear);
  const looking = setInterval(show, 1000);
  const end = follow(model, ["gone"], show);
  return () => {
    end();
    clearInterval(looking);
    model.off("msg:custom", hear);
  };
}

/**
 * Ask the Python side to run one of the widget's actions.
 * @param {Model} model
 * @param {string} action
 * @param {Record<string, any>} [options]
 */
export function act(model, action, options = {}) {
  model.send({ action, with: options });
}

/**
 * Set a trait for Python and all views.
 * @param {Model} model
 * @param {string} trait
 * @param {any} value
 */
export function set(model, trait, value) {
  model.set(trait, value);
  model.save_changes();
}

/**
 * What the second half of a double click does not do again.
 * @param {() => void} press
 */
export const once = (press) => (/** @type {MouseEvent} */ event) => {
  if (event.detail < 2) press();
};

/**
 * @param {string} label
 * @param {string} id
 * @param {(event: MouseEvent) => void} press
 * @param {string} [kind]
 */
export const button = (label, id, press, kind = "") =>
  h("button", { type: "button", class: kind || null, "data-testid": id, onclick: press }, label);

/**
 * Call `show` now and whenever one of the traits changes; returns what ends that.
 * @param {Model} model
 * @param {string[]} traits
 * @param {() => void} show
 * @returns {() => void}
 */
export function follow(model, traits, show) {
  for (const trait of traits) model.on(`change:${trait}`, show);
  show();
  return () => {
    for (const trait of traits) model.off(`change:${trait}`, show);
  };
}

/**
 * A widget's `render`: `build` fills the view and returns what ends it. Its errors, and those of
 * the Python side (trait `error`), stand in a red panel above it.
 * @param {string} label what a screen reader calls the view
 * @param {string} kind class and test id: `sn-kind`
 * @param {(view: { model: Model, root: HTMLElement }) => Array<() => void>} build
 * @returns {import("@anywidget/types").Render<any>}
 */
export function widget(label, kind, build) {
  return ({ model, el }) => {
    const text = h("span", { class: "sn-error-text" });
    const close = button("Dismiss", "dismiss", () => act(model, "dismiss"));
    const panel = h(
      "div",
      { class: "sn-error", role: "alert", "data-testid": "error", hidden: true },
      text,
      close,
    );
    const root = h("div", { class: "sn-body" });
    const frame = h(
      "section",
      {
        class: `sn-widget sn-${kind}`,
        "data-testid": kind,
        "aria-label": label,
        // Keys belong to the view, not to the notebook's command mode (JupyterLab).
        "data-lm-suppress-shortcuts": "true",
      },
      panel,
      root,
    );
    el.replaceChildren(frame);
    const showError = (/** @type {string} */ message) => {
      panel.hidden = !message;
      setText(text, message);
    };
    const ends = [
      followTheme(frame),
      followLife(model, frame),
      follow(model, ["error"], () => showError(model.get("error") ?? "")),
    ];
    try {
      ends.push(...build({ model, root }));
    } catch (error) {
      showError(`the view failed: ${error}`);
      console.error(error);
    }
    return () => {
      for (const end of ends) end();
    };
  };
}

/**
 * Whether the page around an element is dark, as JupyterLab, VS Code, Colab, marimo or the browser
 * says.
 * @returns {boolean}
 */
export function isDark() {
  const { body, documentElement: html } = document;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  if (/\bvscode-(dark|high-contrast)\b(?!-light)/.test(body.className)) return true;
  if (body.classList.contains("vscode-light")) return false;
  const named = html.getAttribute("theme") ?? html.dataset.theme ?? body.dataset.theme;
  if (named === "dark" || named === "light") return named === "dark";
  if (html.classList.contains("dark") || body.classList.contains("dark")) return true;
  if (html.classList.contains("light") || body.classList.contains("light")) return false;
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

/**
 * Keep `data-theme` of an element at `light` or `dark`; returns what ends that.
 * @param {HTMLElement} element
 * @returns {() => void}
 */
export function followTheme(element) {
  const show = () => {
    element.dataset.theme = isDark() ? "dark" : "light";
  };
  const observer = new MutationObserver(show);
  const options = { attributeFilter: ["class", "theme", "data-theme", "data-jp-theme-light"] };
  observer.observe(document.body, options);
  observer.observe(document.documentElement, options);
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", show);
  show();
  return () => {
    observer.disconnect();
    system.removeEventListener("change", show);
  };
}

/**
 * Keep the end of a box in sight while it grows, until somebody scrolls up to read.
 * @param {HTMLElement} box
 */
export function endInSight(box) {
  let reading = false;
  // A box that is not on the page has no height, and nobody has scrolled in it.
  const look = () => {
    if (box.clientHeight) reading = box.scrollHeight - box.scrollTop - box.clientHeight >= 30;
  };
  const keep = () => {
    if (!reading) box.scrollTop = box.scrollHeight;
  };
  box.addEventListener("scroll", look, { passive: true });
  // A view is filled before it is put on the page; only then can it be scrolled.
  const observer = new ResizeObserver(keep);
  observer.observe(box);
  return {
    /** @param {() => void} change what may make the box grow */
    during: (change) => {
      look();
      change();
      keep();
    },
    end: () => observer.disconnect(),
  };
}

/**
 * Where an arrow key, Home or End leads from one of several things in a row; null for other keys.
 * @param {string} key
 * @param {number} here
 * @param {number} count
 */
export function stepped(key, here, count) {
  const steps = /** @type {Record<string, number>} */ ({
    ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: count - 1,
  });
  return key in steps ? Math.max(0, Math.min(steps[key], count - 1)) : null;
}

/**
 * Let arrow keys, Home and End move the focus among the children that `selector` finds: one tab
 * stop for all of them.
 * @param {HTMLElement} container
 * @param {string} selector
 */
export function roving(container, selector) {
  for (const [name, value] of Object.entries(OWN_KEYS)) container.setAttribute(name, value);
  container.addEventListener("keydown", (event) => {
    const items = [...container.querySelectorAll(selector)];
    const here = items.indexOf(/** @type {Element} */ (event.target));
    const key = event.key.replace("Down", "Right").replace("Up", "Left");
    const next = items[stepped(key, here, items.length) ?? -1];
    if (here < 0 || !(next instanceof HTMLElement)) return;
    event.preventDefault();
    for (const item of items) item.setAttribute("tabindex", item === next ? "0" : "-1");
    next.focus();
  });
}

/**
 * A number for people: three digits or so, thousands grouped, a dash for what is not known.
 * @param {number | null | undefined} value
 * @returns {string}
 */
export function number(value) {
  if (value === null || value === undefined) return "–";
  const digits = Math.abs(value) >= 100 || Number.isInteger(value) ? 0 : 1;
  return value.toLocaleString("en-US", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}

/**
 * A number of bytes for people.
 * @param {number | null | undefined} value
 * @returns {string}
 */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit++) value /= 1000;
  return `${number(unit ? Number(value.toPrecision(3)) : value)} ${units[unit]}`;
}

/**
 * A duration for people: `1.2 ms`, `3.4 s`, `5 min`, `2 h`.
 * @param {number | null | undefined} seconds
 * @returns {string}
 */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${number(Number((1000 * seconds).toPrecision(3)))} ms`;
  if (seconds < 100) return `${number(Number(seconds.toPrecision(2)))} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}
