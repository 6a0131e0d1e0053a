// What the figures share: colours, elements, a labelled choice. Put in front of each by Python.

/** One colour a kernel size, as in every figure of the book. */
export const KERNEL_COLORS = {
  3: "#0072B2", 5: "#E69F00", 7: "#009E73", 9: "#CC79A7", 11: "#D55E00", 13: "#56B4E9",
};

export function kernelColor(size) {
  return KERNEL_COLORS[size] ?? "#777777";
}

/** Ink on that colour: white where black would be hard to read. */
export function kernelInk(size) {
  return size === 3 ? "white" : "black";
}

/** An element with attributes (`onclick` and the like are listeners) and children. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A whole figure. Plain keys stay in it: Lab would move its cursor, or delete a cell. */
export function figure(label, style, ...children) {
  const keep = (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.shiftKey) event.stopPropagation();
  };
  return element("div", { class: "mixconv", role: "group", "aria-label": label, onkeydown: keep },
    element("style", {}, style), ...children);
}

/** A labelled `select` that shows `get()` and calls `set(value)`; `refresh` looks again. */
export function choice(label, values, get, set) {
  const options = values.map((value) => element("option", {}, String(value)));
  const onchange = () => set(values[select.selectedIndex]);
  const select = element("select", { "aria-label": label, onchange }, ...options);
  const refresh = () => (select.selectedIndex = values.indexOf(get()));
  refresh();
  return { node: element("label", {}, label, " ", select), select, refresh };
}

/** Set traits and tell Python. */
export function put(model, values) {
  for (const [name, value] of Object.entries(values)) model.set(name, value);
  model.save_changes();
}

/** Colours of Lab, light or dark, or of the page around. Ink is ink; colour is a mark. */
export const STYLE = `
.mixconv { --ink: var(--jp-content-font-color0, currentColor); color: var(--ink);
  font: 13px/1.4 var(--jp-content-font-family, sans-serif); padding: 4px; }
.mixconv .row { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: flex-start; margin: 6px 0; }
.mixconv select, .mixconv button { font: inherit; color: inherit; border: 1px solid #888;
  background: var(--jp-layout-color1, transparent); border-radius: 3px; padding: 2px 6px; }
.mixconv option { color: var(--ink); background: var(--jp-layout-color1, Canvas); }
.mixconv :is(select, button):focus-visible { outline: 3px solid #D55E00; outline-offset: 1px; }
.mixconv select:disabled { opacity: 0.5; }
.mixconv p { margin: 4px 0; font-variant-numeric: tabular-nums; }
`;
