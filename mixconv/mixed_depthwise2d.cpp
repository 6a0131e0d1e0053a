// Generated from notebooks/08_fast.ipynb by `make book`. Edit the notebook, not this file.

// Mixed depthwise convolution as one operation, float32, channels last.
//
//   y[n, oy, ox, c] = act(bias[c] + sum over ky, kx of w[ky, kx, c] *
//       x[n, oy * stride + ky * dilation - top, ox * stride + kx * dilation - left, c])
//
// Channels come in groups, each with its own kernel size, dilation and padding (top, left).
// The weights lie as (k, k, channels of the group), one group after another.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTile = 14;  // 32 registers: 14 sums, a weight, room for inputs
#elif defined(__AVX__)
constexpr int kLanes = 8, kTile = 7;  // 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTile = 14;
#else
constexpr int kLanes = 4, kTile = 7;
#endif
constexpr int kShortTile = 7;            // MixNet's last layers are 7 pixels wide
constexpr int64_t kBandBytes = 1 << 20;  // rows worked on: half of a common second-level cache
constexpr uintptr_t kHugePage = 2 << 20, kFreshBytes = 32 << 20;
constexpr int kChunksPerThread = 4;
constexpr int64_t kSerialWork = 20000;  // vector multiply-adds: below, waking threads costs more

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec load(const float* from, int lanes) {
  if (lanes == kLanes) return *reinterpret_cast<const LooseVec*>(from);
  Vec v{};
  for (int i = 0; i < lanes; ++i) v[i] = from[i];
  return v;
}

template <int Size = kLanes>
inline void copy_lanes(float* to, const float* from, int lanes) {  // kLanes, kLanes / 2, ..., 1
  if (lanes & Size) std::memcpy(to, from, Size * sizeof(float));
  if constexpr (Size > 1)
    copy_lanes<Size / 2>(to + (lanes & Size), from + (lanes & Size), lanes);
}

// By value: taking an address would drive the sums out of their registers.
inline void store(float* to, Vec v, int skip, int lanes) {
  copy_lanes(to, reinterpret_cast<const float*>(&v) + skip, lanes);
}

enum Activation { kNone = 0, kRelu = 1, kSilu = 2, kRelu6 = 3 };

// n is the nearest integer to x / ln 2, so |r| <= ln 2 / 2.
inline Vec exp_vec(Vec x) {
  x = x < 87.0f ? x : Vec{} + 87.0f;  // a NaN becomes 87; silu's own factor x brings it back
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

template <int T>
inline __attribute__((always_inline)) void activate(Vec (&sums)[T], int64_t activation) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    if (activation == kRelu || activation == kRelu6)
      sums[t] = sums[t] < 0.0f ? Vec{} : sums[t];  // written so that a NaN stays
    if (activation == kRelu6) sums[t] = sums[t] > 6.0f ? Vec{} + 6.0f : sums[t];
    if (activation == kSilu) sums[t] = sums[t] / (1.0f + exp_vec(-sums[t]));
  }
}

struct Group {
  int64_t channels, kernel, dilation, top, left;
};

struct Layer {
  const float *x, *weight, *bias;
  float* y;
  int64_t batch, height, width, channels, out_height, out_width, stride, activation;
};

struct Block {
  Group group;
  int64_t window;         // the vector's first channel in the tensor
  int read, skip, lanes;  // lanes read; of these the first to write, and how many
  const float* weight;    // of the window's first channel; the next tap is group.channels on
  void (*convolve)(const Layer&, const Block&, int64_t image, int64_t row_begin,
                   int64_t row_end, Vec* scratch);
};

// sums[t] += w[kx] * in[t * stride + kx * dilation]
template <int K, int S, int T>
inline __attribute__((always_inline)) void add_row(Vec (&sums)[T], const Vec* in, const Vec* w,
                                                   const Block& b, int64_t stride) {
  if constexpr (K > 0) {
#pragma GCC unroll 16
    for (int kx = 0; kx < K; ++kx) {
      const Vec tap = w[kx];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[t] += tap * in[t * S + kx];
    }
  } else {
    for (int64_t kx = 0; kx < b.group.kernel; ++kx) {
      const Vec tap = w[kx];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[t] += tap * in[t * stride + kx * b.group.dilation];
    }
  }
}

struct Ring {
  Vec* rows;                     // `reach` rows of `pitch` vectors, then the weights
  int64_t reach, pitch;          // rows the kernel spans; vectors of a row, whole tiles
  int64_t begin, end, next = 0;  // the image's columns; the first input row not yet inside
  Vec* row(int64_t iy) const { return rows + iy % reach * pitch; }
  Vec* taps() const { return rows + reach * pitch; }
};

