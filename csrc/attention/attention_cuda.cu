// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Attention on the GPU: which kernel runs, with what, and the kernels that need no tensor core.
//
//   D <= 128, 16-bit or fp32   attention_tile.cuh. Forward: a CTA 64 rows (16, 32, 48 where there are no more); keys are split over CTAs
//                              where these would not fill the device. Backward: up to 64 rows that share no keys with another head go
//                              through grad_few, the rest through delta, grad_rows, grad_keys.
//   else (fp64, wider heads)   a warp a row (or key), straight from the definition: correct, not fast.
//
// join_* put split results together, merge_* are merge_attention; a warp a row.
#include "attention_tile.cuh"

namespace mmfast {
namespace {

constexpr float kInf = __builtin_inff();
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration

__device__ int lane_id() { return int(threadIdx.x) % 32; }
__device__ int64_t warp_index() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; }
// Row i of head h of sequence b; the launchers see to it that indices fit 32 bits, whose division is a few instructions.
struct RowIndex {
  int64_t i, h, b;
  template <class Args>
  __device__ RowIndex(const Args& a, int64_t index)
      : i(unsigned(index) % unsigned(a.Nq)),
        h(unsigned(index) / unsigned(a.Nq) % unsigned(a.H)),
        b(unsigned(index) / unsigned(a.Nq) / unsigned(a.H)) {}
};
dim3 warp_grid(int64_t warps, int64_t y = 1) { return dim3(unsigned(ceil_div(warps, kWarps)), unsigned(y)); }

// ---- plain kernels, sums in fp32 (fp64 for fp64)

template <DType kType>
using Sum = std::conditional_t<kType == DType::f64, double, float>;

template <DType kType>
__device__ Sum<kType> load(const void* data, int64_t i) {
  if constexpr (kType == DType::f64) return static_cast<const double*>(data)[i];
  else return load_float(data, kType, i);
}
template <DType kType>
__device__ void put(void* data, int64_t i, Sum<kType> v) {
  if constexpr (kType == DType::f64) static_cast<double*>(data)[i] = v;
  else if constexpr (kType == DType::f32) static_cast<float*>(data)[i] = v;
  else static_cast<uint16_t*>(data)[i] = kType == DType::f16 ? float_to_f16(v) : float_to_bf16(v);
}
__device__ float exp_of(float x) { return expf(x); }
__device__ double exp_of(double x) { return exp(x); }
__device__ float log_of(float x) { return logf(x); }
__device__ double log_of(double x) { return log(x); }

__device__ int64_t offset_of(const AttentionTensor& t, int64_t b, int64_t n, int64_t h) {
  return b * t.stride_b + n * t.stride_n + h * t.stride_h;
}

// One head of one sequence.
template <DType kType>
struct Plain {
  using Acc = Sum<kType>;
  const AttentionArgs& a;
  int64_t b, h, g;
  AttentionSequence seq;
  Acc factor;  // of what dropout keeps
  __device__ Plain(const AttentionArgs& args, int64_t b_, int64_t h_)
      : a(args),
        b(b_),
        h(h_),
        g(unsigned(h_) / (unsigned(args.H) / unsigned(args.G))),
        seq(attention_sequence(args, b_)),
        factor(Acc(65536) / Acc(65536u - args.dropout_threshold)) {}

  __device__ int64_t row(const AttentionTensor& t, int64_t i) const { return offset_of(t, b, seq.q_begin + i, h); }
  __device__ int64_t key(const AttentionTensor& t, int segment, int64_t j) const {
    return offset_of(t, b, (segment ? 0 : seq.k_begin) + j, g);
  }
  __device__ int64_t lse_at(int64_t i) const { return b * a.lse_stride_b + h * a.lse_stride_h + seq.q_begin + i; }

