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
constexpr int64_t kKeptBytes = 16 << 20;  // memory that a thread keeps from call to call
constexpr int kChunksPerThread = 4;
constexpr int64_t kCopyCost = 16;  // of reading a pixel and writing an output, in multiply-adds
constexpr int64_t kSerialWork = 20000;  // vector multiply-adds: below, waking threads costs more

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

// By value: taking an address would drive the sums out of their registers.
inline void store(float* to, Vec v, int skip, int lanes) {
  if (lanes == kLanes) *reinterpret_cast<LooseVec*>(to) = v;
  else copy_lanes(to, reinterpret_cast<const float*>(&v) + skip, lanes);
}

enum Activation { kNone = 0, kRelu = 1, kSilu = 2, kRelu6 = 3, kSigmoid = 4 };
constexpr float kLowest = -80;  // below, a sigmoid counts as zero

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

struct Group {
  int64_t channels, kernel, dilation, top, left;
};

constexpr int kPanel = 16;  // outputs of a 1x1 convolution whose weights lie together

// A 1x1 convolution in equal groups of channels. Weights: for each group, for each kPanel of its
// outputs, (inputs of the group, kPanel), with zeros for outputs that are not there.
struct Pointwise {
  const float *weight, *bias;
  int64_t inputs, outputs, groups, activation;
  int64_t group_inputs() const { return inputs / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t panel(int64_t group, int64_t c) const {  // where the group's outputs from c on begin
    const int64_t panels = (group_outputs() + kPanel - 1) / kPanel;
    return (group * panels + c / kPanel) * group_inputs() * kPanel + c % kPanel;
  }
};

struct Sizes {
  int64_t batch, height, width, channels, out_height, out_width, stride, activation;
};

struct Layer : Sizes {
  const float *x, *weight, *bias;
  float* y;
  const Pointwise* expand;  // what makes `channels` of fewer, on the way in; or null
  int64_t pixel() const { return expand ? expand->inputs : channels; }  // numbers in x
};

struct Task {
  int64_t image, row_begin, row_end;
  float* sums;  // of each channel over these rows of one image, to be added to; or null
  Vec* scratch;
};

struct Block {
  Group group;
  int64_t window;         // the vector's first channel in the tensor
  int read, skip, lanes;  // lanes read of parameters; first lane to write, and how many
  int64_t input;          // the first number to read of a pixel of x
  int64_t weight;         // of the first channel to write; the next tap is group.channels on
  int64_t panel;          // of the weights of `expand`, for the window
  void (*convolve)(const Layer&, const Block&, const Task&);
};

// A vector of a parameter; what comes into lanes that are not written does not matter.
inline Vec load_own(const float* first, const Block& b) {
  if (b.read == kLanes) return load(first - b.skip, kLanes);
  Vec v{};
  copy_lanes(reinterpret_cast<float*>(&v) + b.skip, first, b.lanes);
  return v;
}

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
  const float* weight = l.weight + b.weight;
  for (int64_t i = 0; i < k * k; ++i) ring.taps()[i] = load_own(weight + i * g.channels, b);
  for (int64_t i = 0; i < reach; ++i) {  // zeros left and right of the image
    std::fill(ring.row(i), ring.row(i) + ring.begin, Vec{});
    std::fill(ring.row(i) + ring.end, ring.row(i) + pitch, Vec{});
  }
  return ring;
}

inline void copy_row(const float* from, int64_t count, int64_t pixel, int64_t line, int lanes,
                     Vec* to) {
  if (lanes == kLanes) {
    for (int64_t i = 0; i < count; ++i, from += pixel) {
      __builtin_prefetch(from + line);  // the row below: a hint, harmless past the last row
      to[i] = load(from, kLanes);
    }
  } else {
    for (int64_t i = 0; i < count; ++i, from += pixel) to[i] = load(from, lanes);
  }
}

void expand_row(const Pointwise& p, const Block& b, const float* x, int64_t count, Vec* to);

