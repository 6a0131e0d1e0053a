import assert from "node:assert/strict";
import test from "node:test";

import * as it from "../../mixconv/widgets/blocks.mjs";

const BLOCK = { // r1_k3.5.7_a1_p1_s22_e6_i24_o40_se0.5_sw
  in_channels: 24, out_channels: 40, kernel_sizes: [3, 5, 7], stride: 2, expand_ratio: 6,
  expand_groups: 1, project_groups: 1, squeeze_ratio: 0.5, skip: true, dilated: false,
};

test("the layers of a block", () => {
  const names = ["expand", "depthwise", "depthwise", "depthwise", "gate: squeeze", "gate: excite", "project"];
  const found = it.layers(BLOCK, 56);
  assert.deepEqual(found.map((layer) => layer.name), names);
  assert.deepEqual(found[1], { name: "depthwise", kernel: 3, groups: 48, from: 48, to: 48, side: 28,
    parameters: 432, multiplyAdds: 432 * 28 * 28 });
  assert.equal(found[4].parameters, 144 * 12 + 12);
  assert.deepEqual(it.layers({ ...BLOCK, expand_ratio: 1, squeeze_ratio: 0 }, 56).map((l) => l.name),
    ["depthwise", "depthwise", "depthwise", "project"]);
});

test("an odd side rounds up, and the stem halves the image", () => {
  assert.deepEqual(it.sides([{ stride: 1 }, { stride: 2 }, { stride: 2 }], 225), [113, 113, 57, 29]);
});

test("groups do not meet", () => {
  assert.deepEqual(it.wires(24, 144, 2), [{ from: [0, 11], to: [0, 71] }, { from: [12, 23], to: [72, 143] }]);
});

test("what is left over goes to the first", () => {
  assert.deepEqual(it.share(32, 5), [8, 6, 6, 6, 6]);
});

test("a shortcut needs the same shape", () => {
  assert.equal(it.residual({ ...BLOCK, out_channels: 24 }), false); // stride 2
  assert.equal(it.residual({ ...BLOCK, stride: 1 }), false);
  assert.equal(it.residual({ ...BLOCK, stride: 1, out_channels: 24 }), true);
});
