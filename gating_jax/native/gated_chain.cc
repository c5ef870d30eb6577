// A chain of convolutions on NHWC float32 images, each on the open channels of each example only.
//
// Layout. Pixels lie in the lanes of the vectors, output channels in different registers. A gate
// switches a channel of one example, so it decides about whole vectors: the weights [O][I][taps] of
// an open output channel are one row, read in place, and those of a closed input channel are
// skipped. No weights are packed, however different the examples' masks are. Between convolutions
// the open channels lie in consecutive planes ("compact"), with the next convolution's zero padding
// around the pixels. Rows of a plane share their padding: the zeros to the right of row h are those
// to the left of row h + 1. For a stride s a plane holds its s x s phases one after the other, so
// that each tap reads neighbouring pixels.
//
// Blocking. A register tile is R output channels x a few vectors of pixels (R = 6 x 2 with 16
// registers), summed over all of K = open inputs x taps. The rows of an image are cut into bands
// whose inputs stay in the second-level cache. Groups of R output channels take all tiles of a band
// one after the other, so the group's R K weights stay in the first-level cache (the second-level
// one in wide layers). The band then goes back to NHWC, where shortcut and ReLU are applied.
//
// Threads. The examples of a batch are tasks for the caller and for helpers from XLA's own pool. If
// there are fewer examples than threads, each is cut into bands and slabs of output channels, layer
// by layer. Tasks are claimed by counters, so a helper that comes late, or never, only costs time.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

// Largest number of output channels of a register tile.
constexpr int kMostRows = 8;
// Bytes of a band's inputs: a quarter of the usual second-level cache.
constexpr ptrdiff_t kBandBytes = 128 << 10;
// Smallest number of pixels of a band, since every band reads all weights.
constexpr int kBandPixels = 64;
// Smallest number of output channels of a task.
constexpr int kSlab = 16;

// A vector of pixels of an output plane.
struct Vec {
  // Offsets of its first pixel: in the input's planes, at the first tap, and in the output's
  // planes.
  ptrdiff_t src, dst;
  // Number of lanes to write.
  int lanes;
  // Index of its mask, or -1. A mask is [LANES]: 0 for lanes between the rows, which become 0; else
  // -1.
  int mask;
  // Index of its places, or -1. Places are [LANES] offsets in the output's planes, or -1 for none.
  int scatter;
};

// Up to kMostRows output channels of one example.
struct Group {
  const float* planes;              // of the open input channels
  ptrdiff_t plane;                  // floats from one plane to the next
  const int* open;                  // [channels]: indices of the open input channels
  int channels, taps;
  const ptrdiff_t* offsets;         // [taps], in a plane
  const float* weights[kMostRows];  // [I][taps]
  float bias[kMostRows];
  float* to[kMostRows];             // output planes
  const int32_t* masks;             // of the vectors
  const ptrdiff_t* scatters;
  // Floats from one row to the next, in the input's planes and in the output's.
  ptrdiff_t src_row, dst_row;
  // pairs: whether a vector holds two rows; weighted: whether each output channel is multiplied by
  // its factor, above 0.
  bool relu, pairs, weighted;
  float factors[kMostRows];
};

// The inner loops for one instruction set.
struct Isa {
  int lanes, rows;
  bool pairs;  // whether a vector can be loaded from two places
  void (*convolve)(const Group&, int outputs, const Vec*, int count);
  void (*to_planes)(const float*, ptrdiff_t, int, int, const int*, float*, ptrdiff_t);
  void (*from_planes)(const float*, ptrdiff_t, const int*, int, int, int, int, const float*, bool, float*);
};

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, (__VA_ARGS__)...)
#define PAIRS true
#else
#define PAIRS false
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, M{(__VA_ARGS__)...})
#endif

#define ISA portable
#define TARGET
#define LANES 4
#define ROWS 6
#if defined(__ARM_NEON) || defined(__aarch64__)
#define VECTORS 4  // 32 registers; vectors of 4 are NEON's
#else
#define VECTORS 2
#endif
#include "isa.inc"

#if defined(__x86_64__)
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define VECTORS 2
#include "isa.inc"

#define ISA avx512
#define TARGET __attribute__((target("avx512f")))
#define LANES 16
#define ROWS 8
#define VECTORS 3
#include "isa.inc"
#endif

