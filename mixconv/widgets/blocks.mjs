// The blocks of a MixNet: choose one, see its layers, its wires, its cost. The functions above
// `render` are plain arithmetic; tests/widgets compares them with the networks themselves.
import { choice, element, figure, kernelColor, kernelInk, put, STYLE } from "./parts.mjs";

/** Pixels per side before each block, and after the last; the stem halves the image. */
export function sides(blocks, size) {
  const found = [Math.ceil(size / 2)];
  for (const { stride } of blocks) found.push(Math.ceil(found.at(-1) / stride));
  return found;
}

/** Equal groups of channels; what is left over goes to the first. */
export function share(channels, groups) {
  const each = Math.floor(channels / groups);
  return [channels - each * (groups - 1), ...Array(groups - 1).fill(each)];
}

/** Which inputs reach which outputs of a 1×1 convolution in groups: first and last of each. */
export function wires(inputs, outputs, groups) {
  const range = (count, g) => [(count / groups) * g, (count / groups) * (g + 1) - 1];
  return Array.from({ length: groups }, (_, g) => ({ from: range(inputs, g), to: range(outputs, g) }));
}

/** The convolutions of a block on an image of side × side, in order. */
export function layers(block, side) {
  const { in_channels: input, out_channels: output, stride, squeeze_ratio: ratio } = block;
  const wide = input * block.expand_ratio, after = Math.ceil(side / stride);
  const found = [];
  const pointwise = (name, from, to, groups, at, bias = 0) => {
    const weights = (from * to) / groups;
    found.push({ name, kernel: 1, groups, from, to, side: at,
      parameters: weights + bias * to, multiplyAdds: weights * at * at });
  };
  if (block.expand_ratio > 1) pointwise("expand", input, wide, block.expand_groups, side);
  const split = share(wide, block.kernel_sizes.length);
  block.kernel_sizes.forEach((k, i) => {
    const taps = block.dilated && stride === 1 ? 9 : k * k;
    found.push({ name: "depthwise", kernel: k, groups: split[i], from: split[i], to: split[i],
      side: after, parameters: split[i] * taps, multiplyAdds: split[i] * taps * after * after });
  });
  if (ratio) {
    const narrow = Math.max(1, Math.floor(input * ratio));
    pointwise("gate: squeeze", wide, narrow, 1, 1, 1);
    pointwise("gate: excite", narrow, wide, 1, 1, 1);
  }
  pointwise("project", wide, output, block.project_groups, after);
  return found;
}

/** Whether a block adds its input to its output. */
export function residual({ skip, stride, in_channels, out_channels }) {
  return skip && stride === 1 && in_channels === out_channels;
}

/** Parameters and multiply-adds of all its convolutions. */
export function total(found) {
  const sum = (name) => found.reduce((a, layer) => a + layer[name], 0);
  return { parameters: sum("parameters"), multiplyAdds: sum("multiplyAdds") };
}

const BLOCKS_STYLE = `${STYLE}
.mixconv .row { gap: 4px 8px; }
.mixconv .blocks { flex-wrap: nowrap; gap: 3px; align-items: flex-end; overflow-x: auto; padding: 4px; }
.mixconv .blocks button { padding: 1px; width: 36px; flex: none; }
.mixconv .blocks span { display: block; line-height: 17px; font-size: 11px; font-weight: 700; }
.mixconv .blocks button[aria-pressed="true"] { outline: 3px solid currentColor; }
.mixconv .blocks .halves { border-left: 4px double currentColor; }
.mixconv .layers { border-collapse: collapse; margin: 0; }
.mixconv .layers :is(th, td) { padding: 1px 9px; text-align: right; border: 0; font-size: 12px;
  background: none; color: inherit; }
.mixconv .layers :is(th, td):first-child { text-align: left; }
.mixconv svg { display: block; max-width: 100%; }
.mixconv svg text { fill: currentColor; font-size: 11px; }
`;

const COLUMNS = ["layer", "kernel", "groups", "channels", "output", "parameters", "multiply-adds"];
const GREY = "#888888";