  __device__ Acc dot(const AttentionTensor& x, int64_t at_x, const AttentionTensor& y, int64_t at_y) const {
    Acc sum = 0;
#pragma unroll 1
    for (int64_t base = 0; base < a.D; base += 32) {
      const int64_t d = base + lane_id();
      if (d < a.D) sum += load<kType>(x.data, at_x + d) * load<kType>(y.data, at_y + d);
    }
    return warp_sum(sum);
  }
  __device__ Acc score(int64_t i, int segment, int64_t j) const {
    return Acc(a.scale) * dot(a.q, row(a.q, i), segment ? a.k2 : a.k1, key(segment ? a.k2 : a.k1, segment, j));
  }
  __device__ bool real(int segment, int64_t j) const { return !segment || !a.key2_valid || a.key2_valid[b * a.N2 + j]; }
  __device__ Acc keep(int64_t i, int segment, int64_t j) const {
    if (!a.dropout_threshold) return 1;
    return attention_random(*a.seed, b * a.H + h, i, j, segment) >= a.dropout_threshold ? factor : Acc(0);
  }
  // f(segment, j) for each key that row i sees.
  template <class F>
  __device__ __forceinline__ void each_key(int64_t i, F f) const {
    const AttentionRow seen = attention_row(a, b, i);
    const int64_t first = seen.end1 - seen.begin1;
    for (int64_t n = 0; n < first + seen.end2; ++n) {
      const int segment = n >= first;
      const int64_t j = segment ? n - first : seen.begin1 + n;
      if (real(segment, j)) f(segment, j);
    }
  }
  __device__ Acc delta(const AttentionBackwardArgs& args, int64_t i) const {
    const Acc sum = args.grad_out.data ? dot(a.out, row(a.out, i), args.grad_out, row(args.grad_out, i)) : Acc(0);
    return args.grad_lse ? sum - static_cast<const Acc*>(args.grad_lse)[lse_at(i)] : sum;
  }
  // The gradient of score (i, j), given the row's lse and delta.
  __device__ Acc slope(const AttentionBackwardArgs& args, int64_t i, int segment, int64_t j, Acc weight, Acc kept, Acc row_delta) const {
    const AttentionTensor& v = segment ? a.v2 : a.v1;
    const Acc dp = args.grad_out.data ? dot(args.grad_out, row(args.grad_out, i), v, key(v, segment, j)) : Acc(0);
    return weight * (dp * kept - row_delta) * Acc(a.scale);
  }
};

// Columns 128 y + lane + 32 u of a row, u = 0 .. 3, one register each; y is the block's second index.
constexpr int kPlainColumns = 128;
template <DType kType>
struct Columns {
  using Acc = Sum<kType>;
  static constexpr int kRun = 4, kStep = kPlainColumns;
  Acc v[kRun] = {};
  const AttentionArgs& a;
  int64_t base;
  __device__ explicit Columns(const AttentionArgs& args) : a(args), base(int64_t(blockIdx.y) * kStep + lane_id()) {}
  __device__ void add(Acc factor, const AttentionTensor& t, int64_t at) {
    for (int u = 0; u < kRun; ++u)
      if (base + 32 * u < a.D) v[u] += factor * load<kType>(t.data, at + base + 32 * u);
  }
  __device__ void store(const AttentionTensor& t, int64_t at) const {
    for (int u = 0; u < kRun; ++u)
      if (base + 32 * u < a.D) put<kType>(t.data, at + base + 32 * u, v[u]);
  }
};

template <DType kType>
__global__ void __launch_bounds__(kThreads) plain_forward_kernel(const __grid_constant__ AttentionArgs a) {
  using Acc = Sum<kType>;
  const int64_t index = warp_index();
  if (index >= a.B * a.H * a.Nq) return;
  const RowIndex at(a, index);
  const int64_t i = at.i;
  const Plain<kType> p(a, at.b, at.h);
  if (i >= p.seq.q_count) return;
  Acc top = -kInf, total = 0;
  p.each_key(i, [&](int segment, int64_t j) {
    const Acc s = p.score(i, segment, j), most = s > top ? s : top;
    total = total * (top == -kInf ? Acc(0) : exp_of(top - most)) + exp_of(s - most);
    top = most;
  });
  const Acc lse = total == 0 ? Acc(-kInf) : top + log_of(total);
  Columns<kType> out(a);
  p.each_key(i, [&](int segment, int64_t j) {
    const AttentionTensor& v = segment ? a.v2 : a.v1;
    out.add(exp_of(p.score(i, segment, j) - lse) * p.keep(i, segment, j), v, p.key(v, segment, j));
  });
  out.store(a.out, p.row(a.out, i));
  if (lane_id() == 0 && blockIdx.y == 0) static_cast<Acc*>(a.lse)[p.lse_at(i)] = lse;
}

template <DType kType>
__global__ void __launch_bounds__(kThreads, 4) plain_grad_rows_kernel(const __grid_constant__ AttentionBackwardArgs args) {
  using Acc = Sum<kType>;
  const AttentionArgs& a = args.forward;
  const int64_t index = warp_index();
  if (index >= a.B * a.H * a.Nq) return;
  const RowIndex at(a, index);
  const int64_t i = at.i;
  const Plain<kType> p(a, at.b, at.h);
  if (i >= p.seq.q_count) return;
  const Acc lse = static_cast<const Acc*>(a.lse)[p.lse_at(i)], delta = p.delta(args, i);
  Columns<kType> grad(a);
  p.each_key(i, [&](int segment, int64_t j) {
    const AttentionTensor& k = segment ? a.k2 : a.k1;
    const Acc weight = exp_of(p.score(i, segment, j) - lse);
    grad.add(p.slope(args, i, segment, j, weight, p.keep(i, segment, j), delta), k, p.key(k, segment, j));
  });
  grad.store(args.grad_q, p.row(args.grad_q, i));
}

// A warp a key of a segment: all rows of the heads that share it.
template <DType kType>
__global__ void __launch_bounds__(kThreads) plain_grad_keys_kernel(const __grid_constant__ AttentionBackwardArgs args) {
  using Acc = Sum<kType>;
  const AttentionArgs& a = args.forward;
  const int64_t keys = a.N1 + a.N2, index = warp_index();
  if (index >= a.B * a.G * keys) return;
  const unsigned key = unsigned(index) % unsigned(keys), head = unsigned(index) / unsigned(keys);
  const int segment = key >= a.N1;
  const int64_t j = key - (segment ? a.N1 : 0), g = head % unsigned(a.G), b = head / unsigned(a.G);
  const int64_t group = unsigned(a.H) / unsigned(a.G);
  const Plain<kType> first(a, b, g * group);
  if (!segment && j >= first.seq.k_count) return;
  const AttentionTensor &grad_k = segment ? args.grad_k2 : args.grad_k1, &grad_v = segment ? args.grad_v2 : args.grad_v1;
  Columns<kType> dk(a), dv(a);
  const int64_t rows = first.real(segment, j) ? group * first.seq.q_count : 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = unsigned(r) % unsigned(first.seq.q_count);
    const AttentionRow seen = attention_row(a, b, i);
    if (segment ? j >= seen.end2 : j < seen.begin1 || j >= seen.end1) continue;
    const Plain<kType> p(a, b, g * group + unsigned(r) / unsigned(first.seq.q_count));
    const Acc weight = exp_of(p.score(i, segment, j) - static_cast<const Acc*>(a.lse)[p.lse_at(i)]), kept = p.keep(i, segment, j);
    dk.add(p.slope(args, i, segment, j, weight, kept, p.delta(args, i)), a.q, p.row(a.q, i));
    if (args.grad_out.data) dv.add(weight * kept, args.grad_out, p.row(args.grad_out, i));
  }
  dk.store(grad_k, first.key(grad_k, segment, j));
  dv.store(grad_v, first.key(grad_v, segment, j));
}

