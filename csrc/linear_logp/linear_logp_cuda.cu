// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Log-probabilities on the GPU: the passes over a block of logits that follow and precede torch's products.
//
//   update  a CTA a row. Each thread keeps a running maximum and its sums over kFlight 16-byte pieces at a time, correcting them only
//           when the maximum grows; threads are merged in a fixed tree, and the first one merges with what earlier blocks of the
//           vocabulary left in `state` (no second launch, no atomics, the same bits every run).
//   grad    a CTA kGradColumns of a row: each logit is read once and its gradient written, in place if wished.
//   scale   gradients made in forward times what backward brings. That is 1 unless the loss was weighted, and then memory is left alone.
//
// Both are bound by reading (and writing) the logits once: an H100-class card reads a block that its product has just written from L2.
// That leaves about a dozen instructions a logit, so what happens rarely (a new maximum, a ragged end, softcap) is kept out of their way.
#include "../common/cuda.cuh"
#include "linear_logp.h"

namespace mmfast {
namespace {

constexpr int kThreads = 256;
constexpr int kFlight = 2;  // pieces that a thread has under way
constexpr int kGradColumns = 8 * kThreads * kFlight;

template <class A>
constexpr A kInfinity = A(__builtin_inff());
// What -inf is replaced by where it meets a factor 0.
template <class A>
constexpr A kFar = A(-1e30);

__device__ __forceinline__ float exponential(float x) { return fast_exp2(x * 1.4426950408889634f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The element types: what memory holds, and what sums are in.
struct F32 {
  using Elem = float;
  using Accumulate = float;
  static __device__ __forceinline__ float widen(float v) { return v; }
  static __device__ __forceinline__ float narrow(float v) { return v; }
};
struct F16 {
  using Elem = uint16_t;
  using Accumulate = float;
  static __device__ __forceinline__ float widen(uint16_t v) { return widen_f16(v); }
  static __device__ __forceinline__ uint16_t narrow(float v) { return uint16_t(pack_f16(v, 0.0f)); }
};
struct Bf16 {
  using Elem = uint16_t;
  using Accumulate = float;
  static __device__ __forceinline__ float widen(uint16_t v) { return bf16_to_float(v); }
  static __device__ __forceinline__ uint16_t narrow(float v) { return uint16_t(pack_bf16(v, 0.0f)); }
};
struct F64 {
  using Elem = double;
  using Accumulate = double;
  static __device__ __forceinline__ double widen(double v) { return v; }
  static __device__ __forceinline__ double narrow(double v) { return v; }
};

template <class E>
constexpr int kPack = 16 / sizeof(typename E::Elem);
template <class E>
constexpr int kStep = kThreads * kPack<E>;  // between two pieces of a thread
template <class E>
struct alignas(16) Piece {
  typename E::Elem values[kPack<E>];
};

// z of logits, and dz/dlogit.
template <class A>
struct Cap {
  A inverse, softcap, into, out;  // 1 / temperature, softcap or 0, 1 / softcap, softcap / temperature
  explicit Cap(const LogpRows& rows)
      : inverse(A(1 / rows.temperature)), softcap(A(rows.softcap)), into(A(1 / rows.softcap)), out(A(rows.softcap / rows.temperature)) {}
  template <int N>
  __device__ __forceinline__ void apply(A (&v)[N]) const {
    if (softcap != A(0)) {
#pragma unroll
      for (int u = 0; u < N; ++u) v[u] = out * tanh(v[u] * into);
    } else {
#pragma unroll
      for (int u = 0; u < N; ++u) v[u] *= inverse;
    }
  }
  __device__ __forceinline__ A slope(A z) const {
    if (softcap == A(0)) return inverse;
    const A t = z / out;
    return inverse * (A(1) - t * t);
  }
};

// A row of a block in 16-byte pieces at 16-byte boundaries, the first of which may begin before the row: so any vocabulary, stride or slice
// is read in whole pieces but for its ends. A row that must follow the pieces of another (`like`) and lies differently goes by elements.
template <class E>
struct Row {
  using Elem = typename E::Elem;
  using A = typename E::Accumulate;
  Elem* data;
  int count, skew;  // elements; from the first boundary to the row
  bool straight;

  __device__ __forceinline__ Row(const LogpBlock& block, int64_t r, int count)
      : data(static_cast<Elem*>(block.data) + r * block.stride),
        count(count),
        skew(int((reinterpret_cast<uintptr_t>(data) & 15) / sizeof(Elem))),
        straight(true) {}
  __device__ __forceinline__ Row(const LogpBlock& block, int64_t r, const Row& like) : Row(block, r, like.count) {
    straight = skew == like.skew;
  }
  __device__ __forceinline__ bool has(int i) const { return unsigned(i) < unsigned(count); }
  __device__ __forceinline__ bool whole(int i) const { return straight && i >= 0 && i + kPack<E> <= count; }
  // Starts the load of elements [i, i + kPack); `read` finishes it, so that several can be under way.
  __device__ __forceinline__ Piece<E> fetch(int i) const {
    Piece<E> piece{};
    if (whole(i)) piece = *reinterpret_cast<const Piece<E>*>(data + i);
    return piece;
  }
  // z of the fetched elements, -inf outside the row.
  __device__ __forceinline__ void read(Piece<E> piece, int i, const Cap<A>& cap, A (&z)[kPack<E>]) const {
    const bool ragged = !whole(i);
    if (ragged) {
#pragma unroll
      for (int u = 0; u < kPack<E>; ++u)
        if (has(i + u)) piece.values[u] = data[i + u];
    }
#pragma unroll
    for (int u = 0; u < kPack<E>; ++u) z[u] = E::widen(piece.values[u]);
    cap.apply(z);
    if (ragged) {
#pragma unroll
      for (int u = 0; u < kPack<E>; ++u) z[u] = has(i + u) ? z[u] : -kInfinity<A>;
    }
  }
  __device__ __forceinline__ void write(const Piece<E>& piece, int i) const {
    if (whole(i)) {
      *reinterpret_cast<Piece<E>*>(data + i) = piece;
    } else {
#pragma unroll
      for (int u = 0; u < kPack<E>; ++u)
        if (has(i + u)) data[i + u] = piece.values[u];
    }
  }
  __device__ __forceinline__ A at(int i, const Cap<A>& cap) const {
    A z[1] = {E::widen(data[i])};
    cap.apply(z);
    return z[0];
  }
};

template <class A>
struct Sums {
  A top, sum, dot, square, top0, sum0, cross;
  int best;
};
constexpr int kNoBest = 1 << 24;  // above every index and exact in fp32

template <class A>
__device__ __forceinline__ A shrink(A from, A to) {  // exp(from - to) where both may be -inf
  return from == to ? A(1) : exponential(from - to);
}
template <class A>
__device__ __forceinline__ A moved(const Sums<A>& s, A top) {  // the dot as if taken from another top
  return s.sum > A(0) ? s.dot + s.sum * (s.top - top) : A(0);
}
template <class A>
__device__ __forceinline__ A weighted(A weight, A x) {  // x may be inf where weight is 0
  return weight > A(0) ? weight * x : A(0);
}

template <bool More, bool Reference, class A>
__device__ __forceinline__ void merge(Sums<A>& a, const Sums<A>& b) {
  const A top = fmax(a.top, b.top), wa = shrink(a.top, top), wb = shrink(b.top, top);
  if constexpr (More) {
    if (b.top > a.top || (b.top == a.top && b.best < a.best)) a.best = b.best;
    a.dot = moved(a, top) * wa + moved(b, top) * wb;
    a.square = a.square * wa * wa + b.square * wb * wb;
  }
  a.sum = a.sum * wa + b.sum * wb;
  a.top = top;
  if constexpr (Reference) {
    const A top0 = fmax(a.top0, b.top0), wa0 = shrink(a.top0, top0), wb0 = shrink(b.top0, top0);
    a.sum0 = a.sum0 * wa0 + b.sum0 * wb0;
    a.cross = weighted(wa0, a.cross) + weighted(wb0, b.cross);
    a.top0 = top0;
  }
}

// Merges with the lane across; what the instance does not use is not exchanged.
template <bool More, bool Reference, class A>
__device__ __forceinline__ void merge_lanes(Sums<A>& s, int mask) {
  const auto other = [&](auto v) { return __shfl_xor_sync(kFullWarp, v, mask); };
  Sums<A> b{other(s.top), other(s.sum)};
  if constexpr (More) b.dot = other(s.dot), b.square = other(s.square), b.best = other(s.best);
  if constexpr (Reference) b.top0 = other(s.top0), b.sum0 = other(s.sum0), b.cross = other(s.cross);
  merge<More, Reference>(s, b);
}

// More: entropy, squares and hit too. Reference: a second model's logits too.
template <class E, bool More, bool Reference>
__global__ void __launch_bounds__(kThreads, 2) update_kernel(LogpUpdateArgs a, Cap<typename E::Accumulate> cap) {
  using A = typename E::Accumulate;
  const int64_t r = blockIdx.x;
  const LogpRows& rows = a.rows;
  A *state = static_cast<A*>(a.state) + r, *out = static_cast<A*>(a.out) + r;
  const int64_t label = rows.labels[r];
  if (label == rows.ignore_index) {
    if (a.ends && threadIdx.x < kLogpOutputs) out[threadIdx.x * rows.n] = A(0);
    return;
  }
  const Row<E> z(a.z, r, int(rows.columns)), z0(a.z0, r, z);
  constexpr A low = -kInfinity<A>;
  Sums<A> s{low, 0, 0, 0, low, 0, 0, kNoBest};
  for (int i = int(threadIdx.x) * kPack<E> - z.skew; i < z.count; i += kFlight * kStep<E>) {
    Piece<E> pieces[kFlight], pieces0[kFlight];
    A v[kFlight][kPack<E>], v0[kFlight][kPack<E>];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      pieces[f] = z.fetch(i + f * kStep<E>);
      if constexpr (Reference) pieces0[f] = z0.fetch(i + f * kStep<E>);
    }
    A top = s.top, top0 = s.top0;  // NaN does not raise them; it arrives through the sums
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      z.read(pieces[f], i + f * kStep<E>, cap, v[f]);
#pragma unroll
      for (int u = 0; u < kPack<E>; ++u) top = fmax(top, v[f][u]);
      if constexpr (Reference) {
        z0.read(pieces0[f], i + f * kStep<E>, cap, v0[f]);
#pragma unroll
        for (int u = 0; u < kPack<E>; ++u) top0 = fmax(top0, v0[f][u]);
      }
    }
    if (top > s.top) {
      const A w = exponential(s.top - top);
      if constexpr (More) {
        s.dot = moved(s, top) * w, s.square *= w * w;
#pragma unroll
        for (int f = kFlight - 1; f >= 0; --f)
#pragma unroll
          for (int u = kPack<E> - 1; u >= 0; --u)
            if (v[f][u] == top) s.best = int(rows.first) + i + f * kStep<E> + u;
      }
      s.sum *= w;
      s.top = top;
    }
    if (Reference && top0 > s.top0) {
      const A w = exponential(s.top0 - top0);
      s.sum0 *= w, s.cross = weighted(w, s.cross);
      s.top0 = top0;
    }
    const A base = s.top == low ? A(0) : s.top, base0 = s.top0 == low ? A(0) : s.top0;
#pragma unroll
    for (int f = 0; f < kFlight; ++f)
#pragma unroll
      for (int u = 0; u < kPack<E>; ++u) {
        const A d = v[f][u] - base, e = exponential(d);
        s.sum += e;
        if constexpr (More) s.dot += e * fmax(d, kFar<A>), s.square += e * e;
        if constexpr (Reference) {
          const A e0 = exponential(v0[f][u] - base0);
          s.sum0 += e0, s.cross += weighted(e0, v0[f][u] - v[f][u]);
        }
      }
  }
  for (int mask = 16; mask; mask >>= 1) merge_lanes<More, Reference>(s, mask);
  MMFAST_SHARED(Sums<A>[kThreads / 32], warps);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  s = warps[threadIdx.x % (kThreads / 32)];
  for (int mask = kThreads / 64; mask; mask >>= 1) merge_lanes<More, Reference>(s, mask);
  if (threadIdx.x != 0) return;
  A at_label = 0, at_label0 = 0;
  if (!a.begins) {
    const auto kept = [&](int i) { return state[i * rows.n]; };
    Sums<A> before{kept(kTop), kept(kSum), kept(kDot), kept(kSquare), kept(kTop0), kept(kSum0), kept(kCross), int(kept(kBest))};
    merge<More, Reference>(before, s);
    s = before;
    at_label = kept(kLabel), at_label0 = kept(kLabel0);
  }
  if (label >= rows.first && label - rows.first < rows.columns) {
    at_label = z.at(int(label - rows.first), cap);
    if constexpr (Reference) at_label0 = z0.at(int(label - rows.first), cap);
  }
  if (!a.ends) {
    const A values[kLogpStates] = {s.top, s.sum, at_label, s.dot, s.square, A(s.best), s.top0, s.sum0, at_label0, s.cross};
    for (int i = 0; i < kLogpStates; ++i) state[i * rows.n] = values[i];
    return;
  }
  // The largest logit has added exactly 1 to the sum and is no less than the label's, so logp is not positive.
  const A bad = label < 0 || label >= rows.V ? A(__builtin_nan("")) : A(0), log_sum = log(s.sum) + bad;
  out[kLogp * rows.n] = at_label - s.top - log_sum;
  out[kLse * rows.n] = s.top + log_sum;
  out[kShift * rows.n] = s.top, out[kLogSum * rows.n] = log_sum;
  if constexpr (More) {
    out[kEntropy * rows.n] = log_sum - s.dot / s.sum;
    out[kSquares * rows.n] = s.square / (s.sum * s.sum) + bad;
    out[kHit * rows.n] = A(s.best == label ? 1 : 0) + bad;
  }
  if constexpr (Reference) {
    const A log_sum0 = log(s.sum0) + bad;
    out[kLogp0 * rows.n] = at_label0 - s.top0 - log_sum0;
    out[kLse0 * rows.n] = s.top0 + log_sum0;
    out[kShift0 * rows.n] = s.top0, out[kLogSum0 * rows.n] = log_sum0;
    out[kKl * rows.n] = s.cross / s.sum0 + (s.top - s.top0) + (log_sum - log_sum0);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads, 4) grad_kernel(LogpGradArgs a, Cap<typename E::Accumulate> cap) {
  using A = typename E::Accumulate;
  const int64_t r = blockIdx.x;
  const LogpRows& rows = a.rows;
  const auto known = [&](int i) { return static_cast<const A*>(a.out)[i * rows.n + r]; };
  const auto upstream = [&](const void* p) { return p ? static_cast<const A*>(p)[r] : A(0); };
  const int64_t label = rows.labels[r];
  const A g = upstream(a.g), e = upstream(a.e), q = upstream(a.q), k = a.z0.data ? upstream(a.k) : A(0);
  const A top = known(kShift), log_sum = known(kLogSum), top0 = k != A(0) ? known(kShift0) : A(0),
          log_sum0 = k != A(0) ? known(kLogSum0) : A(0);
  const A rest = k + upstream(a.r), entropy = e != A(0) ? known(kEntropy) : A(0), squares = q != A(0) ? known(kSquares) : A(0);
  const A line = rest - g - e * entropy - 2 * q * squares;
  const bool idle = label == rows.ignore_index || (line == A(0) && g == A(0) && e == A(0) && q == A(0) && k == A(0));
  const Row<E> z(a.z, r, int(rows.columns)), z0(a.z0, r, z), to(a.grad, r, z);
  const int at = label >= rows.first && label - rows.first < rows.columns ? int(label - rows.first) : -kGradColumns;
  const int begin = int(blockIdx.y) * kGradColumns - z.skew;
  for (int from = begin; from < begin + kGradColumns && from < z.count; from += kFlight * kStep<E>) {
    Piece<E> pieces[kFlight]{}, pieces0[kFlight]{};
    const int first = from + int(threadIdx.x) * kPack<E>;
    if (!idle) {
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        pieces[f] = z.fetch(first + f * kStep<E>);
        if (k != A(0)) pieces0[f] = z0.fetch(first + f * kStep<E>);
      }
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        const int i = first + f * kStep<E>;
        A v[kPack<E>], d[kPack<E>];
        z.read(pieces[f], i, cap, v);
#pragma unroll
        for (int u = 0; u < kPack<E>; ++u) {
          const A t = v[u] - top - log_sum, p = exponential(t);
          d[u] = p * (line - e * fmax(t, kFar<A>) + 2 * q * p);
          // Near p = 1 these terms cancel one by one, and must before they meet.
          if (i + u == at) d[u] = p * (rest - e * (entropy + fmax(t, kFar<A>)) + 2 * q * (p - squares)) + g * (1 - p);
        }
        if (k != A(0)) {
          A v0[kPack<E>];
          z0.read(pieces0[f], i, cap, v0);
#pragma unroll
          for (int u = 0; u < kPack<E>; ++u) d[u] -= k * exponential(v0[u] - top0 - log_sum0);
        }
#pragma unroll
        for (int u = 0; u < kPack<E>; ++u) pieces[f].values[u] = E::narrow(d[u] * cap.slope(v[u]));
      }
    }
#pragma unroll
    for (int f = 0; f < kFlight; ++f) to.write(pieces[f], first + f * kStep<E>);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) scale_kernel(LogpScaleArgs a) {
  using A = typename E::Accumulate;
  const A factor = *static_cast<const A*>(a.factor);
  if (factor == A(1)) return;
  auto* values = static_cast<typename E::Elem*>(a.values);
  const int64_t pieces = a.count / kPack<E>, first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < pieces; i += int64_t(gridDim.x) * kThreads) {
    Piece<E>& at = reinterpret_cast<Piece<E>*>(values)[i];
    Piece<E> piece = at;
#pragma unroll
    for (int u = 0; u < kPack<E>; ++u) piece.values[u] = E::narrow(E::widen(piece.values[u]) * factor);
    at = piece;
  }
  if (const int64_t i = pieces * kPack<E> + first; i < a.count) values[i] = E::narrow(E::widen(values[i]) * factor);
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
    const auto kernel = a.z0.data ? (a.wants_more ? update_kernel<E, true, true> : update_kernel<E, false, true>)
                                  : (a.wants_more ? update_kernel<E, true, false> : update_kernel<E, false, false>);
    return launch(kernel, dim3(unsigned(a.rows.n)), dim3(kThreads), 0, stream, a, Cap<typename E::Accumulate>(a.rows));
  });
}

int logp_grad_cuda(const LogpGradArgs& a, void* stream) {
  return by_type(a.rows.dtype, [&](auto type) {
    using E = decltype(type);
    // A row begins up to kPack - 1 elements behind a boundary.
    const dim3 grid(unsigned(a.rows.n), unsigned(ceil_div(a.rows.columns + kPack<E> - 1, kGradColumns)));
    return launch(grad_kernel<E>, grid, dim3(kThreads), 0, stream, a, Cap<typename E::Accumulate>(a.rows));
  });
}

int logp_scale_cuda(const LogpScaleArgs& a, void* stream) {
  return by_type(a.dtype, [&](auto type) {
    using E = decltype(type);
    const int64_t blocks = ceil_div(a.count, kStep<E>), most = 16 * multiprocessor_count();
    return launch(scale_kernel<E>, dim3(unsigned(blocks < most ? blocks : most)), dim3(kThreads), 0, stream, a);
  });
}

}  // namespace mmfast