function draw(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The block from left to right: bars of channels, and what joins them. */
function picture(block, label) {
  const wide = block.in_channels * block.expand_ratio, height = 150, top = 22;
  const svg = draw("svg", { viewBox: "0 0 560 180", width: 560, height: 180, role: "img", "aria-label": label });
  const scale = (count, all) => top + (height * count) / all;
  const bar = (x, count, y0, y1, color) => svg.append(draw("rect",
    { x, y: scale(y0, count), width: 12, height: (height * (y1 - y0)) / count - 1, fill: color }));
  const join = (x0, x1, inputs, outputs, groups) => {
    wires(inputs, outputs, groups).forEach(({ from, to }, g) => svg.append(draw("polygon", {
      points: [[x0, scale(from[0], inputs)], [x1, scale(to[0], outputs)],
        [x1, scale(to[1] + 1, outputs) - 1], [x0, scale(from[1] + 1, inputs) - 1]].join(" "),
      fill: GREY, "fill-opacity": g % 2 ? 0.45 : 0.25,
    })));
  };
  const write = (x, y, text, anchor = "middle") =>
    svg.append(draw("text", { x, y, "text-anchor": anchor }, text));
  const places = [10, 170, 330, 500];
  [block.in_channels, wide, wide, block.out_channels].forEach((count, i) => {
    bar(places[i], count, 0, count, GREY);
    write(places[i] + 6, 14, i === 2 && block.squeeze_ratio ? `${count}, gated` : count);
  });
  if (block.expand_ratio > 1) join(22, 170, block.in_channels, wide, block.expand_groups);
  else join(22, 170, wide, wide, wide);
  let at = 0;
  share(wide, block.kernel_sizes.length).forEach((count, i) => {
    const k = block.kernel_sizes[i], middle = scale(at + count / 2, wide) + 4;
    [170, 330].forEach((x) => bar(x, wide, at, at + count, kernelColor(k)));
    svg.append(draw("rect", { x: 182, y: scale(at, wide), width: 148,
      height: (height * count) / wide - 1, fill: kernelColor(k), "fill-opacity": 0.3 }));
    write(256, middle, `${k}×${k}`);
    at += count;
  });
  join(342, 500, wide, block.out_channels, block.project_groups);
  return svg;
}

function render({ model, el }) {
  const networks = model.get("networks"), names = Object.keys(networks);
  const blocks = () => networks[model.get("network")];
  const choose = (network, block) =>
    put(model, { network, block: Math.min(block, networks[network].length - 1) });
  const network = choice("MixNet", names, () => model.get("network"),
    (name) => choose(name, model.get("block")));
  const size = choice("image side", model.get("choices").size, () => model.get("size"),
    (value) => put(model, { size: value }));
  const row = element("div", { class: "row blocks", role: "group", "aria-label": "blocks" });
  const status = element("p", { role: "status", "aria-live": "polite" });
  const detail = element("div", { class: "row" });
  el.append(figure("The blocks of a MixNet, one by one", BLOCKS_STYLE,
    element("div", { class: "row" }, network.node, size.node), row, status, detail));

  function button(block, index) {
    const kernels = [...block.kernel_sizes].reverse().map((k) =>
      element("span", { style: `background: ${kernelColor(k)}; color: ${kernelInk(k)}` }, k));
    return element("button", {
      type: "button", class: block.stride > 1 ? "halves" : null,
      "aria-label": `block ${index}, kernels ${block.kernel_sizes.join(", ")}`,
      onclick: () => choose(model.get("network"), index),
    }, ...kernels, index);
  }

  function table(found) {
    const line = (tag, cells) => element("tr", {}, ...cells.map((cell, i) =>
      element(i && tag === "td" ? "td" : "th", { scope: tag === "th" ? "col" : "row" }, cell)));
    const n = (value) => value.toLocaleString("en-US");
    const cost = ({ parameters, multiplyAdds }) => [n(parameters), n(multiplyAdds)];
    return element("table", { class: "layers" },
      element("thead", {}, line("th", COLUMNS)),
      element("tbody", {}, ...found.map((one) => line("td", [
        one.name, `${one.kernel}×${one.kernel}`, one.groups, `${one.from} → ${one.to}`,
        `${one.side}×${one.side}`, ...cost(one)])),
        line("td", ["together", "", "", "", "", ...cost(total(found))])));
  }

  let shown = "";
  function update() {
    const index = Math.min(model.get("block"), blocks().length - 1), block = blocks()[index];
    const [before, after] = sides(blocks(), model.get("size")).slice(index, index + 2);
    const found = layers(block, before), { parameters, multiplyAdds } = total(found);
    [network, size].forEach((one) => one.refresh());
    if (shown !== model.get("network")) row.replaceChildren(...blocks().map(button));
    shown = model.get("network");
    [...row.children].forEach((one, i) => one.setAttribute("aria-pressed", String(i === index)));
    status.textContent = `Block ${index} of MixNet-${shown}: ${block.in_channels} → ` +
      `${block.out_channels} channels, ${before}×${before} → ${after}×${after} pixels, ` +
      `${block.activation}, ${residual(block) ? "adds its input" : "no shortcut"}; ` +
      `${parameters.toLocaleString("en-US")} parameters, ` +
      `${multiplyAdds.toLocaleString("en-US")} multiply-adds.`;
    const label = `The expansion in ${block.expand_groups}, the projection in ` +
      `${block.project_groups} groups; kernels ${block.kernel_sizes.join(", ")} between` +
      (block.squeeze_ratio ? ", then a gate that reads all channels." : ".");
    detail.replaceChildren(picture(block, label), table(found));
  }

  model.on("change", update);
  update();
  return () => model.off("change", update);
}

export default { render };