// ---- results of split keys put together

// Column lane + 32 u of a row, summed over the runs in their order; weight: lane s has that of run s, of which there are at most 32.
constexpr int kJoinColumns = kAttentionMaxWidth / 32;
__device__ void join_columns(const AttentionPlan& p, int64_t rows, int64_t row, int64_t D, float weight, float (&sum)[kJoinColumns]) {
#pragma unroll 4
  for (int s = 0; s < p.splits; ++s) {
    const float* part = p.part_out + (s * rows + row) * D;
    const float w = __shfl_sync(kFullWarp, weight, s);
#pragma unroll
    for (int u = 0; u < kJoinColumns; ++u)
      if (lane_id() + 32 * u < D) sum[u] += w * part[lane_id() + 32 * u];
  }
}

__global__ void __launch_bounds__(kThreads) join_out_kernel(AttentionArgs a, AttentionPlan p) {
  const int64_t rows = a.B * a.H * a.Nq, index = warp_index();
  if (index >= rows) return;
  const RowIndex at(a, index);
  const int64_t i = at.i, h = at.h, b = at.b;
  const AttentionSequence seq = attention_sequence(a, b);
  if (i >= seq.q_count) return;
  const float* state = p.part_state + 2 * (lane_id() * rows + index);
  const bool mine = lane_id() < p.splits;
  const float highest = mine ? state[0] : -kInf, top = warp_max(highest), base = top == -kInf ? 0.0f : top;
  const float weight = exp2f(highest - base), total = warp_sum(mine ? weight * state[1] : 0.0f), inverse = total == 0 ? 0.0f : 1.0f / total;
  float sum[kJoinColumns] = {};
  join_columns(p, rows, index, a.D, weight, sum);
  const int64_t to = offset_of(a.out, b, seq.q_begin + i, h) + lane_id();
  for (int u = 0; u < kJoinColumns; ++u)
    if (lane_id() + 32 * u < a.D) store_double(a.out.data, a.dtype, to + 32 * u, double(sum[u] * inverse));
  if (lane_id() == 0)
    static_cast<float*>(a.lse)[b * a.lse_stride_b + h * a.lse_stride_h + seq.q_begin + i] =
        total == 0 ? -kInf : (top + log2f(total)) * 0.6931471805599453f;
}

