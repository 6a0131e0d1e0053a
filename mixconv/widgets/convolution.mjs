// One output of a convolution: which pixels it reads, which weights, what sum. The functions above
// `render` are plain arithmetic; tests/widgets compares them with the package.
import { choice, element, figure, kernelColor, put, STYLE } from "./parts.mjs";

const CHANNELS = [0, 1];

/** Zeros before and after an axis. */
export function zeros({ padding, size, stride, dilation }, k) {
  const reach = dilation * (k - 1);
  if (padding === "symmetric") return [reach / 2, reach / 2];
  const total = Math.max(0, reach - ((size - 1) % stride));
  return [Math.floor(total / 2), Math.ceil(total / 2)];
}

/** Positions of the output along an axis. */
export function outputSize(settings, k) {
  const [before, after] = zeros(settings, k);
  const steps = settings.size + before + after - settings.dilation * (k - 1) - 1;
  return Math.floor(steps / settings.stride) + 1;
}

/** Kernel size of an output channel, and the input channels that it reads. */
export function wires({ layer, kernel_sizes }, channel) {
  const k = kernel_sizes[layer === "MixConv" ? channel : 0];
  return { k, reads: layer === "convolution" ? CHANNELS : [channel] };
}

/** The image: channel 0 counts its pixels, channel 1 is all ones; zero outside. */
export function pixel(size, channel, row, column) {
  if (Math.min(row, column) < 0 || Math.max(row, column) >= size) return 0;
  return channel === 0 ? row * size + column : 1;
}

/** A kernel's weight: ones, or counting up in output channel 0 and down in channel 1. */
export function weight(weights, channel, k, i, j) {
  if (weights === "ones") return 1;
  return channel === 0 ? i * k + j + 1 : k * k - i * k - j;
}

/** The taps of one output, a term for each: where it lies, its pixel, its weight. */
export function terms(settings, channel, row, column) {
  const { k, reads } = wires(settings, channel);
  const [before] = zeros(settings, k);
  const { size, stride, dilation, weights } = settings;
  const found = [];
  for (const source of reads)
    for (let i = 0; i < k; i++)
      for (let j = 0; j < k; j++) {
        const y = row * stride - before + i * dilation;
        const x = column * stride - before + j * dilation;
        const inside = y >= 0 && x >= 0 && y < size && x < size;
        const factors = [pixel(size, source, y, x), weight(weights, channel, k, i, j)];
        found.push({ source, y, x, i, j, inside, pixel: factors[0], weight: factors[1] });
      }
  return found;
}

/** One number of the output. */
export function output(settings, channel, row, column) {
  const products = terms(settings, channel, row, column).map((t) => t.pixel * t.weight);
  return products.reduce((a, b) => a + b, 0);
}

/** Weights of the layer, and multiply-adds for the image. */
export function cost(settings) {
  let weights = 0, multiplyAdds = 0;
  for (const channel of CHANNELS) {
    const { k, reads } = wires(settings, channel);
    weights += k * k * reads.length;
    multiplyAdds += k * k * reads.length * outputSize(settings, k) ** 2;
  }
  return { weights, multiplyAdds };
}

/** The sum, written out: what lies outside is counted, not listed. */
export function sentence(settings, channel, row, column) {
  const all = terms(settings, channel, row, column);
  const inside = all.filter((t) => t.inside);
  const written = inside.slice(0, 12).map((t) => `${t.pixel}·${t.weight}`);
  if (inside.length > 12) written.push("…");
  const outside = all.length - inside.length;
  return `Output channel ${channel}, row ${row}, column ${column}: ` +
    `${written.join(" + ") || 0} = ${output(settings, channel, row, column)}` +
    (outside ? `. Outside the image, so zero: ${outside} of ${all.length} taps.` : ".");
}

/** The output `step` further on, row by row, channel by channel, and round. */
export function neighbour(settings, { channel, row, column }, step) {
  const sides = CHANNELS.map((c) => outputSize(settings, wires(settings, c).k));
  const places = CHANNELS.flatMap((c) =>
    Array.from({ length: sides[c] ** 2 }, (_, i) => [c, Math.floor(i / sides[c]), i % sides[c]]));
  const here = places.findIndex(([c, y, x]) => c === channel && y === row && x === column);
  const [c, y, x] = places[(here + step + places.length) % places.length];
  return { channel: c, row: y, column: x };
}

const GRID_STYLE = `${STYLE}
.mixconv table { border-collapse: separate; border-spacing: 1px; margin: 0; width: auto; }
.mixconv .caption { font-weight: 600; }
.mixconv td { box-sizing: border-box; width: 25px; height: 25px; padding: 0; text-align: center;
  font-size: 11px; border: 1px solid #8886; background: none; color: inherit; }
.mixconv td.outside { border-style: dashed; }
.mixconv td button { width: 100%; height: 100%; padding: 0; border: 0; font-size: 11px; }
.mixconv [aria-selected="true"] { outline: 3px solid currentColor; font-weight: 700; }
`;

const NAMES = ["layer", "kernel_sizes", "size", "stride", "padding", "dilation", "weights"];

