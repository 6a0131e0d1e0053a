// A mix of kernel sizes, split three ways: who gets how many channels, and what that costs. The
// functions above `render` are plain arithmetic; tests/widgets compares them with the package.
import { choice, element, figure, kernelColor, kernelInk, put, STYLE } from "./parts.mjs";

const METHODS = ["equal", "exponential", "logarithmic"];

function sum(numbers) {
  return numbers.reduce((a, b) => a + b, 0);
}

/** Channels of each group; null if one would be empty. */
export function partition(channels, sizes, method) {
  const last = sizes.length - 1;
  const total = sum(sizes.map(Math.log));
  const share = {
    equal: () => channels / sizes.length,
    exponential: (k, i) => channels / 2 ** (i < last || i === 0 ? i + 1 : i),
    logarithmic: (k) => (channels * Math.log(k)) / total + 1e-9,
  }[method];
  const shares = sizes.map((k, i) => Math.floor(share(k, i)));
  shares[0] += channels - sum(shares);
  return shares.includes(0) ? null : shares;
}

/** What a split costs on an output of side × side, and how wide its windows are on average. */
export function cost(shares, sizes, side) {
  const weights = sum(sizes.map((k, i) => shares[i] * k * k));
  const window = sum(sizes.map((k, i) => shares[i] * k)) / sum(shares);
  return { weights, multiplyAdds: weights * side * side, window };
}

/** Side of what one output of `layers` such layers, with 1×1 layers between, sees at most. */
export function field(sizes, layers) {
  return 1 + layers * (Math.max(...sizes) - 1);
}

/** The rows of the table: three splits, and one kernel for all channels. */
export function rows({ kernel_sizes: sizes, channels, side }) {
  const largest = Math.max(...sizes);
  const split = METHODS.map((method) => [method, partition(channels, sizes, method), sizes]);
  split.push([`${largest}×${largest} only`, [channels], [largest]]);
  return split.map(([name, shares, kernels]) =>
    ({ name, shares, kernels, ...(shares && cost(shares, kernels, side)) }));
}

const BAR_STYLE = `${STYLE}
.mixconv .bars { width: 100%; max-width: 800px; table-layout: fixed; border-collapse: collapse; }
.mixconv .bars :is(th, td) { padding: 3px 6px; text-align: right; font-size: 12px; border: 0;
  background: none; color: inherit; }
.mixconv .bars :is(th, td):nth-child(-n+2) { text-align: left; }
.mixconv .bars :is(th, td):nth-child(2) { width: 46%; }
.mixconv .bar { display: flex; height: 34px; }
.mixconv .bar span { overflow: hidden; text-align: center; line-height: 16px; white-space: pre;
  min-width: 0; flex-basis: 0; font-size: 11px; box-sizing: border-box; border-right: 1px solid #fff; }
.mixconv fieldset { border: 0; margin: 0; padding: 0; display: flex; gap: 8px; }
.mixconv legend { float: left; padding: 0; }
.mixconv input[type="range"] { width: 220px; vertical-align: middle; }
.mixconv input:focus-visible { outline: 3px solid #D55E00; outline-offset: 1px; }
`;

const COLUMNS = ["split", "channels", "weights", "multiply-adds", "mean window"];

function render({ model, el }) {
  const allowed = model.get("choices");
  const settings = () => Object.fromEntries(
    Object.keys(allowed).map((name) => [name, model.get(name)]));

  const boxes = allowed.kernel_sizes.map((k) => {
    const box = element("input", { type: "checkbox", onchange: () => {
      const sizes = allowed.kernel_sizes.filter((one, i) => boxes[i].checked);
      if (sizes.length) put(model, { kernel_sizes: sizes });
      else box.checked = true; // one kernel size must stay
    } });
    return box;
  });
  const slider = element("input", {
    type: "range", min: allowed.channels[0], max: allowed.channels.at(-1),
    oninput: () => put(model, { channels: Number(slider.value) }),
  });
  const count = element("span");
  const others = [["side", "output side"], ["layers", "layers"]].map(([name, label]) =>
    choice(label, allowed[name], () => model.get(name), (value) => put(model, { [name]: value })));
  const body = element("tbody");
  const status = element("p", { role: "status", "aria-live": "polite" });
  el.append(figure("A mix of kernels, split three ways", BAR_STYLE,
    element("div", { class: "row" },
      element("fieldset", {}, element("legend", {}, "kernels"),
        ...boxes.map((box, i) => element("label", {}, box, ` ${allowed.kernel_sizes[i]}`))),
      element("label", {}, "channels ", slider, " ", count),
      ...others.map((one) => one.node)),
    element("table", { class: "bars" },
      element("thead", {}, element("tr", {},
        ...COLUMNS.map((name) => element("th", { scope: "col" }, name)))),
      body),
    status));

  function bar({ shares, kernels }) {
    const parts = kernels.map((k, i) => {
      const n = shares[i], narrow = n < 0.09 * sum(shares); // no room for both numbers
      const style = `flex-grow: ${n}; background: ${kernelColor(k)}; color: ${kernelInk(k)}`;
      return element("span", { style }, `${n}\n${narrow ? k : `${k}×${k}`}`);
    });
    const label = shares.map((n, i) => `${n} of ${kernels[i]} by ${kernels[i]}`).join(", ");
    return element("div", { class: "bar", role: "img", "aria-label": label }, ...parts);
  }

  function line(row) {
    const words = row.shares
      ? [bar(row), ...[row.weights, row.multiplyAdds].map((n) => n.toLocaleString("en-US")),
        row.window.toFixed(1)]
      : ["leaves a group empty", "–", "–", "–"];
    return element("tr", {}, element("th", { scope: "row" }, row.name),
      ...words.map((word) => element("td", {}, word)));
  }

  function draw() {
    const now = settings(), table = rows(now), side = field(now.kernel_sizes, now.layers);
    boxes.forEach((box, i) => (box.checked = now.kernel_sizes.includes(allowed.kernel_sizes[i])));
    slider.value = now.channels;
    count.textContent = now.channels;
    others.forEach((one) => one.refresh());
    body.replaceChildren(...table.map(line));
    const told = table.map(({ name, weights }) =>
      `${name} ${weights ? weights.toLocaleString("en-US") : "leaves a group empty"}`);
    status.textContent = `Weights: ${told.join(", ")}. ` +
      `${now.layers === 1 ? "One layer sees" : `${now.layers} layers see`} ${side}×${side} pixels at most.`;
  }

  model.on("change", draw);
  draw();
  return () => model.off("change", draw);
}

export default { render };