__global__ void __launch_bounds__(kThreads) join_grad_kernel(AttentionBackwardArgs args, AttentionPlan p) {
  const AttentionArgs& a = args.forward;
  const int64_t rows = a.B * a.H * a.Nq, index = warp_index();
  if (index >= rows) return;
  const RowIndex at(a, index);
  const int64_t i = at.i, h = at.h, b = at.b;
  const AttentionSequence seq = attention_sequence(a, b);
  if (i >= seq.q_count) return;
  float sum[kJoinColumns] = {};
  join_columns(p, rows, index, a.D, 1.0f, sum);
  const int64_t to = offset_of(args.grad_q, b, seq.q_begin + i, h) + lane_id();
  for (int u = 0; u < kJoinColumns; ++u)
    if (lane_id() + 32 * u < a.D) store_double(args.grad_q.data, a.dtype, to + 32 * u, double(sum[u] * float(a.scale)));
}

// ---- merge_attention, forward and backward (the latter when grad_out_a is there)

__global__ void __launch_bounds__(kThreads) merge_kernel(AttentionMergeArgs a) {
  const int64_t index = warp_index();
  if (index >= a.B * a.H * a.Nq) return;
  const RowIndex at_row(a, index);
  const int64_t n = at_row.i, h = at_row.h, b = at_row.b;
  const DType wide = a.dtype == DType::f64 ? DType::f64 : DType::f32;
  const double lse_a = load_double(a.lse_a, wide, index), lse_b = load_double(a.lse_b, wide, index), top = lse_a > lse_b ? lse_a : lse_b;
  const bool none = top == -double(kInf);
  const double ea = none ? 0.0 : exp(lse_a - top), eb = none ? 0.0 : exp(lse_b - top), total = none ? 1.0 : ea + eb;
  const double wa = ea / total, wb = eb / total;
  const int64_t at_a = offset_of(a.out_a, b, n, h), at_b = offset_of(a.out_b, b, n, h), at = offset_of(a.out, b, n, h);
  if (!a.grad_out_a.data) {
    for (int64_t d = lane_id(); d < a.D; d += 32)
      store_double(a.out.data, a.dtype, at + d,
                   wa * load_double(a.out_a.data, a.dtype, at_a + d) + wb * load_double(a.out_b.data, a.dtype, at_b + d));
    if (lane_id() == 0) store_double(a.lse, wide, index, none ? top : top + log(total));
    return;
  }
  // d out_a = w_a g,  d lse_a = w_a (g.(out_a - out) + d lse), and so for b.
  double dot_a = 0, dot_b = 0;
  for (int64_t d = lane_id(); d < a.D; d += 32) {
    const double g = a.grad_out.data ? load_double(a.grad_out.data, a.dtype, offset_of(a.grad_out, b, n, h) + d) : 0.0;
    const double out = load_double(a.out.data, a.dtype, at + d);
    dot_a += g * (load_double(a.out_a.data, a.dtype, at_a + d) - out);
    dot_b += g * (load_double(a.out_b.data, a.dtype, at_b + d) - out);
    store_double(a.grad_out_a.data, a.dtype, offset_of(a.grad_out_a, b, n, h) + d, wa * g);
    store_double(a.grad_out_b.data, a.dtype, offset_of(a.grad_out_b, b, n, h) + d, wb * g);
  }
  dot_a = warp_sum(dot_a), dot_b = warp_sum(dot_b);
  const double grad_lse = a.grad_lse ? load_double(a.grad_lse, wide, index) : 0.0;
  if (lane_id() == 0) {
    store_double(a.grad_lse_a, wide, index, wa == 0 ? 0.0 : wa * (dot_a + grad_lse));
    store_double(a.grad_lse_b, wide, index, wb == 0 ? 0.0 : wb * (dot_b + grad_lse));
  }
}

