// Generated from notebooks/15_block_in_one_pass.ipynb by `make book`.
// Edit the notebook, not this file.

// A whole inverted residual block, image by image; follows simd.cpp and depthwise.cpp. The ring is
// filled with rows of the expansion, the depthwise layer writes one image's wide tensor, and a gate
// and the projection read it. block_kernel.py plans the work and brings the memory.
namespace {

constexpr int kPanel = 16;  // outputs of a 1x1 convolution whose weights lie together

// A 1x1 convolution in equal groups of channels. Weights: for each group, for each kPanel of its
// outputs, (inputs of the group, kPanel), with zeros for outputs that are not there.
struct PointSizes {
  int64_t inputs, outputs, groups, activation;  // 0 inputs: there is no such layer
};

struct Pointwise : PointSizes {
  const float *weight, *bias;
  int64_t group_inputs() const { return inputs / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  const float* panel(int64_t group, int64_t c) const {  // of the group's outputs from c on
    const int64_t panels = (group_outputs() + kPanel - 1) / kPanel;
    return weight + (group * panels + c / kPanel) * group_inputs() * kPanel + c % kPanel;
  }
};

// sums[v * T + t] += weights of vector v * x[t * pixel + i], over i
template <int V, int T>
inline __attribute__((always_inline)) void multiply(Vec (&sums)[V * T], const float* x,
                                                    int64_t pixel, const float* panel, int64_t n,
                                                    const float* gate) {
  for (int64_t i = 0; i < n; ++i, panel += kPanel) {
    Vec weight[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      // The second vector: with 16 lanes of the next panel, with fewer the next part of this one.
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

struct Source {
  int64_t input, panel;  // a strip's first input of a pixel; where its weights begin
};

template <int T>
void expand_pixels(const Pointwise& p, const Strip& s, const Source& source, const float* x,
                   int64_t count, Vec* to) {
  const Vec bias = load_own(p.bias + s.window + s.skip, s);
  for (int64_t at = 0; at < count; at += T) {
    const int64_t from = std::min(at, count - T);
    Vec sums[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[t] = bias;
    multiply<1, T>(sums, x + from * p.inputs, p.inputs, p.weight + source.panel, p.group_inputs(),
                   nullptr);
    if (p.activation != kNone) activate(sums, p.activation);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) to[from + t] = sums[t];
  }
}

struct ExpandRow {
  const Pointwise& expand;
  const float* x;
  const Strip* strips;
  const Source* sources;  // of each strip
  void operator()(const Layer& l, const Strip& s, int64_t row, int64_t count, Vec* to) const {
    const Source& source = sources[&s - strips];  // the strip's number: how far from the first
    const float* from = x + row * l.width * expand.inputs + source.input;
    if (count >= kTile) expand_pixels<kTile>(expand, s, source, from, count, to);
    else if (count >= kShortTile) expand_pixels<kShortTile>(expand, s, source, from, count, to);
    else expand_pixels<1>(expand, s, source, from, count, to);
  }
};

constexpr int kVectors = kTile == 14 ? 2 : 1;  // vectors of outputs in the inner loop
constexpr int64_t kPointTile = 7, kPointChunk = 14 * kPointTile;  // pixels

struct Projection {  // what a 1x1 convolution reads and writes; gate and residual may be null
  const Pointwise& point;
  const float *x, *gate, *residual;
  float* y;
};

template <int V, int T>
void point_tile(const Projection& q, int64_t pixel, int64_t group, int64_t c) {
  const Pointwise& p = q.point;
  const int64_t n = p.group_inputs(), first = group * p.group_outputs() + c;
  const auto lanes = [&](int v) {
    return int(std::min<int64_t>(kLanes, p.group_outputs() - c - v * kLanes));
  };
  Vec sums[V * T];
#pragma GCC unroll 16
  for (int i = 0; i < V * T; ++i) sums[i] = load(p.bias + first + i / T * kLanes, lanes(i / T));
  const float *x = q.x + pixel * p.inputs + group * n, *panel = p.panel(group, c);
  if (q.gate) multiply<V, T>(sums, x, p.inputs, panel, n, q.gate + group * n);
  else multiply<V, T>(sums, x, p.inputs, panel, n, nullptr);
  if (p.activation != kNone) activate(sums, p.activation);
#pragma GCC unroll 16
  for (int i = 0; i < V * T; ++i) {
    const int64_t at = (pixel + i % T) * p.outputs + first + i / T * kLanes;
    if (q.residual) sums[i] += load(q.residual + at, lanes(i / T));
    store(q.y + at, sums[i], 0, lanes(i / T));
  }
}

template <int V, int T>
void point_pixels(const Projection& q, int64_t begin, int64_t end, int64_t group, int64_t c) {
  for (int64_t pixel = begin; pixel < end; pixel += T)
    point_tile<V, T>(q, std::min(pixel, end - T), group, c);
}

void project(const Projection& q, int64_t pixels, int64_t part, int64_t parts) {
  const Pointwise& p = q.point;
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
    compute(q, begin, end, group, c);
  }
}

void add_to_sums(const Layer& l, const Strip& s, const Task& task, const float* y, float* sums) {
  const int64_t first = s.window + s.skip, end = task.end * l.out_width;
  Vec total = load(sums + first, int(s.lanes));
  for (int64_t pixel = task.begin * l.out_width; pixel < end; ++pixel)
    total += load(y + pixel * l.channels + first, int(s.lanes));
  store(sums + first, total, 0, int(s.lanes));
}

template <typename FetchRow>
void run_wide(const Plan& plan, const Tensors& tensors, const FetchRow& fetch_row, Vec* rings,
              float* sums) {
  const Layer& l = plan.layer;
  in_parallel(l.parts, [&](int64_t part, int64_t worker) {
    float* own = sums ? sums + part * l.channels : nullptr;
    if (own) std::fill(own, own + l.channels, 0.0f);
    for_each_task(plan, part, [&](const Strip& s, const Task& task) {
      convolve(l, s, task, tensors, fetch_row, rings + worker * l.ring);
      if (own) add_to_sums(l, s, task, tensors.y, own);
    });
  });
}

struct BlockSizes {
  int64_t images, apart, workers;  // the first `apart` images: each worker computes its own
  int64_t pixel, residual;         // numbers of x in a pixel; whether x is added to the result
  int64_t wide, gate, share;       // memory: for a wide tensor, a gate, and a worker apart
  PointSizes expand, squeeze, excite, project;
};

struct Block {
  const BlockSizes& sizes;
  Pointwise expand, squeeze, excite, project;
  const float *weight, *bias;  // of the depthwise layer
  const Source* sources;
  const float* x;
  float* y;
};

void find_gate(const Block& b, const Layer& l, const float* sums, float* gate) {
  float *means = gate + l.channels, *squeezed = means + l.channels;
  for (int64_t c = 0; c < l.channels; ++c) {
    float sum = 0;
    for (int64_t part = 0; part < l.parts; ++part) sum += sums[part * l.channels + c];
    means[c] = sum / float(l.out_height * l.out_width);
  }
  project({b.squeeze, means, nullptr, nullptr, squeezed}, 1, 0, 1);
  project({b.excite, squeezed, nullptr, nullptr, gate}, 1, 0, 1);
}

void run_image(const Block& b, const Plan& plan, int64_t image, float* memory) {
  const Layer& l = plan.layer;
  const int64_t pixels = l.out_height * l.out_width;
  const float* x = b.x + image * l.height * l.width * b.sizes.pixel;
  float* y = b.y + image * pixels * b.project.outputs;
  float* wide = memory + l.parts * l.ring * kLanes;
  float* gate = b.squeeze.inputs ? wide + b.sizes.wide : nullptr;
  float* sums = gate ? gate + b.sizes.gate : nullptr;
  const Tensors tensors{b.weight, b.bias, wide};
  Vec* rings = reinterpret_cast<Vec*>(memory);
  if (b.expand.inputs)
    run_wide(plan, tensors, ExpandRow{b.expand, x, plan.strips, b.sources}, rings, sums);
  else run_wide(plan, tensors, CopyRow{x}, rings, sums);
  if (gate) find_gate(b, l, sums, gate);
  const Projection last{b.project, wide, gate, b.sizes.residual ? x : nullptr, y};
  in_parallel(l.parts, [&](int64_t part, int64_t) { project(last, pixels, part, l.parts); });
}

constexpr int64_t kBlockFields = sizeof(BlockSizes) / sizeof(int64_t);

}  // namespace

// The table holds BlockSizes, the plan for one worker, the plan for all, and the Sources.
// The parameters are weight and bias of expand, depthwise, squeeze, excite, project.
extern "C" void inverted_residual(const int64_t* table, const float* const* parameters,
                                  const float* x, float* y, float* memory) {
  const BlockSizes& sizes = *reinterpret_cast<const BlockSizes*>(table);
  const Plan alone = read_plan(table + kBlockFields), together = read_plan(end_of(alone));
  const auto point = [&](const PointSizes& point, int i) {
    return Pointwise{point, parameters[2 * i], parameters[2 * i + 1]};
  };
  const Block block{
      sizes, point(sizes.expand, 0), point(sizes.squeeze, 2), point(sizes.excite, 3),
      point(sizes.project, 4), parameters[2], parameters[3],
      reinterpret_cast<const Source*>(end_of(together)), x, y};
  in_parallel(sizes.workers, [&](int64_t part, int64_t worker) {
    const int64_t each = sizes.apart / sizes.workers;
    for (int64_t image = part * each; image < (part + 1) * each; ++image)
      run_image(block, alone, image, memory + worker * sizes.share);
  });
  for (int64_t image = sizes.apart; image < sizes.images; ++image)
    run_image(block, together, image, memory);
}

// What block_kernel.py must agree with.
extern "C" void block_layout(int64_t* to) {
  to[0] = kBlockFields, to[1] = sizeof(Source) / sizeof(int64_t), to[2] = kPanel;
}
