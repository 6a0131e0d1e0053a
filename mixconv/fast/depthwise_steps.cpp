// Generated from notebooks/13_kernel_in_steps.ipynb by `make book`.
// Edit the notebook, not this file.

// Steps towards depthwise.cpp: one group, stride 1, channels a multiple of 16.
// x and y are (height, width, channels); w is (k, k, channels).
#include <cstdint>
#include <vector>

using Int = int64_t;

extern "C" void step0_loops(const float* x, const float* w, float* y, Int height, Int width,
                            Int channels, Int k) {
  for (Int c = 0; c < channels; ++c)
    for (Int oy = 0; oy < height; ++oy)
      for (Int ox = 0; ox < width; ++ox) {
        float sum = 0;
        for (Int ky = 0; ky < k; ++ky)
          for (Int kx = 0; kx < k; ++kx) {
            const Int iy = oy + ky - k / 2, ix = ox + kx - k / 2;
            if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
            sum += w[(ky * k + kx) * channels + c] * x[(iy * width + ix) * channels + c];
          }
        y[(oy * width + ox) * channels + c] = sum;
      }
}

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

static Vec at(const float* p) { return *(const Vec*)p; }  // the 16 numbers from here on

extern "C" void step1_lanes(const float* x, const float* w, float* y, Int height, Int width,
                            Int channels, Int k) {
  for (Int c = 0; c < channels; c += kLanes)
    for (Int oy = 0; oy < height; ++oy)
      for (Int ox = 0; ox < width; ++ox) {
        Vec sum{};
        for (Int ky = 0; ky < k; ++ky)
          for (Int kx = 0; kx < k; ++kx) {
            const Int iy = oy + ky - k / 2, ix = ox + kx - k / 2;
            if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
            sum += at(w + (ky * k + kx) * channels + c) * at(x + (iy * width + ix) * channels + c);
          }
        *(Vec*)(y + (oy * width + ox) * channels + c) = sum;
      }
}

static void copy_plane(const float* x, Int height, Int width, Int channels, Int c, Int pad,
                       Vec* plane) {
  const Int pitch = width + 2 * pad;
  for (Int i = 0; i < (height + 2 * pad) * pitch; ++i) plane[i] = Vec{};
  for (Int iy = 0; iy < height; ++iy)
    for (Int ix = 0; ix < width; ++ix)
      plane[(iy + pad) * pitch + ix + pad] = at(x + (iy * width + ix) * channels + c);
}

extern "C" void step2_scratch(const float* x, const float* w, float* y, Int height, Int width,
                              Int channels, Int k) {
  const Int pitch = width + k - 1;
  std::vector<float> memory((height + k - 1) * pitch * kLanes);
  Vec* plane = (Vec*)memory.data();
  for (Int c = 0; c < channels; c += kLanes) {
    copy_plane(x, height, width, channels, c, k / 2, plane);
    for (Int oy = 0; oy < height; ++oy)
      for (Int ox = 0; ox < width; ++ox) {
        Vec sum{};
        for (Int ky = 0; ky < k; ++ky)
          for (Int kx = 0; kx < k; ++kx)
            sum += at(w + (ky * k + kx) * channels + c) * plane[(oy + ky) * pitch + ox + kx];
        *(Vec*)(y + (oy * width + ox) * channels + c) = sum;
      }
  }
}

template <int K>
static void rows(const Vec* plane, const float* w, float* y, Int height, Int width,
                 Int channels, Int c) {
  constexpr int kTile = 14;  // the width must be a multiple of 14 in this step
  const Int pitch = width + K - 1;
  for (Int oy = 0; oy < height; ++oy)
    for (Int ox = 0; ox < width; ox += kTile) {
      Vec sums[kTile] = {};
      for (int ky = 0; ky < K; ++ky)
#pragma GCC unroll 16
        for (int kx = 0; kx < K; ++kx) {
          const Vec tap = at(w + (ky * K + kx) * channels + c);
#pragma GCC unroll 16
          for (int t = 0; t < kTile; ++t) sums[t] += tap * plane[(oy + ky) * pitch + ox + kx + t];
        }
#pragma GCC unroll 16
      for (int t = 0; t < kTile; ++t) *(Vec*)(y + (oy * width + ox + t) * channels + c) = sums[t];
    }
}

extern "C" void step3_rows(const float* x, const float* w, float* y, Int height, Int width,
                           Int channels, Int k) {
  std::vector<float> memory((height + k - 1) * (width + k - 1) * kLanes);
  Vec* plane = (Vec*)memory.data();
  for (Int c = 0; c < channels; c += kLanes) {
    copy_plane(x, height, width, channels, c, k / 2, plane);
    if (k == 3) rows<3>(plane, w, y, height, width, channels, c);
    if (k == 5) rows<5>(plane, w, y, height, width, channels, c);
    if (k == 7) rows<7>(plane, w, y, height, width, channels, c);
    if (k == 9) rows<9>(plane, w, y, height, width, channels, c);
  }
}