// ---- plans

bool is_plain(const AttentionArgs& a) { return a.dtype == DType::f64 || a.D > kAttentionMaxWidth; }

bool on_bytes(const AttentionArgs& a, const AttentionTensor& t, int64_t bytes) {
  const int64_t size = dtype_size(a.dtype);
  return !t.data || (reinterpret_cast<uintptr_t>(t.data) % bytes == 0 && t.stride_b * size % bytes == 0 && t.stride_n * size % bytes == 0 &&
                     t.stride_h * size % bytes == 0);
}
template <class... Tensors>
bool all_on_bytes(const AttentionArgs& a, int64_t bytes, const Tensors&... t) {
  return a.D * dtype_size(a.dtype) % bytes == 0 && (on_bytes(a, t, bytes) && ...);
}

struct Planner {
  AttentionPlan plan{};
  Carver carve;
  size_t row_bytes;
  int keys;  // of a streamed tile

  Planner(const AttentionArgs& a, void* workspace, bool backward) : carve(workspace) {
    const bool f32 = a.dtype == DType::f32;
    row_bytes = size_t(attention_row_bytes(f32, attention_width(a.D)));
    keys = attention_tile_keys(f32, backward);
    plan.c = float(a.scale * 1.4426950408889634);
    plan.warps = int(a.Nq < 64 ? ceil_div(a.Nq, 16) : 4);
    plan.splits = 1;
  }
  // Rows of a CTA whose shared memory takes bytes(warps).
  template <class Bytes>
  void own_rows(const AttentionArgs& a, Bytes bytes) {
    while (plan.warps > 1 && bytes(plan.warps) > shared_memory_limit()) plan.warps = (plan.warps + 1) / 2;
    plan.shared = bytes(plan.warps);
    plan.tiles = int(ceil_div(a.Nq, 16 * plan.warps));
  }
  // Runs of at least two tiles of keys, when there are too few CTAs for the device without.
  void split(const AttentionArgs& a) {
    const int64_t ctas = a.B * a.H * plan.tiles, most = (ceil_div(a.N1, keys) + ceil_div(a.N2, keys)) / 2,
                  slots = 2 * multiprocessor_count();
    if (ctas * 4 >= slots * 3 || most < 2) return;
    const int64_t wanted = ceil_div(slots, ctas);
    plan.splits = int(wanted < most ? wanted : most);
    plan.splits = plan.splits < 32 ? plan.splits : 32;
    plan.part_out = carve.take<float>(plan.splits * a.B * a.H * a.Nq * a.D);
  }
};