inline Ring open_ring(const Layer& l, const Block& b, int64_t k, int64_t stride, int64_t dilation,
                      int64_t tile, Vec* scratch) {
  const Group& g = b.group;
  const int64_t reach = (k - 1) * dilation + 1;
  const int64_t pitch = ((l.out_width + tile - 1) / tile * tile - 1) * stride + reach;
  Ring ring{scratch, reach, pitch, std::min(g.left, pitch), std::min(g.left + l.width, pitch)};
  for (int64_t i = 0; i < k * k; ++i) ring.taps()[i] = load(b.weight + i * g.channels, b.read);
  for (int64_t i = 0; i < reach; ++i) {  // zeros left and right of the image
    std::fill(ring.row(i), ring.row(i) + ring.begin, Vec{});
    std::fill(ring.row(i) + ring.end, ring.row(i) + pitch, Vec{});
  }
  return ring;
}

inline void fetch_rows(Ring& ring, const Layer& l, const Block& b, int64_t image, int64_t y0) {
  const int64_t line = l.width * l.channels;
  for (ring.next = std::max(ring.next, y0); ring.next < std::min(l.height, y0 + ring.reach);
       ++ring.next) {
    const float* from = l.x + (image * l.height + ring.next) * line + b.window;
    Vec* row = ring.row(ring.next);
    for (int64_t column = ring.begin; column < ring.end; ++column, from += l.channels) {
      __builtin_prefetch(from + line);  // the row below: a hint, harmless past the last row
      row[column] = load(from, b.read);
    }
  }
}

template <int T>
inline __attribute__((always_inline)) void store_row(const Vec (&sums)[T], const Layer& l,
                                                     const Block& b, float* to, int64_t ox) {
  if (ox + T <= l.out_width && b.lanes == kLanes) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      *reinterpret_cast<LooseVec*>(to + (ox + t) * l.channels) = sums[t];
  } else {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      if (ox + t < l.out_width) store(to + (ox + t) * l.channels, sums[t], b.skip, b.lanes);
  }
}

template <int K, int S, int T>
void convolve_rows(const Layer& l, const Block& b, int64_t image, int64_t row_begin,
                   int64_t row_end, Vec* scratch) {
  const int64_t k = K ? K : b.group.kernel, stride = S ? S : l.stride;
  const int64_t dilation = K ? 1 : b.group.dilation;
  Ring ring = open_ring(l, b, k, stride, dilation, T, scratch);
  const Vec bias = l.bias ? load(l.bias + b.window, b.read) : Vec{};
  for (int64_t oy = row_begin; oy < row_end; ++oy) {
    const int64_t y0 = oy * stride - b.group.top;
    fetch_rows(ring, l, b, image, y0);
    float* to = l.y + (image * l.out_height + oy) * l.out_width * l.channels + b.window + b.skip;
    for (int64_t ox = 0; ox < l.out_width; ox += T) {
      Vec sums[T];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[t] = bias;
      for (int64_t ky = 0; ky < k; ++ky) {
        const int64_t iy = y0 + ky * dilation;
        if (iy < 0 || iy >= l.height) continue;
        add_row<K, S, T>(sums, ring.row(iy) + ox * stride, ring.taps() + ky * k, b, stride);
      }
      if (l.activation != kNone) activate(sums, l.activation);
      store_row(sums, l, b, to, ox);
    }
  }
}

using ConvolveRows = decltype(Block::convolve);

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

int tile_width(int64_t out_width) {  // the one with fewer outputs beyond the row's end
  return round_up(out_width, kTile) <= round_up(out_width, kShortTile) ? kTile : kShortTile;
}

template <int K, int S>
ConvolveRows for_tile(int64_t out_width) {
  return tile_width(out_width) == kTile ? convolve_rows<K, S, kTile>
                                        : convolve_rows<K, S, kShortTile>;
}

template <int K>
ConvolveRows for_stride(const Layer& l) {
  if (l.stride == 1) return for_tile<K, 1>(l.out_width);
  if (l.stride == 2) return for_tile<K, 2>(l.out_width);
  return for_tile<0, 0>(l.out_width);
}

ConvolveRows version_for(const Layer& l, const Group& g) {
  switch (g.dilation == 1 ? g.kernel : 0) {
    case 3: return for_stride<3>(l);
    case 5: return for_stride<5>(l);
    case 7: return for_stride<7>(l);
    case 9: return for_stride<9>(l);
    case 11: return for_stride<11>(l);
    case 13: return for_stride<13>(l);
    default: return for_tile<0, 0>(l.out_width);
  }
}

