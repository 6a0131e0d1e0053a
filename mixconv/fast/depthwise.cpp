// Generated from notebooks/14_whole_kernel.ipynb by `make book`. Edit the notebook, not this file.

// Mixed depthwise convolution, float32, channels last; follows simd.cpp.
//
//   y[n, oy, ox, c] = act(bias[c] + sum over ky, kx of
//       w[ky, kx, c] * x[n, oy * stride + ky - top, ox * stride + kx - left, c])
//
// Channels come in groups, each with its own kernel size and padding (top, left). The weights lie as
// (k, k, channels of the group), one group after another. kernel.py plans the work and brings the
// memory: here nothing is allocated, and nothing is thrown.
#include <algorithm>
#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#endif

namespace {

struct Layer {
  int64_t batch, height, width, channels, out_height, out_width, stride, activation;
  int64_t band, bands, strips;  // rows of a band, and how many bands and strips there are
  int64_t parts, ring;          // shares of the work; vectors of scratch for each
};

struct Strip {
  int64_t kernel, top, left;
  int64_t window;             // the vector's first channel in the tensor
  int64_t read, skip, lanes;  // lanes to read; the first lane to write, and how many
  int64_t weight, step;       // of the first channel to write; from a tap to the next
};

struct Tensors {
  const float *weight, *bias;
  float* y;
};

// A vector of a parameter; what comes into lanes that are not written does not matter.
inline Vec load_own(const float* first, const Strip& s) {
  if (s.read == kLanes) return load(first - s.skip, kLanes);
  Vec v{};
  copy_lanes(reinterpret_cast<float*>(&v) + s.skip, first, int(s.lanes));
  return v;
}

template <int K>
struct Ring {
  Vec* rows;                     // K rows of `pitch` vectors, then the weights
  int64_t pitch, begin, end;     // vectors of a row; where the image's columns are in it
  int64_t next = 0;              // the first input row that is not inside yet
  Vec* row(int64_t iy) const { return rows + iy % K * pitch; }
  Vec* taps() const { return rows + K * pitch; }
};

template <int K, int S, int T>
Ring<K> open_ring(const Layer& l, const Strip& s, const float* weight, Vec* scratch) {
  const int64_t columns = (l.out_width + T - 1) / T * T;  // whole tiles
  const int64_t pitch = (columns - 1) * S + K;
  Ring<K> ring{scratch, pitch, std::min(s.left, pitch), std::min(s.left + l.width, pitch)};
  for (int64_t i = 0; i < K * K; ++i) ring.taps()[i] = load_own(weight + s.weight + i * s.step, s);
  for (int64_t i = 0; i < K; ++i) {  // zeros left and right of the image
    std::fill(ring.row(i), ring.row(i) + ring.begin, Vec{});
    std::fill(ring.row(i) + ring.end, ring.row(i) + pitch, Vec{});
  }
  return ring;
}

struct CopyRow {
  const float* x;
  void operator()(const Layer& l, const Strip& s, int64_t row, int64_t count, Vec* to) const {
    const int64_t line = l.width * l.channels;
    const float* from = x + row * line + s.window;
    if (s.read == kLanes) {
      for (int64_t i = 0; i < count; ++i, from += l.channels) {
        __builtin_prefetch(from + line);  // the row below: a hint, harmless past the last row
        to[i] = load(from, kLanes);
      }
    } else {
      for (int64_t i = 0; i < count; ++i, from += l.channels) to[i] = load(from, int(s.read));
    }
  }
};

// sums[t] += w[kx] * in[t * S + kx]
template <int K, int S, int T>
inline __attribute__((always_inline)) void add_row(Vec (&sums)[T], const Vec* in, const Vec* w) {
#pragma GCC unroll 16
  for (int kx = 0; kx < K; ++kx) {
    const Vec tap = w[kx];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[t] += tap * in[t * S + kx];
  }
}

template <int T>
inline __attribute__((always_inline)) void store_row(const Vec (&sums)[T], const Layer& l,
                                                     const Strip& s, float* to, int64_t ox) {
  if (ox + T <= l.out_width && s.lanes == kLanes) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store(to + (ox + t) * l.channels, sums[t], 0, kLanes);
  } else {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      if (ox + t < l.out_width)
        store(to + (ox + t) * l.channels, sums[t], int(s.skip), int(s.lanes));
  }
}

struct Task {
  int64_t image, begin, end;  // rows of the output of one image
};

template <int K, int S, int T, typename FetchRow>
void convolve_rows(const Layer& l, const Strip& s, const Task& task, const Tensors& tensors,
                   const FetchRow& fetch_row, Vec* scratch) {
  const int64_t first = s.window + s.skip, size = l.out_width * l.channels;
  Ring<K> ring = open_ring<K, S, T>(l, s, tensors.weight, scratch);
  const Vec bias = tensors.bias ? load_own(tensors.bias + first, s) : Vec{};
  for (int64_t oy = task.begin; oy < task.end; ++oy) {
    const int64_t y0 = oy * S - s.top;
    for (ring.next = std::max(ring.next, y0); ring.next < std::min(l.height, y0 + K); ++ring.next)
      fetch_row(l, s, task.image * l.height + ring.next, ring.end - ring.begin,
                ring.row(ring.next) + ring.begin);
    float* to = tensors.y + (task.image * l.out_height + oy) * size + first;
    for (int64_t ox = 0; ox < l.out_width; ox += T) {
      Vec sums[T];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        sums[t] = bias;
        __builtin_prefetch(to + (ox + t) * l.channels, 1);  // will be written: fetch it meanwhile
      }
      for (int64_t ky = 0; ky < K; ++ky) {
        const int64_t iy = y0 + ky;
        if (iy < 0 || iy >= l.height) continue;
        add_row<K, S, T>(sums, ring.row(iy) + ox * S, ring.taps() + ky * K);
      }
      if (l.activation != kNone) activate(sums, l.activation);
      store_row(sums, l, s, to, ox);
    }
  }
}