// Returns the widest vectors of at most `most` lanes (0: any) that this processor has.
const Isa& best_isa(int64_t most) {
#if defined(__x86_64__)
  auto allowed = [&](const Isa& isa) { return most == 0 || isa.lanes <= most; };
  if (allowed(avx512::isa) && __builtin_cpu_supports("avx512f")) return avx512::isa;
  if (allowed(avx2::isa) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::isa;
#endif
  return portable::isa;
}

// Layout of an image's pixels, with `pad` zeros around, in a plane for a convolution of this
// stride.
struct Grid {
  int rows, cols, pad_rows, pad_cols, stride;
  ptrdiff_t row, phase, plane;  // floats of a row, a phase, a plane

  // Offset of pixel (h, w): its phase, then its row and column within the phase.
  ptrdiff_t at(int h, int w) const {
    h += pad_rows, w += pad_cols;
    return (h % stride * stride + w % stride) * phase + h / stride * row + w / stride;
  }
};

// One convolution of the chain.
struct Conv {
  const float *weights, *bias;
  int in, out, window_rows, window_cols, stride, rows, cols;  // rows, cols: of the output
  // pairs: whether a vector holds two rows, each half a vector long.
  bool relu, pairs;
  Grid grid;                       // of the input
  Grid written;                    // of the output
  std::vector<ptrdiff_t> offsets;  // of the taps
  int taps() const { return window_rows * window_cols; }
};

// The vectors of each band of rows.
struct Bands {
  int height, count;
  std::vector<Vec> vecs;
  std::vector<int> first;  // [count + 1], in vecs
  std::vector<int32_t> masks;
  std::vector<ptrdiff_t> scatters;
};

// The open channels of one example, in order.
struct Channels {
  // place: index in `open`, or -1; before: [channels + 1], number of open channels before each.
  std::vector<int> open, place, before;
  // Without gates all channels are open.
  void set(const float* gates, int n) {
    open.clear(), place.assign(n, -1), before.assign(n + 1, 0);
    for (int c = 0; c < n; ++c) {
      before[c] = int(open.size());
      if (!gates || gates[c] > 0) place[c] = int(open.size()), open.push_back(c);
    }
    before[n] = int(open.size());
  }
};

// A call: its arguments, and all that follows from their sizes.
struct Plan {
  const Isa* isa;
  int examples, threads;           // threads that share one example
  std::vector<Conv> convs;
  std::vector<Bands> bands;        // of each convolution
  std::vector<int> slabs;          // number of slabs of each convolution
  // Offsets in the scratch: of each convolution's input planes, then of the last one's output
  // planes.
  std::vector<ptrdiff_t> offsets;
  ptrdiff_t scratch;               // floats
  const float *x, *shortcut;
  float* y;
  bool relu;
  std::vector<const float*> gates;  // [convolutions + 1] of [N, channels], or null
  // Of each convolution: whether the gates of its output multiply it.
  std::vector<bool> weighted;
};

// Lays out an image for a convolution; a row has at least `least_row` floats.
Grid grid_of(int rows, int cols, int window_rows, int window_cols, int stride, ptrdiff_t least_row, int lanes) {
  Grid g{rows, cols, window_rows / 2, window_cols / 2, stride, 0, 0, 0};
  const int high = (rows + 2 * g.pad_rows + stride - 1) / stride, wide = (cols + 2 * g.pad_cols + stride - 1) / stride;
  g.row = std::max<ptrdiff_t>(stride == 1 ? cols + g.pad_cols : wide, least_row);
  // Tiles read lanes behind the last row and drop them.
  g.phase = high * g.row + 2 * g.pad_cols + 2 * lanes;
  g.plane = g.phase * stride * stride;
  return g;
}

// Writes the zeros around the pixels of the planes.
void clear(const Grid& g, float* planes, int count) {
  // The padding is spread over the phases; clearing all is simpler, and strided layers are few.
  if (g.stride > 1) {
    std::memset(planes, 0, sizeof(float) * g.plane * count);
    return;
  }
  for (float* p = planes; count > 0; --count, p += g.plane) {
    float* end = p + (g.rows + g.pad_rows) * g.row;
    std::fill(p, p + g.pad_rows * g.row, 0.0f);
    std::fill(end, end + g.pad_rows * g.row + 2 * g.pad_cols, 0.0f);
    if (g.row > g.cols)
      for (float* r = p + g.pad_rows * g.row; r < end; r += g.row) {
        std::fill(r, r + g.pad_cols, 0.0f);
        std::fill(r + g.pad_cols + g.cols, r + g.row, 0.0f);
      }
  }
}

// Adds the vectors of the output's rows from..to. They are pairs of rows; or the vectors of each
// row alone, the last one moved back so that it is full; or those of all rows with the padding
// between them, where these are fewer.
void add_vectors(const Conv& conv, int from, int to, int lanes, Bands& bands) {
  const Grid& written = conv.written;
  if (conv.pairs) {
    for (int h = from; h < to; h += 2)
      bands.vecs.push_back({h * conv.grid.row, written.at(h, 0), h + 1 < to ? lanes : conv.cols, -1, -1});
    return;
  }
  const ptrdiff_t row = conv.grid.row, flat = (to - from - 1) * row + conv.cols;
  const int per_row = (conv.cols + lanes - 1) / lanes;
  const bool same_rows = written.stride == 1 && written.row == row;
  // Notes the places of n pixels from flat position q on.
  const auto scatter = [&](ptrdiff_t q, int n) {
    for (int i = 0; i < lanes; ++i, ++q)
      bands.scatters.push_back(i < n && q % row < conv.cols ? written.at(int(q / row), int(q % row)) : -1);
    return int(bands.scatters.size()) - lanes;
  };
  if ((flat + lanes - 1) / lanes < (to - from) * per_row && (same_rows || conv.cols < lanes)) {
    for (ptrdiff_t q = 0; q < flat; q += lanes) {
      const int n = int(std::min<ptrdiff_t>(lanes, flat - q));
      Vec vec{from * row + q, written.at(from, 0) + q, n, -1, -1};
      if (!same_rows) {
        vec.scatter = scatter(vec.src, n);
      } else if (q % row + n > conv.cols) {
        vec.mask = int(bands.masks.size());
        for (int i = 0; i < lanes; ++i) bands.masks.push_back((q + i) % row < conv.cols ? -1 : 0);
      }
      bands.vecs.push_back(vec);
    }
    return;
  }
  for (int h = from; h < to; ++h)
    for (int i = 0; i < per_row; ++i) {
      const int w = conv.cols < lanes ? 0 : std::min(i * lanes, conv.cols - lanes), n = std::min(lanes, conv.cols);
      Vec vec{h * row + w, written.at(h, w), n, -1, -1};
      if (written.stride > 1) vec.scatter = scatter(vec.src, n);
      bands.vecs.push_back(vec);
    }
}

// Cuts the rows of a convolution's output into bands and these into vectors.
Bands bands_of(const Conv& conv, int lanes, int threads) {
  Bands bands;
  const ptrdiff_t row_bytes = sizeof(float) * conv.in * conv.stride * conv.stride * conv.grid.row;
  int height = int(std::max<ptrdiff_t>(kBandBytes / row_bytes - 2, (kBandPixels + conv.cols - 1) / conv.cols));
  // Two bands per thread, if the image is large enough, so that threads finish together.
  if (threads > 1) height = std::min(height, std::max(conv.rows / (2 * threads), (kBandPixels + conv.cols - 1) / conv.cols));
  height = std::clamp(height, 1, conv.rows);
  bands.count = (conv.rows + height - 1) / height;
  bands.height = (conv.rows + bands.count - 1) / bands.count;
  // No pair of rows may lie in two bands.
  if (conv.pairs) bands.height += bands.height % 2;
  bands.count = (conv.rows + bands.height - 1) / bands.height;
  bands.vecs.reserve(conv.rows * ((conv.cols + lanes - 1) / lanes));
  for (int b = 0; b < bands.count; ++b) {
    bands.first.push_back(int(bands.vecs.size()));
    add_vectors(conv, b * bands.height, std::min(conv.rows, (b + 1) * bands.height), lanes, bands);
  }
  bands.first.push_back(int(bands.vecs.size()));
  return bands;
}

// The work of one example, on its own scratch: all of `enter`, then all of each convolution in
// turn.
class Example {
 public:
  Example(const Plan& plan, int n, float* scratch) : plan_(plan), n_(n), scratch_(scratch), channels_(plan.gates.size()) {
    for (size_t i = 0; i < channels_.size(); ++i) {
      const int size = i ? plan.convs[i - 1].out : plan.convs[0].in;
      channels_[i].set(plan.gates[i] ? plan.gates[i] + ptrdiff_t(n) * size : nullptr, size);
    }
  }

  // Does part `part` of `parts`: copies the open channels of x to planes, and writes the zeros
  // around the planes between convolutions.
  void enter(int part, int parts) const {
    const Conv& conv = plan_.convs[0];
    const Grid& g = conv.grid;
    const auto share = [&](int total, int i) { return int(int64_t(total) * i / parts); };
    for (size_t i = 1; i < plan_.convs.size(); ++i) {
      const Grid& hidden = plan_.convs[i].grid;
      const int count = int(channels_[i].open.size()), from = share(count, part);
      clear(hidden, scratch_ + plan_.offsets[i] + from * hidden.plane, share(count, part + 1) - from);
    }
    const int lanes = plan_.isa->lanes, blocks = std::max(1, conv.in / lanes);
    const int from = share(blocks, part) * lanes, to = part + 1 == parts ? conv.in : share(blocks, part + 1) * lanes;
    const Channels& in = channels_[0];
    float* planes = scratch_ + plan_.offsets[0];
    clear(g, planes + in.before[from] * g.plane, in.before[to] - in.before[from]);
    const float* x = plan_.x + ptrdiff_t(n_) * g.rows * g.cols * conv.in + from;
    if (from == to) return;
    for (int h = 0; h < g.rows; ++h) {
      // No tap reads this row.
      if ((h + g.pad_rows) % g.stride >= conv.window_rows) continue;
      for (int w = 0; w < std::min(g.stride, g.cols); ++w)
        if ((w + g.pad_cols) % g.stride < conv.window_cols)
          plan_.isa->to_planes(x + (ptrdiff_t(h) * g.cols + w) * conv.in, ptrdiff_t(g.stride) * conv.in,
                               (g.cols - w + g.stride - 1) / g.stride, to - from, in.place.data() + from,
                               planes + g.at(h, w), g.plane);
    }
  }

  // Computes a band of rows and a slab of output channels of a convolution.
  void convolve(int layer, int task) const {
    const Conv& conv = plan_.convs[layer];
    const Bands& bands = plan_.bands[layer];
    const Channels &in = channels_[layer], &out = channels_[layer + 1];
    const int slabs = plan_.slabs[layer], band = task / slabs, slab = task % slabs, lanes = plan_.isa->lanes;
    const int rows = plan_.isa->rows, blocks = std::max(1, conv.out / lanes);
    const int from = blocks * slab / slabs * lanes, to = slab + 1 == slabs ? conv.out : blocks * (slab + 1) / slabs * lanes;
    // The open channels of the slab, in groups of nearly the same size.
    const int first = out.before[from], count = out.before[to] - first, groups = (count + rows - 1) / rows;
    float* written = scratch_ + plan_.offsets[layer + 1];
    const Vec* vecs = bands.vecs.data() + bands.first[band];
    Group g{scratch_ + plan_.offsets[layer], conv.grid.plane, in.open.data(), int(in.open.size()), conv.taps(),
            conv.offsets.data(), {}, {}, {}, bands.masks.data(), bands.scatters.data(),
            conv.grid.row, conv.written.row, conv.relu, conv.pairs, plan_.weighted[layer], {}};
    const float* weights = g.weighted ? plan_.gates[layer + 1] + ptrdiff_t(n_) * conv.out : nullptr;
    for (int i = 0; i < groups; ++i) {
      const int begin = first + count * i / groups, end = first + count * (i + 1) / groups;
      for (int j = begin; j < end; ++j) {
        const ptrdiff_t o = out.open[j];
        g.weights[j - begin] = conv.weights + o * conv.in * conv.taps();
        g.bias[j - begin] = conv.bias[o];
        if (weights) g.factors[j - begin] = weights[o];
        g.to[j - begin] = written + j * conv.written.plane;
      }
      plan_.isa->convolve(g, end - begin, vecs, bands.first[band + 1] - bands.first[band]);
    }
    if (layer + 1 == int(plan_.convs.size())) leave(band, from, to);
  }

 private:
  // Writes channels from..to of a band to y, in NHWC, with shortcut and ReLU.
  void leave(int band, int from, int to) const {
    const Conv& conv = plan_.convs.back();
    const int height = plan_.bands.back().height, end = std::min(conv.rows, (band + 1) * height);
    for (int h = band * height; h < end; ++h) {
      const ptrdiff_t at = (ptrdiff_t(n_) * conv.rows + h) * conv.cols * conv.out;
      plan_.isa->from_planes(scratch_ + plan_.offsets.back() + conv.written.at(h, 0), conv.written.plane,
                             channels_.back().place.data(), conv.cols, conv.out, from, to,
                             plan_.shortcut ? plan_.shortcut + at : nullptr, plan_.relu, plan_.y + at);
    }
  }

  const Plan& plan_;
  int n_;
  float* scratch_;
  std::vector<Channels> channels_;
};

// Fills in the parts of a plan that follow from the sizes.
void lay_out(Plan& plan, int rows, int cols) {
  const int lanes = plan.isa->lanes, count = int(plan.convs.size());
  for (Conv& c : plan.convs) {
    c.grid.rows = rows, c.grid.cols = cols;
    rows = (rows + c.window_rows / 2 * 2 - c.window_rows) / c.stride + 1;
    cols = (cols + c.window_cols / 2 * 2 - c.window_cols) / c.stride + 1;
    c.rows = rows, c.cols = cols;
  }
  // Two rounds: rows of equal length on both sides of a convolution let vectors run over the ends
  // of rows, and a row's length may depend on either side.
  for (int round = 0; round < 2; ++round)
    for (int i = count - 1; i >= 0; --i) {
      Conv& c = plan.convs[i];
      ptrdiff_t least = c.cols;
      if (i + 1 < count && plan.convs[i + 1].stride == 1) least = std::max(least, plan.convs[i + 1].grid.row);
      if (round && i > 0 && c.stride == 1) least = std::max(least, plan.convs[i - 1].grid.row);
      c.grid = grid_of(c.grid.rows, c.grid.cols, c.window_rows, c.window_cols, c.stride, least, lanes);
    }
  plan.scratch = 0;
  for (int i = 0; i < count; ++i) {
    Conv& c = plan.convs[i];
    c.relu = i + 1 < count;
    c.written = i + 1 < count ? plan.convs[i + 1].grid : grid_of(c.rows, c.cols, 1, 1, 1, c.grid.row, lanes);
    for (int a = 0; a < c.window_rows; ++a)
      for (int b = 0; b < c.window_cols; ++b)
        c.offsets.push_back(c.grid.at(a - c.grid.pad_rows, b - c.grid.pad_cols));
    c.pairs = plan.isa->pairs && 2 * c.cols == lanes && c.taps() == 9 && c.written.stride == 1;
    // Two tasks per thread: if the bands are too few, they are cut into slabs of output channels.
    plan.bands.push_back(bands_of(c, lanes, plan.threads));
    const int wanted = plan.threads > 1 ? (2 * plan.threads + plan.bands.back().count - 1) / plan.bands.back().count : 1;
    plan.slabs.push_back(std::clamp(wanted, 1, std::max(1, c.out / std::max(kSlab, lanes))));
    plan.offsets.push_back(plan.scratch);
    plan.scratch += c.grid.plane * c.in;
  }
  plan.offsets.push_back(plan.scratch);
  plan.scratch += plan.convs.back().written.plane * plan.convs.back().out;
}

// Tasks in phases, one phase after the other. A caller of `work` claims tasks until none is left.
struct Team {
  std::vector<int> tasks;  // of each phase
  std::function<void(int phase, int task)> run;
  std::unique_ptr<std::atomic<int>[]> claimed, done;
  std::atomic<bool> failed{false};

  void work() {
    for (size_t phase = 0; phase < tasks.size(); ++phase) {
      for (int task; (task = claimed[phase].fetch_add(1, std::memory_order_relaxed)) < tasks[phase];) {
        try {
          run(int(phase), task);
        } catch (...) {
          failed = true;
        }
        done[phase].fetch_add(1, std::memory_order_acq_rel);
      }
      // Waits for the tasks of others by spinning: they take microseconds, less than a wake-up.
      for (int spins = 0; done[phase].load(std::memory_order_acquire) < tasks[phase]; ++spins)
        if (spins > 4096) std::this_thread::yield();
    }
  }
};

// Runs all tasks; returns true if none threw. A helper that starts after the caller has left finds
// no task to claim.
template <typename Run>
bool in_phases(ffi::ThreadPool& pool, int threads, std::vector<int> tasks, Run run) {
  auto team = std::make_shared<Team>();
  team->claimed.reset(new std::atomic<int>[tasks.size()]());
  team->done.reset(new std::atomic<int>[tasks.size()]());
  team->run = run;
  team->tasks = std::move(tasks);
  const int most = *std::max_element(team->tasks.begin(), team->tasks.end());
  try {
    for (int i = 1; i < std::min(threads, most); ++i) pool.Schedule([team] { team->work(); });
  } catch (...) {
    // The caller does all tasks that no helper does.
  }
  team->work();
  return !team->failed;
}

// Returns the thread's scratch, which is kept for its next call: fresh memory from the system costs
// more than a small convolution.
float* scratch(ptrdiff_t floats) {
  constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kAlign); }
  };
  thread_local std::unique_ptr<float[], Free> memory;
  thread_local ptrdiff_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(::operator new[](sizeof(float) * floats, kAlign)));
    size = floats;
  }
  return memory.get();
}