function render({ model, el }) {
  const settings = () => Object.fromEntries(NAMES.map((name) => [name, model.get(name)]));
  const allowed = model.get("choices");

  /** The output looked at; in a smaller output, the nearest. */
  function place() {
    const channel = model.get("channel");
    const last = outputSize(settings(), wires(settings(), channel).k) - 1;
    return { channel, row: Math.min(model.get("row"), last), column: Math.min(model.get("column"), last) };
  }

  const controls = NAMES.flatMap((name) => {
    if (name !== "kernel_sizes")
      return [choice(name === "size" ? "image side" : name, allowed[name],
        () => model.get(name), (value) => put(model, { [name]: value }))];
    return CHANNELS.map((channel) => choice(`kernel, channel ${channel}`, allowed[name],
      () => wires(settings(), channel).k,
      (value) => put(model, { [name]: model.get(name).map((k, c) => (c === channel ? value : k)) })));
  });
  const second = controls[2].select;
  const inputs = element("div", { class: "row" });
  const outputs = element("div", { class: "row" });
  const status = element("p", { role: "status", "aria-live": "polite" });
  const costs = element("p");
  const go = (step) => () => put(model, neighbour(settings(), place(), step));
  el.append(figure("A convolution, one output at a time", GRID_STYLE,
    element("div", { class: "row" }, ...controls.map((c) => c.node)),
    inputs, outputs,
    element("div", { class: "row" },
      element("button", { type: "button", onclick: go(-1) }, "← previous output"),
      element("button", { type: "button", onclick: go(1) }, "next output →")),
    status, costs));

  function grid(caption, rows, label) {
    const table = element("table", { role: "img", "aria-label": label },
      ...rows.map((cells) => element("tr", {}, ...cells)));
    return element("div", {}, element("div", { class: "caption" }, caption), table);
  }

  function tint(k, strong) {
    return `background: color-mix(in srgb, ${kernelColor(k)} ${strong ? 55 : 25}%, transparent)`;
  }

  /** An input channel with its zeros around, the window's taps coloured. */
  function inputGrid(source, taps, k) { // k of its own output: the grid keeps its size
    const { size } = settings();
    const [before, after] = zeros(settings(), k);
    const hit = new Set(taps.map((t) => `${t.y},${t.x}`));
    const side = Array.from({ length: before + size + after }, (_, i) => i - before);
    const rows = side.map((y) => side.map((x) => {
      const inside = Math.min(y, x) >= 0 && Math.max(y, x) < size;
      return element("td", {
        class: inside ? "inside" : "outside",
        style: hit.has(`${y},${x}`) ? tint(k, true) : null,
      }, String(pixel(size, source, y, x)));
    }));
    const read = taps.length ? `rows ${taps[0].y} to ${taps.at(-1).y}, columns ${taps[0].x} to ` +
      `${taps.at(-1).x}` : "nothing of it";
    return grid(`input, channel ${source}`, rows,
      `Input channel ${source}, ${size} by ${size} pixels; the output reads ${read}.`);
  }

  function kernelGrid(channel, k, reads) {
    const side = Array.from({ length: k }, (_, i) => i);
    const rows = side.map((i) => side.map((j) =>
      element("td", { style: tint(k) }, String(weight(model.get("weights"), channel, k, i, j)))));
    return grid(reads.length > 1 ? "weights, for each input" : "weights", rows,
      `The kernel of output channel ${channel}, ${k} by ${k}.`);
  }

  /** Arrow keys move within an output channel. */
  function move(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [channel, ...at] = event.target.dataset.at.split(",").map(Number);
    const last = outputSize(settings(), wires(settings(), channel).k) - 1;
    const [row, column] = at.map((i, axis) => Math.min(last, Math.max(0, i + step[axis])));
    put(model, { channel, row, column });
    outputs.querySelector('[aria-selected="true"] button').focus();
  }

  function outputGrid(channel) {
    const k = wires(settings(), channel).k;
    const side = Array.from({ length: outputSize(settings(), k) }, (_, i) => i);
    const rows = side.map((row) => element("tr", { role: "row" }, ...side.map((column) => {
      const value = String(output(settings(), channel, row, column));
      return element("td", { role: "gridcell" }, element("button", {
        type: "button", style: tint(k), "data-at": `${channel},${row},${column}`,
        "aria-label": `output channel ${channel}, row ${row}, column ${column}: ${value}`,
        onclick: () => put(model, { channel, row, column }),
      }, value));
    })));
    const name = `output, channel ${channel}`;
    const table = element("table", { role: "grid", "aria-label": name, onkeydown: move }, ...rows);
    return element("div", {}, element("div", { class: "caption" }, name), table);
  }

  /** Mark the output looked at; the tab key reaches it, and the other channel's first. */
  function mark({ channel, row, column }) {
    for (const button of outputs.querySelectorAll("button")) {
      const [c, y, x] = button.dataset.at.split(",").map(Number);
      const chosen = c === channel && y === row && x === column;
      button.parentNode.setAttribute("aria-selected", String(chosen));
      button.tabIndex = chosen || (c !== channel && y + x === 0) ? 0 : -1;
    }
  }

  outputs.addEventListener("mousemove", (event) => { // pointing is enough; resting is no pointing
    const at = event.target.dataset.at?.split(",").map(Number);
    if (at) put(model, { channel: at[0], row: at[1], column: at[2] });
  });

  let shown = "";
  function draw() {
    const now = settings(), here = place();
    const { k, reads } = wires(now, here.channel);
    const taps = terms(now, here.channel, here.row, here.column);
    controls.forEach((control) => control.refresh());
    second.disabled = now.layer !== "MixConv";
    inputs.replaceChildren(
      ...CHANNELS.map((c) => inputGrid(c, taps.filter((t) => t.source === c), wires(now, c).k)),
      kernelGrid(here.channel, k, reads));
    if (shown !== JSON.stringify(now)) outputs.replaceChildren(...CHANNELS.map(outputGrid));
    shown = JSON.stringify(now);
    mark(here);
    status.textContent = sentence(now, here.channel, here.row, here.column);
    const { weights, multiplyAdds } = cost(now);
    costs.textContent = `The layer: ${weights} weights, ${multiplyAdds} multiply-adds.`;
  }

  model.on("change", draw);
  draw();
  return () => model.off("change", draw);
}

export default { render };
