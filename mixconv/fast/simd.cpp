// Generated from notebooks/13_kernel_in_steps.ipynb by `make book`.
// Edit the notebook, not this file.

// Vectors of float32 as wide as the machine's: load, store, activations.
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTile = 14;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTile = 7;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTile = 14;
#else
constexpr int kLanes = 4, kTile = 7;
#endif
constexpr int kShortTile = 7;  // MixNet's last layers are 7 pixels wide

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

template <int Size = kLanes>
inline void copy_lanes(float* to, const float* from, int lanes) {  // kLanes, kLanes / 2, ..., 1
  if (lanes & Size) std::memcpy(to, from, Size * sizeof(float));
  if constexpr (Size > 1)
    copy_lanes<Size / 2>(to + (lanes & Size), from + (lanes & Size), lanes);
}

inline Vec load(const float* from, int lanes) {
  if (lanes == kLanes) return *reinterpret_cast<const LooseVec*>(from);
  Vec v{};
  copy_lanes(reinterpret_cast<float*>(&v), from, lanes);
  return v;
}

// Lanes from `skip` on. By value: taking an address would drive the sums out of their registers.
inline void store(float* to, Vec v, int skip, int lanes) {
  if (lanes == kLanes) *reinterpret_cast<LooseVec*>(to) = v;
  else copy_lanes(to, reinterpret_cast<const float*>(&v) + skip, lanes);
}

// n is the nearest integer to x / ln 2, so |r| <= ln 2 / 2.
inline Vec exp_vec(Vec x) {
  x = x < 87.0f ? x : Vec{} + 87.0f;  // a NaN becomes 87
  x = x > -87.0f ? x : Vec{} - 87.0f;
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the last bits
  Vec shifted = x * 1.44269504f + kRound;
  Vec n = shifted - kRound;
  Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
  Vec p = Vec{} + 1.0f / 5040;
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = p * r + term;
  IntVec power = (reinterpret_cast<IntVec>(shifted) - 0x4B400000 + 127) << 23;
  return p * reinterpret_cast<Vec>(power);
}

enum Activation { kNone = 0, kRelu = 1, kSilu = 2, kRelu6 = 3, kSigmoid = 4 };
constexpr float kLowest = -80;  // below, a sigmoid counts as zero

template <int T>
inline __attribute__((always_inline)) void activate(Vec (&sums)[T], int64_t activation) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    if (activation == kRelu || activation == kRelu6)
      sums[t] = sums[t] < 0.0f ? Vec{} : sums[t];  // written so that a NaN stays
    if (activation == kRelu6) sums[t] = sums[t] > 6.0f ? Vec{} + 6.0f : sums[t];
    if (activation == kSilu || activation == kSigmoid) {
      const Vec above = activation == kSilu ? sums[t] : Vec{} + 1.0f;
      const Vec value = above / (1.0f + exp_vec(-sums[t]));
      const Vec kept = sums[t] == sums[t] ? value : sums[t];  // a NaN stays
      sums[t] = sums[t] < kLowest ? Vec{} : kept;
    }
  }
}

}  // namespace

// y = activation of x: for the chapter and the tests to look at.
extern "C" void simd_activate(const float* x, float* y, int64_t count, int64_t activation) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = count - i < kLanes ? int(count - i) : kLanes;
    Vec sums[1] = {load(x + i, lanes)};
    activate(sums, activation);
    store(y + i, sums[0], 0, lanes);
  }
}