struct Plan {
  std::vector<Block> blocks;
  std::vector<int64_t> cost{0};  // cost[i]: of all blocks before block i, for one output pixel
  int64_t scratch = 0;           // vectors that the largest ring and its weights take
};

Plan make_plan(const Layer& l, const Group* groups, int64_t group_count) {
  Plan plan;
  int64_t first = 0;
  const float* weight = l.weight;
  for (const Group* g = groups; g != groups + group_count; ++g) {
    const int64_t reach = (g->kernel - 1) * g->dilation + 1;
    const int64_t pitch = (round_up(l.out_width, tile_width(l.out_width)) - 1) * l.stride + reach;
    plan.scratch = std::max(plan.scratch, reach * pitch + g->kernel * g->kernel);
    for (int64_t c = 0, lanes; c < g->channels; c += lanes) {
      lanes = std::min(g->channels - c, kLanes - (first + c) % kLanes);
      const int64_t last = std::max<int64_t>(0, l.channels - kLanes);
      const int64_t window = std::min(first + c, last), skip = first + c - window;
      const int read = int(std::min<int64_t>(kLanes, l.channels));
      plan.blocks.push_back(
          {*g, window, read, int(skip), int(lanes), weight + c - skip, version_for(l, *g)});
      plan.cost.push_back(plan.cost.back() + g->kernel * g->kernel + 16);
    }
    first += g->channels;
    weight += g->channels * g->kernel * g->kernel;
  }
  return plan;
}

template <typename Work>
void in_parallel(int threads, const Work& work) {
  if (threads <= 1) return work(0);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
#endif
}

// Large tensors come as untouched memory; asking for large pages makes touching it cheaper.
void advise(const Layer& l) {
#ifdef __linux__
  const int64_t size = l.batch * l.out_height * l.out_width * l.channels;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(l.y), end = begin + size * sizeof(float);
  const uintptr_t from = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t to = end / kHugePage * kHugePage;
  if (from < to && to - from >= kFreshBytes)
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace

extern "C" void mixed_depthwise2d(const Layer* layer, const Group* groups, int64_t group_count,
                                  int threads) {
  const Layer& l = *layer;
  const Plan plan = make_plan(l, groups, group_count);
  const int64_t block_count = int64_t(plan.blocks.size()), band_cost = plan.cost.back();
  if (l.batch * l.out_height * l.out_width * block_count == 0) return;
  if (l.batch * l.out_height * l.out_width * band_cost < kSerialWork) threads = 1;
  advise(l);

  const int64_t wanted =
      std::max<int64_t>(1, kChunksPerThread * threads / (l.batch * block_count));
  const int64_t row_bytes =
      (l.stride * l.width + l.out_width) * l.channels * int64_t(sizeof(float));
  const int64_t most = std::min((l.out_height + wanted - 1) / wanted, kBandBytes / row_bytes);
  const int64_t band = std::min(l.out_height, std::max<int64_t>(most, 4));  // not too thin
  const int64_t bands = (l.out_height + band - 1) / band;

  const int64_t chunks = int64_t(threads) * kChunksPerThread;
  const auto task_at = [&](int64_t chunk) {  // the first task of a chunk: equal cost, not count
    const int64_t total = l.batch * bands * band_cost;
    const int64_t at = total / chunks * chunk + total % chunks * chunk / chunks;
    const auto block = std::lower_bound(plan.cost.begin(), plan.cost.end(), at % band_cost);
    return at / band_cost * block_count + (block - plan.cost.begin());
  };
  std::vector<std::atomic<int64_t>> taken(threads);
  in_parallel(threads, [&](int me) {
    const std::unique_ptr<float[]> memory(new float[(plan.scratch + 1) * kLanes]);
    Vec* scratch = reinterpret_cast<Vec*>(
        round_up(reinterpret_cast<uintptr_t>(memory.get()), sizeof(Vec)));
    for (int i = 0; i < threads; ++i) {  // this thread's own chunks, then what others have left
      const int owner = (me + i) % threads;
      for (int64_t turn = taken[owner]++; turn < kChunksPerThread; turn = taken[owner]++) {
        const int64_t chunk = owner * kChunksPerThread + turn;
        for (int64_t task = task_at(chunk), end = task_at(chunk + 1); task < end; ++task) {
          const Block& b = plan.blocks[size_t(task % block_count)];
          const int64_t row = task / block_count % bands * band;
          b.convolve(l, b, task / block_count / bands, row, std::min(l.out_height, row + band),
                     scratch);
        }
      }
    }
  });
}