template <int K, typename FetchRow>
void convolve_tiles(const Layer& l, const Strip& s, const Task& task, const Tensors& tensors,
                    const FetchRow& fetch_row, Vec* scratch) {
  const auto columns = [&](int64_t tile) { return (l.out_width + tile - 1) / tile * tile; };
  const bool wide = columns(kTile) <= columns(kShortTile);  // fewer sums beyond the row's end
  const auto version = l.stride == 1
      ? (wide ? convolve_rows<K, 1, kTile, FetchRow> : convolve_rows<K, 1, kShortTile, FetchRow>)
      : (wide ? convolve_rows<K, 2, kTile, FetchRow> : convolve_rows<K, 2, kShortTile, FetchRow>);
  version(l, s, task, tensors, fetch_row, scratch);
}

template <typename FetchRow>
void convolve(const Layer& l, const Strip& s, const Task& task, const Tensors& tensors,
              const FetchRow& fetch_row, Vec* scratch) {
  switch (s.kernel) {
    case 1: return convolve_tiles<1>(l, s, task, tensors, fetch_row, scratch);
    case 3: return convolve_tiles<3>(l, s, task, tensors, fetch_row, scratch);
    case 5: return convolve_tiles<5>(l, s, task, tensors, fetch_row, scratch);
    case 7: return convolve_tiles<7>(l, s, task, tensors, fetch_row, scratch);
    case 9: return convolve_tiles<9>(l, s, task, tensors, fetch_row, scratch);
    case 11: return convolve_tiles<11>(l, s, task, tensors, fetch_row, scratch);
    case 13: return convolve_tiles<13>(l, s, task, tensors, fetch_row, scratch);
  }
}

struct Plan {
  const Layer& layer;
  const int64_t* ranges;  // where each part of the work begins, and where the last one ends
  const Strip* strips;
};

constexpr int64_t kLayerFields = sizeof(Layer) / sizeof(int64_t);

inline Plan read_plan(const int64_t* table) {
  const Layer* layer = reinterpret_cast<const Layer*>(table);
  const int64_t* ranges = table + kLayerFields;
  return {*layer, ranges, reinterpret_cast<const Strip*>(ranges + layer->parts + 1)};
}

inline const int64_t* end_of(const Plan& plan) {
  return reinterpret_cast<const int64_t*>(plan.strips + plan.layer.strips);
}

template <typename Work>
void for_each_task(const Plan& plan, int64_t part, const Work& work) {
  const Layer& l = plan.layer;
  const int64_t end = plan.ranges[part + 1];
  for (int64_t at = plan.ranges[part]; at < end;) {
    const int64_t piece = at / l.band, next = (piece + 1) * l.band;  // a strip of a band
    const int64_t strip = piece % l.strips, band = piece / l.strips;  // of all images' bands
    const int64_t first = band % l.bands * l.band;                    // row of the image
    const int64_t last = first + std::min(end, next) - piece * l.band;
    work(plan.strips[strip],
         Task{band / l.bands, first + at % l.band, std::min(last, l.out_height)});
    at = next;
  }
}

// work(part, worker) for every part; two workers never use the same number at the same time.
template <typename Work>
void in_parallel(int64_t parts, const Work& work) {
  if (parts == 1) return work(0, 0);
#ifdef _OPENMP
#pragma omp parallel num_threads(int(parts))
  {
    const int64_t me = omp_get_thread_num(), count = omp_get_num_threads();  // perhaps fewer
    for (int64_t part = me; part < parts; part += count) work(part, me);
  }
#else
  constexpr int64_t kMost = 64;
  std::thread others[kMost];
  int64_t next = 1;
  try {
    for (; next < std::min(parts, kMost); ++next)
      others[next] = std::thread([&work, next] { work(next, next); });
  } catch (...) {  // no more threads to be had: the rest is done here
  }
  work(0, 0);
  for (; next < parts; ++next) work(next, 0);
  for (std::thread& other : others)
    if (other.joinable()) other.join();
#endif
}

}  // namespace

extern "C" void mixed_depthwise2d(const int64_t* table, const float* x, const float* weight,
                                  const float* bias, float* y, float* scratch) {
  const Plan plan = read_plan(table);
  const Tensors tensors{weight, bias, y};
  in_parallel(plan.layer.parts, [&](int64_t part, int64_t worker) {
    Vec* ring = reinterpret_cast<Vec*>(scratch) + worker * plan.layer.ring;
    for_each_task(plan, part, [&](const Strip& s, const Task& task) {
      convolve(plan.layer, s, task, tensors, CopyRow{x}, ring);
    });
  });
}

// What kernel.py must agree with, and what it must know.
extern "C" void depthwise_layout(int64_t* to) {
  to[0] = kLayerFields, to[1] = sizeof(Strip) / sizeof(int64_t), to[2] = kLanes;
}