Planner plan_forward(const AttentionArgs& a, void* workspace) {
  Planner p(a, workspace, false);
  if (is_plain(a)) return p;
  p.plan.aligned = all_on_bytes(a, 16, a.q, a.k1, a.v1, a.k2, a.v2);
  p.plan.pairs = all_on_bytes(a, 2 * dtype_size(a.dtype), a.out);
  p.own_rows(a, [&](int warps) { return p.row_bytes * size_t(16 * warps + 4 * p.keys); });
  p.split(a);
  if (p.plan.splits > 1) p.plan.part_state = p.carve.take<float>(p.plan.splits * a.B * a.H * a.Nq * 2);
  return p;
}

// How backward goes. few: one CTA a head, for rows that it holds all, keys that no other head shares and no tile of keys left out. many:
// grad_rows and grad_keys, each with its own plan. plain: what no tile serves, or what a block has too little shared memory for.
struct BackwardPlan {
  enum Route { plain, few, many } route = plain;
  AttentionPlan rows{}, keys{};
  size_t bytes = 0;

  BackwardPlan(const AttentionBackwardArgs& args, void* workspace) {
    const AttentionArgs& a = args.forward;
    if (is_plain(a)) return;
    Planner p(a, workspace, true);
    p.plan.aligned = all_on_bytes(a, 16, a.q, a.k1, a.v1, a.k2, a.v2, args.grad_out);
    p.plan.pairs = all_on_bytes(a, 2 * dtype_size(a.dtype), args.grad_q, args.grad_k1, args.grad_v1, args.grad_k2, args.grad_v2);
    const bool f32 = a.dtype == DType::f32, media = a.rule == AttentionRule::media || a.rule == AttentionRule::media_all;
    const size_t exchange = size_t(p.keys + (f32 ? 4 : 8)) * dtype_size(a.dtype), limit = shared_memory_limit();
    const size_t few_bytes = p.row_bytes * size_t(32 * p.plan.warps + 4 * p.keys) + 32 * size_t(p.plan.warps) * exchange;
    const int tile = attention_tile_rows(f32);
    const size_t keys_bytes = p.row_bytes * size_t(2 * kAttentionOwnKeys + 4 * tile) + 2 * size_t(tile) * 24;
    if (a.Nq <= kAttentionFewRows && a.G == a.H && !media && few_bytes <= limit) {
      route = few;
      p.plan.tiles = 1;
      p.plan.shared = few_bytes;
      p.split(a);
    } else if (keys_bytes <= limit) {
      route = many;
      p.own_rows(a, [&](int warps) { return p.row_bytes * size_t(32 * warps + 4 * p.keys); });
      p.plan.delta = p.carve.take<float>(a.B * a.H * a.Nq);
      keys = p.plan;
      keys.shared = keys_bytes;
    }
    rows = p.plan;
    bytes = p.carve.bytes();
  }
};

// Calls f with the type as a constant.
template <class F>
int with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16:
      return f(std::integral_constant<DType, DType::f16>());
    case DType::bf16:
      return f(std::integral_constant<DType, DType::bf16>());
    default:
      return f(std::integral_constant<DType, DType::f32>());
  }
}