inline void fetch_rows(Ring& ring, const Layer& l, const Block& b, int64_t image, int64_t y0) {
  const int64_t line = l.width * l.pixel(), count = ring.end - ring.begin;
  for (ring.next = std::max(ring.next, y0); ring.next < std::min(l.height, y0 + ring.reach);
       ++ring.next) {
    const float* from = l.x + (image * l.height + ring.next) * line + b.input;
    Vec* to = ring.row(ring.next) + ring.begin;
    if (l.expand) expand_row(*l.expand, b, from, count, to);
    else copy_row(from, count, l.channels, line, b.read, to);
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

inline void add_row_to_sums(const Layer& l, const Block& b, const float* row, float* sums) {
  Vec total = load(sums, b.lanes);
  for (int64_t ox = 0; ox < l.out_width; ++ox) total += load(row + ox * l.channels, b.lanes);
  store(sums, total, 0, b.lanes);
}

template <int K, int S, int T>
void convolve_rows(const Layer& l, const Block& b, const Task& task) {
  const int64_t k = K ? K : b.group.kernel, stride = S ? S : l.stride;
  const int64_t dilation = K ? 1 : b.group.dilation;
  const int64_t first = b.window + b.skip, size = l.out_width * l.channels;
  Ring ring = open_ring(l, b, k, stride, dilation, T, task.scratch);
  const Vec bias = l.bias ? load_own(l.bias + first, b) : Vec{};
  for (int64_t oy = task.row_begin; oy < task.row_end; ++oy) {
    const int64_t y0 = oy * stride - b.group.top;
    fetch_rows(ring, l, b, task.image, y0);
    float* to = l.y + (task.image * l.out_height + oy) * size + first;
    for (int64_t ox = 0; ox < l.out_width; ox += T) {
      Vec sums[T];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        sums[t] = bias;
        __builtin_prefetch(to + (ox + t) * l.channels, 1);  // will be written: fetch it meanwhile
      }
      for (int64_t ky = 0; ky < k; ++ky) {
        const int64_t iy = y0 + ky * dilation;
        if (iy < 0 || iy >= l.height) continue;
        add_row<K, S, T>(sums, ring.row(iy) + ox * stride, ring.taps() + ky * k, b, stride);
      }
      if (l.activation != kNone) activate(sums, l.activation);
      store_row(sums, l, b, to, ox);
    }
    if (task.sums) add_row_to_sums(l, b, to, task.sums + first);
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
  Layer layer{};  // x, weight, bias and y are filled in at each call
  Pointwise expand{};
  int threads = 1;
  std::vector<Block> blocks;
  std::vector<int64_t> cost{0};  // cost[i]: of all blocks before block i, for one output pixel
  int64_t scratch = 0;           // vectors that the largest ring and its weights take
  int64_t band = 1, bands = 0;   // rows of a band, and how many bands
};

Block make_block(const Layer& l, const Group& g, int64_t channel, int64_t left) {
  Block b{};
  b.group = g;
  b.convolve = version_for(l, g);
  b.read = int(std::min<int64_t>(kLanes, l.channels));
  b.lanes = int(std::min(left, kLanes - channel % kLanes));
  b.window = b.input = std::min(channel, std::max<int64_t>(0, l.channels - kLanes));
  b.skip = int(channel - b.window);
  if (l.expand) {  // here the vectors are those of the 1x1 convolution's panels
    const Pointwise& p = *l.expand;
    const int64_t group = channel / p.group_outputs(), at = channel % p.group_outputs();
    b.skip = int(at % kLanes);
    b.read = b.lanes = int(std::min({left, kLanes - at % kLanes, p.group_outputs() - at}));
    b.window = channel - b.skip;
    b.input = group * p.group_inputs();
    b.panel = p.panel(group, at - b.skip);
  }
  return b;
}

void cut_blocks(Plan& plan, const Group* groups, int64_t group_count) {
  const Layer& l = plan.layer;
  // For one output, the expansion makes stride x stride pixels.
  const int64_t before = l.expand ? l.expand->group_inputs() * l.stride * l.stride : 0;
  int64_t first = 0, weight = 0;
  for (const Group* g = groups; g != groups + group_count; ++g) {
    const int64_t reach = (g->kernel - 1) * g->dilation + 1;
    const int64_t pitch = (round_up(l.out_width, tile_width(l.out_width)) - 1) * l.stride + reach;
    plan.scratch = std::max(plan.scratch, reach * pitch + g->kernel * g->kernel);
    for (int64_t c = 0; c < g->channels; c += plan.blocks.back().lanes) {
      plan.blocks.push_back(make_block(l, *g, first + c, g->channels - c));
      plan.blocks.back().weight = weight + c;
      plan.cost.push_back(plan.cost.back() + g->kernel * g->kernel + kCopyCost + before);
    }
    first += g->channels;
    weight += g->channels * g->kernel * g->kernel;
  }
}

void cut_bands(Plan& plan) {
  const Layer& l = plan.layer;
  const int64_t tasks = std::max<int64_t>(1, l.batch * int64_t(plan.blocks.size()));
  const int64_t wanted = std::max<int64_t>(1, kChunksPerThread * plan.threads / tasks);
  const int64_t row_bytes =
      (l.stride * l.width * l.pixel() + l.out_width * l.channels) * int64_t(sizeof(float));
  const int64_t fit = kBandBytes / std::max<int64_t>(1, row_bytes);
  // Not too few: neighbouring bands read, or expand, the rows they share twice.
  const int64_t rows = std::max<int64_t>(4, std::min(round_up(l.out_height, wanted) / wanted, fit));
  plan.band = std::max<int64_t>(1, std::min(l.out_height, rows));
  plan.bands = (l.out_height + plan.band - 1) / plan.band;
}

template <typename Work>
void in_parallel(int threads, const Work& work) {
  if (threads <= 1) return work(0, 1);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num(), omp_get_num_threads());  // perhaps fewer than were asked for
#else
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i, threads);
  work(0, threads);
  for (std::thread& other : others) other.join();
#endif
}

