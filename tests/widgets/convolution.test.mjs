import assert from "node:assert/strict";
import test from "node:test";

import * as it from "../../mixconv/widgets/convolution.mjs";

const BY_HAND = {
  layer: "MixConv", kernel_sizes: [3, 5], size: 5, stride: 1, padding: "symmetric", dilation: 1,
  weights: "ones",
};

test("the four outputs that chapter 1 does by hand", () => {
  const at = [[0, 2, 2], [0, 0, 0], [1, 2, 2], [1, 0, 0]];
  assert.deepEqual(at.map((place) => it.output(BY_HAND, ...place)), [108, 12, 25, 9]);
  assert.equal(it.sentence(BY_HAND, 0, 0, 0),
    "Output channel 0, row 0, column 0: 0·1 + 1·1 + 5·1 + 6·1 = 12. " +
    "Outside the image, so zero: 5 of 9 taps.");
});

test("a convolution reads both channels, the others one", () => {
  assert.deepEqual(it.wires({ ...BY_HAND, layer: "convolution" }, 1), { k: 3, reads: [0, 1] });
  assert.deepEqual(it.wires({ ...BY_HAND, layer: "depthwise" }, 1), { k: 3, reads: [1] });
  assert.deepEqual(it.wires(BY_HAND, 1), { k: 5, reads: [1] });
  assert.equal(it.output({ ...BY_HAND, layer: "convolution" }, 1, 2, 2), 108 + 9);
});

test("'same' puts the odd zero after", () => {
  const same = { ...BY_HAND, size: 6, stride: 2, padding: "same" };
  assert.deepEqual(it.zeros(same, 3), [0, 1]);
  assert.deepEqual(it.zeros({ ...same, stride: 3 }, 1), [0, 0]);
  assert.deepEqual(it.zeros({ ...same, dilation: 2, padding: "symmetric" }, 5), [4, 4]);
});

test("dilation spreads the taps", () => {
  const taps = it.terms({ ...BY_HAND, dilation: 2 }, 0, 2, 2);
  assert.deepEqual([...new Set(taps.map((t) => t.y))], [0, 2, 4]);
});

test("steps visit every output once and come home", () => {
  let here = { channel: 0, row: 0, column: 0 };
  const seen = new Set();
  do {
    seen.add(JSON.stringify(here));
    here = it.neighbour(BY_HAND, here, 1);
  } while (!seen.has(JSON.stringify(here)));
  assert.equal(seen.size, 50);
  assert.deepEqual(here, { channel: 0, row: 0, column: 0 });
  assert.deepEqual(it.neighbour(BY_HAND, here, -1), { channel: 1, row: 4, column: 4 });
});