template <class F>
int with_any_type(DType dtype, F&& f) {
  return dtype == DType::f64 ? f(std::integral_constant<DType, DType::f64>()) : with_type(dtype, f);
}

bool too_many_blocks(const AttentionArgs& a) {
  const double rows = double(a.B) * a.H * a.Nq, keys = double(a.B) * a.G * double(a.N1 + a.N2);
  return rows > 2147483647.0 || keys > 2147483647.0;  // every launch below has at most a block a row or a key
}

}  // namespace

size_t attention_cuda_workspace(const AttentionArgs& a) { return plan_forward(a, nullptr).carve.bytes(); }

int attention_cuda(const AttentionArgs& a, void* workspace, void* stream) {
  if (too_many_blocks(a)) return kInvalidConfiguration;
  const dim3 rows = warp_grid(a.B * a.H * a.Nq), block(kThreads);
  if (is_plain(a)) {
    const dim3 grid = warp_grid(a.B * a.H * a.Nq, ceil_div(a.D, kPlainColumns));
    return with_any_type(a.dtype, [&](auto type) { return launch(plain_forward_kernel<type.value>, grid, block, 0, stream, a); });
  }
  const AttentionPlan plan = plan_forward(a, workspace).plan;
  Sequence run;
  run.then([&] { return with_type(a.dtype, [&](auto type) { return attention_forward_tiles<type.value>(a, plan, stream); }); });
  if (plan.splits > 1) run.then([&] { return launch(join_out_kernel, rows, block, 0, stream, a, plan); });
  return run.status();
}

size_t attention_backward_cuda_workspace(const AttentionBackwardArgs& args) { return BackwardPlan(args, nullptr).bytes; }

int attention_backward_cuda(const AttentionBackwardArgs& args, void* workspace, void* stream) {
  const AttentionArgs& a = args.forward;
  if (too_many_blocks(a)) return kInvalidConfiguration;
  const bool want_q = args.grad_q.data, want_keys = args.grad_k1.data || args.grad_k2.data;
  const dim3 block(kThreads);
  const BackwardPlan plan(args, workspace);
  Sequence run;
  if (plan.route == BackwardPlan::plain) {
    const int64_t chunks = ceil_div(a.D, kPlainColumns);
    const dim3 rows = warp_grid(a.B * a.H * a.Nq, chunks), keys = warp_grid(a.B * a.G * (a.N1 + a.N2), chunks);
    return with_any_type(a.dtype, [&](auto type) {
      if (want_q) run.then([&] { return launch(plain_grad_rows_kernel<type.value>, rows, block, 0, stream, args); });
      if (want_keys) run.then([&] { return launch(plain_grad_keys_kernel<type.value>, keys, block, 0, stream, args); });
      return run.status();
    });
  }
  return with_type(a.dtype, [&](auto type) {
    if (plan.route == BackwardPlan::few) {
      run.then([&] { return attention_grad_few_tiles<type.value>(args, plan.rows, stream); });
      if (want_q && plan.rows.splits > 1)
        run.then([&] { return launch(join_grad_kernel, warp_grid(a.B * a.H * a.Nq), block, 0, stream, args, plan.rows); });
    } else {
      run.then([&] { return attention_delta<type.value>(args, plan.rows, stream); });
      if (want_q) run.then([&] { return attention_grad_rows_tiles<type.value>(args, plan.rows, stream); });
      if (want_keys) run.then([&] { return attention_grad_keys_tiles<type.value>(args, plan.keys, stream); });
    }
    return run.status();
  });
}

int attention_merge_cuda(const AttentionMergeArgs& a, void* stream) {
  if (double(a.B) * a.H * a.Nq > 2147483647.0) return kInvalidConfiguration;
  return launch(merge_kernel, warp_grid(a.B * a.H * a.Nq), dim3(kThreads), 0, stream, a);
}
int attention_merge_backward_cuda(const AttentionMergeArgs& a, void* stream) { return attention_merge_cuda(a, stream); }

}  // namespace mmfast