// Runs a plan; returns true if no task threw.
bool run(Plan& plan, ffi::ThreadPool& pool, int threads) {
  const int count = int(plan.convs.size());
  // Enough examples: each is one task, on the scratch of the thread that claims it.
  if (plan.threads == 1)
    return in_phases(pool, threads, {plan.examples}, [&](int, int n) {
      const Example example(plan, n, scratch(plan.scratch));
      example.enter(0, 1);
      for (int i = 0; i < count; ++i)
        for (int task = 0; task < plan.bands[i].count * plan.slabs[i]; ++task) example.convolve(i, task);
    });
  // Few examples: all threads work on one at a time, on the caller's scratch.
  float* shared = scratch(plan.scratch);
  for (int n = 0; n < plan.examples; ++n) {
    const Example example(plan, n, shared);
    std::vector<int> tasks = {std::clamp(plan.convs[0].in / plan.isa->lanes, 1, 2 * threads)};
    for (int i = 0; i < count; ++i) tasks.push_back(plan.bands[i].count * plan.slabs[i]);
    const auto step = [&](int phase, int task) {
      if (phase == 0)
        example.enter(task, tasks[0]);
      else
        example.convolve(phase - 1, task);
    };
    if (!in_phases(pool, threads, tasks, step)) return false;
  }
  return true;
}

