// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Log-probabilities on the GPU: the passes over a block of logits that follow and precede torch's products.
//
//   update  a CTA a row. Each thread keeps a running maximum and its sums over 16-byte pieces, correcting them when the maximum grows
//           (a piece at a time, so one exponential a logit and one a piece); threads are merged in a fixed tree, and the first one merges
//           with what earlier blocks of the vocabulary left in `state` (no second launch, no atomics, the same bits every run).
//   grad    a CTA kGradColumns of a row: each logit is read once and its gradient written, in place if wished.
//
// Both are bound by reading (and writing) the logits once: an H100-class card reads a block that its product has just written from L2.
#include "../common/cuda.cuh"
#include "linear_logp.h"

namespace mmfast {
namespace {

constexpr int kThreads = 256;
constexpr int kGradColumns = 8 * kThreads * 2;

template <class A>
__device__ __forceinline__ A infinity() {
  return A(__builtin_inff());
}
__device__ __forceinline__ float exponential(float x) { return fast_exp2(x * 1.4426950408889634f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The element types: how a 16-byte piece is read and written as A, the type of sums.
struct F32 {
  using Accumulate = float;
  static constexpr int kSize = 4;
  static __device__ float get(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
  static __device__ void set(void* p, int64_t i, float v) { static_cast<float*>(p)[i] = v; }
};
struct F16 {
  using Accumulate = float;
  static constexpr int kSize = 2;
  static __device__ float get(const void* p, int64_t i) { return f16_to_float(static_cast<const uint16_t*>(p)[i]); }
  static __device__ void set(void* p, int64_t i, float v) { static_cast<uint16_t*>(p)[i] = float_to_f16(v); }
};
struct Bf16 {
  using Accumulate = float;
  static constexpr int kSize = 2;
  static __device__ float get(const void* p, int64_t i) { return bf16_to_float(static_cast<const uint16_t*>(p)[i]); }
  static __device__ void set(void* p, int64_t i, float v) { static_cast<uint16_t*>(p)[i] = float_to_bf16(v); }
};
struct F64 {
  using Accumulate = double;
  static constexpr int kSize = 8;
  static __device__ double get(const void* p, int64_t i) { return static_cast<const double*>(p)[i]; }
  static __device__ void set(void* p, int64_t i, double v) { static_cast<double*>(p)[i] = v; }
};

struct alignas(16) Piece {
  uint32_t words[4];
};
template <class E>
constexpr int kPack = 16 / E::kSize;

__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Values [i, i + kPack) of a row of `count`, -inf beyond its end.
template <class E, class A>
__device__ __forceinline__ void read(const char* row, int64_t i, int64_t count, bool whole, A (&v)[kPack<E>]) {
  Piece piece;
  if (whole && i + kPack<E> <= count) {
    piece = *reinterpret_cast<const Piece*>(row + i * E::kSize);
#pragma unroll
    for (int u = 0; u < kPack<E>; ++u) v[u] = E::get(&piece, u);
  } else {
#pragma unroll
    for (int u = 0; u < kPack<E>; ++u) v[u] = i + u < count ? E::get(row, i + u) : -infinity<A>();
  }
}

// z of a logit; `slope` receives dz/dlogit.
template <class A>
struct Cap {
  A inverse, softcap;
  __device__ __forceinline__ A operator()(A logit) const {
    if (softcap != A(0)) logit = softcap * tanh(logit / softcap);
    return logit * inverse;
  }
  __device__ __forceinline__ A slope(A z) const {
    if (softcap == A(0)) return inverse;
    const A t = z / (softcap * inverse);
    return inverse * (A(1) - t * t);
  }
};

template <class A>
struct Sums {
  A top, sum, dot, square, top0, sum0, cross;
  int best;
};

template <class A>
__device__ __forceinline__ A shrink(A from, A to) {  // exp(from - to) where both may be -inf
  return from == to ? A(1) : exponential(from - to);
}

template <class A>
__device__ __forceinline__ A moved(const Sums<A>& s, A top) {  // the dot as if taken from another top
  return s.sum > A(0) ? s.dot + s.sum * (s.top - top) : A(0);
}

template <class A>
__device__ __forceinline__ void merge(Sums<A>& a, const Sums<A>& b) {
  const A top = a.top > b.top ? a.top : b.top, wa = shrink(a.top, top), wb = shrink(b.top, top);
  if (b.top > a.top || (b.top == a.top && b.best < a.best)) a.best = b.best;
  a.dot = moved(a, top) * wa + moved(b, top) * wb;
  a.sum = a.sum * wa + b.sum * wb;
  a.top = top;
  a.square = a.square * wa * wa + b.square * wb * wb;
  const A top0 = a.top0 > b.top0 ? a.top0 : b.top0, wa0 = shrink(a.top0, top0), wb0 = shrink(b.top0, top0);
  a.top0 = top0;
  a.sum0 = a.sum0 * wa0 + b.sum0 * wb0;
  a.cross = a.cross * wa0 + b.cross * wb0;
}

template <class A>
__device__ __forceinline__ Sums<A> from_lane(const Sums<A>& s, int mask) {
  const auto other = [&](auto v) { return __shfl_xor_sync(kFullWarp, v, mask); };
  return {other(s.top), other(s.sum), other(s.dot), other(s.square), other(s.top0), other(s.sum0), other(s.cross), other(s.best)};
}

// More: entropy, squares and hit too. Reference: a second model's logits too.
template <class E, bool More, bool Reference>
__global__ void __launch_bounds__(kThreads, 2) update_kernel(LogpUpdateArgs a) {
  using A = typename E::Accumulate;
  const int64_t r = blockIdx.x;
  const LogpRows& rows = a.rows;
  A *state = static_cast<A*>(a.state) + r, *out = static_cast<A*>(a.out) + r;
  const int64_t label = rows.labels[r];
  if (label == rows.ignore_index) {
    if (a.ends && threadIdx.x < kLogpOutputs) out[threadIdx.x * rows.n] = A(0);
    return;
  }
  const Cap<A> cap{A(1 / rows.temperature), A(rows.softcap)};
  const char *z = static_cast<const char*>(a.z.data) + r * a.z.stride * E::kSize,
             *z0 = Reference ? static_cast<const char*>(a.z0.data) + r * a.z0.stride * E::kSize : nullptr;
  const bool whole = aligned(z), whole0 = aligned(z0);
  const A low = -infinity<A>();
  Sums<A> s{low, 0, 0, 0, low, 0, 0, 0x7fffffff};
  for (int64_t i = int64_t(threadIdx.x) * kPack<E>; i < rows.columns; i += int64_t(kThreads) * kPack<E>) {
    A v[kPack<E>];
    read<E>(z, i, rows.columns, whole, v);
    A top = low;
    int at = 0;
#pragma unroll
    for (int u = 0; u < kPack<E>; ++u) {
      if (i + u < rows.columns) v[u] = cap(v[u]);
      if (v[u] > top || v[u] != v[u]) top = v[u], at = u;
    }
    if (top > s.top || top != top) {
      const A w = shrink(s.top, top);
      if constexpr (More) s.dot = moved(s, top) * w, s.square *= w * w;
      s.sum *= w;
      s.top = top, s.best = int(rows.first + i) + at;
    }
    const A base = s.top == low ? A(0) : s.top;
#pragma unroll
    for (int u = 0; u < kPack<E>; ++u) {
      const A e = exponential(v[u] - base);
      s.sum += e;
      if constexpr (More) {
        s.dot += v[u] == low ? A(0) : e * (v[u] - base);
        s.square += e * e;
      }
    }
    if constexpr (!Reference) continue;
    A v0[kPack<E>];
    read<E>(z0, i, rows.columns, whole0, v0);
    A top0 = low;
#pragma unroll
    for (int u = 0; u < kPack<E>; ++u) {
      if (i + u < rows.columns) v0[u] = cap(v0[u]);
      top0 = v0[u] > top0 || v0[u] != v0[u] ? v0[u] : top0;
    }
    if (top0 > s.top0 || top0 != top0) {
      const A w = shrink(s.top0, top0);
      s.sum0 *= w, s.cross *= w;
      s.top0 = top0;
    }
    const A base0 = s.top0 == low ? A(0) : s.top0;
#pragma unroll
    for (int u = 0; u < kPack<E>; ++u) {
      const A e = exponential(v0[u] - base0);
      s.sum0 += e;
      s.cross += v0[u] == low ? A(0) : e * (v0[u] - v[u]);
    }
  }
  for (int mask = 16; mask; mask >>= 1) merge(s, from_lane(s, mask));
  MMFAST_SHARED(Sums<A>[kThreads / 32], warps);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; ++w) merge(s, warps[w]);
  A at_label = 0, at_label0 = 0;
  if (!a.begins) {
    const auto kept = [&](int i) { return state[i * rows.n]; };
    Sums<A> before{kept(kTop), kept(kSum), kept(kDot), kept(kSquare), kept(kTop0), kept(kSum0), kept(kCross), int(kept(kBest))};
    merge(before, s);
    s = before;
    at_label = kept(kLabel), at_label0 = kept(kLabel0);
  }
  const int64_t column = label - rows.first;
  if (column >= 0 && column < rows.columns) {
    at_label = cap(E::get(z, column));
    if constexpr (Reference) at_label0 = cap(E::get(z0, column));
  }
  if (!a.ends) {
    const A values[kLogpStates] = {s.top, s.sum, at_label, s.dot, s.square, A(s.best), s.top0, s.sum0, at_label0, s.cross};
    for (int i = 0; i < kLogpStates; ++i) state[i * rows.n] = values[i];
    return;
  }
  const A bad = label < 0 || label >= rows.V ? A(__builtin_nan("")) : A(0);
  const A log_sum = log(s.sum), logp = (at_label - s.top) - log_sum;
  out[kLogp * rows.n] = (logp > A(0) ? A(0) : logp) + bad;
  out[kLse * rows.n] = s.top + log_sum + bad;
  out[kShift * rows.n] = s.top;
  out[kLogSum * rows.n] = log_sum + bad;
  if constexpr (More) {
    out[kEntropy * rows.n] = log_sum - s.dot / s.sum + bad;
    out[kSquares * rows.n] = s.square / (s.sum * s.sum) + bad;
    out[kHit * rows.n] = s.best == label ? A(1) : A(0);
  }
  if constexpr (Reference) {
    const A log_sum0 = log(s.sum0), logp0 = (at_label0 - s.top0) - log_sum0;
    out[kLogp0 * rows.n] = (logp0 > A(0) ? A(0) : logp0) + bad;
    out[kLse0 * rows.n] = s.top0 + log_sum0 + bad;
    out[kShift0 * rows.n] = s.top0;
    out[kLogSum0 * rows.n] = log_sum0 + bad;
    out[kKl * rows.n] = s.cross / s.sum0 + (s.top - s.top0) + (log_sum - log_sum0) + bad;
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) grad_kernel(LogpGradArgs a) {
  using A = typename E::Accumulate;
  const int64_t r = blockIdx.x;
  const LogpRows& rows = a.rows;
  const A* out = static_cast<const A*>(a.out) + r;
  const auto upstream = [&](const void* p) { return p ? static_cast<const A*>(p)[r] : A(0); };
  const auto known = [&](int i) { return out[i * rows.n]; };
  const int64_t label = rows.labels[r];
  const A g = upstream(a.g), e = upstream(a.e), q = upstream(a.q), k = a.z0.data ? upstream(a.k) : A(0), top = known(kShift),
          log_sum = known(kLogSum);
  const A b = -e, c = 2 * q;
  const A line =
      k + upstream(a.r) - g - (e != A(0) ? e * (known(kEntropy) - log_sum) : A(0)) - (q != A(0) ? 2 * q * known(kSquares) : A(0));
  const bool ignored = label == rows.ignore_index;
  const A top0 = k != A(0) ? known(kShift0) : A(0), log_sum0 = k != A(0) ? known(kLogSum0) : A(0);
  const Cap<A> cap{A(1 / rows.temperature), A(rows.softcap)};
  const char *z = static_cast<const char*>(a.z.data) + r * a.z.stride * E::kSize,
             *z0 = k != A(0) ? static_cast<const char*>(a.z0.data) + r * a.z0.stride * E::kSize : nullptr;
  char* to = static_cast<char*>(a.grad.data) + r * a.grad.stride * E::kSize;
  const bool whole = aligned(z) && aligned(to), whole0 = aligned(z0);
  const int64_t begin = int64_t(blockIdx.y) * kGradColumns, end = begin + kGradColumns < rows.columns ? begin + kGradColumns : rows.columns;
  for (int64_t i = begin + int64_t(threadIdx.x) * kPack<E>; i < end; i += int64_t(kThreads) * kPack<E>) {
    A v[kPack<E>], v0[kPack<E>];
    if (!ignored) {
      read<E>(z, i, rows.columns, whole, v);
      if (z0) read<E>(z0, i, rows.columns, whole0, v0);
    }
    Piece piece;
#pragma unroll
    for (int u = 0; u < kPack<E>; ++u) {
      A d = 0;
      if (!ignored) {
        const A x = cap(v[u]), y = x - top, p = exponential(y - log_sum);
        d = p * (line + (b == A(0) || x == -infinity<A>() ? A(0) : b * y) + c * p);
        if (z0) d -= k * exponential(cap(v0[u]) - top0 - log_sum0);
        if (rows.first + i + u == label) d += g;
        d *= cap.slope(x);
      }
      E::set(&piece, u, d);
    }
    if (whole && i + kPack<E> <= rows.columns) {
      *reinterpret_cast<Piece*>(to + i * E::kSize) = piece;
    } else {
#pragma unroll
      for (int u = 0; u < kPack<E>; ++u)
        if (i + u < rows.columns) E::set(to, i + u, E::get(&piece, u));
    }
  }
}

template <class Call>
int by_type(DType dtype, Call call) {
  switch (dtype) {
    case DType::f32:
      return call(F32{});
    case DType::f16:
      return call(F16{});
    case DType::bf16:
      return call(Bf16{});
    default:
      return call(F64{});
  }
}

}  // namespace

int logp_update_cuda(const LogpUpdateArgs& a, void* stream) {
  return by_type(a.rows.dtype, [&](auto type) {
    using E = decltype(type);
    const auto kernel = a.z0.data      ? update_kernel<E, true, true>
                        : a.wants_more ? update_kernel<E, true, false>
                                       : update_kernel<E, false, false>;
    return launch(kernel, dim3(unsigned(a.rows.n)), dim3(kThreads), 0, stream, a);
  });
}

int logp_grad_cuda(const LogpGradArgs& a, void* stream) {
  const dim3 grid(unsigned(a.rows.n), unsigned(ceil_div(a.rows.columns, kGradColumns)));
  return by_type(a.rows.dtype, [&](auto type) { return launch(grad_kernel<decltype(type)>, grid, dim3(kThreads), 0, stream, a); });
}

}  // namespace mmfast