// Fresh memory costs more than the work done in it: a thread keeps what is not too large. `Use`
// tells apart the pieces of memory that a thread uses at the same time.
template <int Use>
class Workspace {
 public:
  explicit Workspace(int64_t vectors) {
    if (kept().size() < size_t(vectors + 1) * kLanes) kept().resize(size_t(vectors + 1) * kLanes);
    const uintptr_t at = reinterpret_cast<uintptr_t>(kept().data());
    vectors_ = reinterpret_cast<Vec*>((at + sizeof(Vec) - 1) / sizeof(Vec) * sizeof(Vec));
  }
  ~Workspace() {
    if (kept().size() * sizeof(float) > kKeptBytes) std::vector<float>().swap(kept());
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  Vec* vectors() const { return vectors_; }
  float* floats() const { return reinterpret_cast<float*>(vectors_); }

 private:
  static std::vector<float>& kept() {
    static thread_local std::vector<float> memory;
    return memory;
  }
  Vec* vectors_;
};

// Large tensors come as untouched memory; asking for large pages makes touching it cheaper.
void advise(const Layer& l) {
#ifdef __linux__
  const int64_t size = l.batch * l.out_height * l.out_width * l.channels;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(l.y), end = begin + size * sizeof(float);
  const uintptr_t from = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t to = end / kHugePage * kHugePage;
  if (from < to && end - begin >= kFreshBytes)
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

void run(const Layer& l, const Plan& plan, float* sums) {
  const int64_t block_count = int64_t(plan.blocks.size()), band_cost = plan.cost.back();
  const int64_t total = l.batch * plan.bands * band_cost;
  const int threads = total * plan.band * l.out_width < kSerialWork ? 1 : plan.threads;
  const int64_t chunks = int64_t(threads) * kChunksPerThread;
  const auto task_at = [&](int64_t chunk) {  // the first task of a chunk: equal cost, not count
    const int64_t at = total / chunks * chunk + total % chunks * chunk / chunks;
    const auto block = std::lower_bound(plan.cost.begin(), plan.cost.end(), at % band_cost);
    return at / band_cost * block_count + (block - plan.cost.begin());
  };
  std::vector<std::atomic<int64_t>> taken(threads);
  in_parallel(threads, [&](int me, int) {
    const Workspace<0> scratch(plan.scratch);
    for (int i = 0; i < threads; ++i) {  // this thread's own chunks, then what others have left
      const int owner = (me + i) % threads;
      for (int64_t turn = taken[owner]++; turn < kChunksPerThread; turn = taken[owner]++) {
        const int64_t chunk = owner * kChunksPerThread + turn;
        for (int64_t task = task_at(chunk), end = task_at(chunk + 1); task < end; ++task) {
          const Block& b = plan.blocks[size_t(task % block_count)];
          const int64_t band = task / block_count % plan.bands, row = band * plan.band;
          b.convolve(l, b, {task / block_count / plan.bands, row,
                            std::min(l.out_height, row + plan.band),
                            sums ? sums + band * l.channels : nullptr, scratch.vectors()});
        }
      }
    }
  });
}

}  // namespace

extern "C" Plan* new_plan(const Sizes* sizes, const Pointwise* expand, const Group* groups,
                          int64_t group_count, int threads) {
  Plan* plan = new Plan;
  static_cast<Sizes&>(plan->layer) = *sizes;
  if (expand) {
    plan->expand = *expand;
    plan->layer.expand = &plan->expand;
  }
  plan->threads = threads;
  cut_blocks(*plan, groups, group_count);
  cut_bands(*plan);
  return plan;
}

extern "C" void delete_plan(Plan* plan) { delete plan; }

extern "C" void mixed_depthwise2d(const Plan* plan, const float* x, const float* weight,
                                  const float* bias, float* y) {
  Layer l = plan->layer;
  l.x = x, l.weight = weight, l.bias = bias, l.y = y;
  if (l.batch * l.out_height * l.out_width == 0) return;
  advise(l);
  run(l, *plan, nullptr);
}

// Whole network blocks: a 1x1 convolution computed into the ring, and one after the gate.
namespace {

constexpr int kVectors = kTile == 14 ? 2 : 1;  // vectors of outputs in the inner loop
constexpr int64_t kPointTile = 7, kPointChunk = 14 * kPointTile;  // pixels

// sums[v * T + t] += weights of vector v * x[t * pixel + i], over i
template <int V, int T>
inline __attribute__((always_inline)) void multiply(Vec (&sums)[V * T], const float* x,
                                                    int64_t pixel, const float* panel, int64_t n,
                                                    const float* gate) {
  for (int64_t i = 0; i < n; ++i, panel += kPanel) {
    Vec weight[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t next_panels = v * kLanes / kPanel * n * kPanel;
      weight[v] = load(panel + next_panels + v * kLanes % kPanel, kLanes);
      if (gate) weight[v] *= gate[i];
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const float input = x[t * pixel + i];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[v * T + t] += weight[v] * input;
    }
  }
}

template <int T>
void expand_pixels(const Pointwise& p, const Block& b, const float* x, int64_t count, Vec* to) {
  const float* panel = p.weight + b.panel;
  const Vec bias = load_own(p.bias + b.window + b.skip, b);
  for (int64_t at = 0; at < count; at += T) {
    const int64_t from = std::min(at, count - T);
    Vec sums[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[t] = bias;
    multiply<1, T>(sums, x + from * p.inputs, p.inputs, panel, p.group_inputs(), nullptr);
    if (p.activation != kNone) activate(sums, p.activation);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) to[from + t] = sums[t];
  }
}

void expand_row(const Pointwise& p, const Block& b, const float* x, int64_t count, Vec* to) {
  if (count >= kTile) expand_pixels<kTile>(p, b, x, count, to);
  else if (count >= kShortTile) expand_pixels<kShortTile>(p, b, x, count, to);
  else expand_pixels<1>(p, b, x, count, to);
}

template <int V, int T>
void point_tile(const Pointwise& p, const float* x, const float* gate, const float* residual,
                float* y, int64_t group, int64_t c) {
  const int64_t first = group * p.group_outputs() + c, n = p.group_inputs();
  const auto lanes = [&](int v) {
    return int(std::min<int64_t>(kLanes, p.group_outputs() - c - v * kLanes));
  };
  Vec sums[V * T];
#pragma GCC unroll 16
  for (int i = 0; i < V * T; ++i) sums[i] = load(p.bias + first + i / T * kLanes, lanes(i / T));
  const float* panel = p.weight + p.panel(group, c);
  if (gate) multiply<V, T>(sums, x + group * n, p.inputs, panel, n, gate + group * n);
  else multiply<V, T>(sums, x + group * n, p.inputs, panel, n, nullptr);
  if (p.activation != kNone) activate(sums, p.activation);
#pragma GCC unroll 16
  for (int i = 0; i < V * T; ++i) {
    const int64_t at = i % T * p.outputs + first + i / T * kLanes;
    if (residual) sums[i] += load(residual + at, lanes(i / T));
    store(y + at, sums[i], 0, lanes(i / T));
  }
}

template <int V, int T>
void point_pixels(const Pointwise& p, const float* x, int64_t begin, int64_t end,
                  const float* gate, const float* residual, float* y, int64_t group, int64_t c) {
  for (int64_t pixel = begin; pixel < end; pixel += T) {
    const int64_t from = std::min(pixel, end - T), out = from * p.outputs;
    point_tile<V, T>(p, x + from * p.inputs, gate, residual ? residual + out : nullptr, y + out,
                     group, c);
  }
}

// Part `part` of `parts` of a 1x1 convolution, its activation, and the addition of `residual`.
void pointwise(const Pointwise& p, const float* x, int64_t pixels, const float* gate,
               const float* residual, float* y, int part, int parts) {
  const int64_t step = kVectors * kLanes, columns = (p.group_outputs() + step - 1) / step;
  const int64_t each = columns * p.groups, chunks = (pixels + kPointChunk - 1) / kPointChunk;
  const int64_t tasks = chunks * each;
  for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; ++task) {
    const int64_t begin = task / each * kPointChunk, end = std::min(pixels, begin + kPointChunk);
    const int64_t group = task % each / columns, c = task % columns * step;
    const bool several = p.group_outputs() - c > (kVectors - 1) * kLanes;
    const auto compute = end - begin >= kPointTile
        ? (several ? point_pixels<kVectors, kPointTile> : point_pixels<1, kPointTile>)
        : (several ? point_pixels<kVectors, 1> : point_pixels<1, 1>);
    compute(p, x, begin, end, gate, residual, y, group, c);
  }
}

struct InvertedResidual {
  const float *weight, *bias;          // of the depthwise layer
  Pointwise squeeze, excite, project;  // 0 inputs: not there
  int64_t residual, batch;
};

void find_gate(const InvertedResidual& b, const Layer& l, const float* sums, int64_t bands,
               float* gate) {
  float *means = gate + l.channels, *squeezed = means + l.channels;
  for (int64_t c = 0; c < l.channels; ++c) {
    float sum = 0;
    for (int64_t band = 0; band < bands; ++band) sum += sums[band * l.channels + c];
    means[c] = sum / float(l.out_height * l.out_width);
  }
  pointwise(b.squeeze, means, 1, nullptr, nullptr, squeezed, 0, 1);
  pointwise(b.excite, squeezed, 1, nullptr, nullptr, gate, 0, 1);
}

void run_image(const InvertedResidual& b, const Plan& plan, const float* x, float* y) {
  Layer l = plan.layer;
  const int64_t pixels = l.out_height * l.out_width;
  const Workspace<1> wide((pixels + plan.bands) * l.channels / kLanes + 1);
  l.x = x, l.weight = b.weight, l.bias = b.bias, l.y = wide.floats();
  float* sums = b.squeeze.inputs ? l.y + pixels * l.channels : nullptr;
  if (sums) std::fill(sums, sums + plan.bands * l.channels, 0.0f);
  run(l, plan, sums);
  in_parallel(plan.threads, [&](int me, int count) {
    const Workspace<2> memory((2 * l.channels + b.squeeze.outputs) / kLanes + 1);
    float* gate = sums ? memory.floats() : nullptr;
    if (gate) find_gate(b, l, sums, plan.bands, gate);
    pointwise(b.project, l.y, pixels, gate, b.residual ? x : nullptr, y, me, count);
  });
}

}  // namespace

extern "C" void inverted_residual(const InvertedResidual* block, const Plan* alone,
                                  const Plan* together, const float* x, float* y) {
  const Layer& l = together->layer;
  const int64_t in = l.height * l.width * l.pixel();
  const int64_t out = l.out_height * l.out_width * block->project.outputs;
  if (block->batch * out == 0) return;
  const int threads = together->threads;
  const int64_t apart = block->batch / threads * threads;
  in_parallel(apart ? threads : 1, [&](int me, int count) {
    for (int64_t image = apart * me / count; image < apart * (me + 1) / count; ++image)
      run_image(*block, *alone, x + image * in, y + image * out);
  });
  for (int64_t image = apart; image < block->batch; ++image)
    run_image(*block, *together, x + image * in, y + image * out);
}