// The call from XLA. Arguments: x, kernels [O, I, h, w], biases, the gates that `gated` announces,
// and the shortcut if `shortcut`. Gates choose channels where they are above 0; those of the outputs
// of convolutions that `weighted` announces also multiply them.
ffi::Error gated_chain(ffi::ThreadPool pool, Floats x, ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> y,
                       ffi::Span<const int64_t> strides, ffi::Span<const int64_t> gated,
                       ffi::Span<const int64_t> weighted, int64_t relu, int64_t shortcut, int64_t isa) try {
  const size_t count = strides.size();
  size_t next = 0;
  bool complete = true;
  const auto take = [&]() -> Floats {
    auto got = rest.get<Floats>(next++);
    complete &= got.has_value();
    return got.has_value() ? *got : x;
  };
  Plan plan;
  plan.isa = &best_isa(isa);
  const auto shape = x.dimensions();
  plan.examples = int(shape[0]);
  plan.x = x.typed_data(), plan.y = y->typed_data(), plan.relu = relu != 0;
  for (size_t i = 0; i < count; ++i) {
    const Floats kernel = take();
    const auto k = kernel.dimensions();
    Conv conv{};
    conv.weights = kernel.typed_data(), conv.stride = int(strides[i]);
    conv.out = int(k[0]), conv.in = int(k[1]), conv.window_rows = int(k[2]), conv.window_cols = int(k[3]);
    plan.convs.push_back(conv);
  }
  for (size_t i = 0; i < count; ++i) plan.convs[i].bias = take().typed_data();
  for (size_t i = 0; i <= count; ++i) plan.gates.push_back(gated[i] ? take().typed_data() : nullptr);
  for (size_t i = 0; i < count; ++i) plan.weighted.push_back(weighted[i] != 0 && plan.gates[i + 1]);
  plan.shortcut = shortcut ? take().typed_data() : nullptr;
  if (!complete || next != rest.size()) return ffi::Error::InvalidArgument("gated_chain: wrong number of arguments");
  if (plan.examples == 0) return ffi::Error::Success();
  const int threads = std::max(1, int(std::min<int64_t>(pool.num_threads(), std::thread::hardware_concurrency())));
  plan.threads = plan.examples < threads ? threads : 1;
  lay_out(plan, int(shape[1]), int(shape[2]));
  return run(plan, pool, threads) ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory");
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the scratch of gated_chain");
}

}  // namespace

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* gating_jax_gated_chain(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(gating_jax_gated_chain, gated_chain,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<ffi::Span<const int64_t>>("gated")
                                  .Attr<ffi::Span<const int64_t>>("weighted")
                                  .Attr<int64_t>("relu")
                                  .Attr<int64_t>("shortcut")
                                  .Attr<int64_t>("isa"));
