import assert from "node:assert/strict";
import test from "node:test";

import * as it from "../../mixconv/widgets/mix.mjs";

const SIZES = [3, 5, 7, 9];

test("the three splits that chapter 2 does by hand", () => {
  assert.deepEqual(it.partition(32, SIZES, "equal"), [8, 8, 8, 8]);
  assert.deepEqual(it.partition(32, SIZES, "exponential"), [16, 8, 4, 4]);
  assert.deepEqual(it.partition(32, SIZES, "logarithmic"), [6, 7, 9, 10]);
});

test("a group without channels is no split", () => {
  assert.equal(it.partition(3, SIZES, "equal"), null);
  assert.equal(it.partition(7, SIZES, "exponential"), null);
  assert.deepEqual(it.partition(7, [5], "exponential"), [7]);
});

test("cost, window, field", () => {
  assert.deepEqual(it.cost([8, 8, 8, 8], SIZES, 14), { weights: 1312, multiplyAdds: 257152, window: 6 });
  assert.equal(it.field(SIZES, 1), 9);
  assert.equal(it.field([3], 3), 7);
});

test("one row for each split, and one for the largest kernel alone", () => {
  const rows = it.rows({ kernel_sizes: SIZES, channels: 7, side: 1 });
  assert.deepEqual(rows.map((row) => row.name), ["equal", "exponential", "logarithmic", "9×9 only"]);
  assert.deepEqual(rows.map((row) => row.weights), [191, undefined, 263, 567]);
});
