// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Inner loops of the CPU search, written once in the compiler's portable vectors and compiled per instruction set:
// CMake defines MMFAST_ISA (the suffix) and MMFAST_LANES (floats a register) and sets the flags.
//
// screen: a tile of R rows x one panel of 2 vectors of codes lives in registers (12 x 2 accumulators on AVX-512, 6 x 2 on AVX2);
// each step loads two vectors of codes and broadcasts one value a row, so 2 R multiply-adds stand against R + 2 loads. The
// panel's result never leaves the registers: it is turned into lower bounds and folded into the lanes' running minima.
#include "vq_cpu_isa.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace mmfast {
namespace {

constexpr int W = MMFAST_LANES;
constexpr int kTileRows = W == 16 ? 12 : 6;
constexpr int kWidth = 2 * W;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t VecI __attribute__((vector_size(4 * W)));
typedef Vec VecU __attribute__((aligned(4), may_alias));
typedef VecI VecIU __attribute__((aligned(4), may_alias));

inline __attribute__((always_inline)) Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline __attribute__((always_inline)) VecI iota(int32_t base) {
  VecI v;
  for (int l = 0; l < W; ++l) v[l] = base + l;
  return v;
}
inline __attribute__((always_inline)) Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
inline __attribute__((always_inline)) Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

// Lower bounds of one vector of codes into the running two smallest. A NaN bound compares false and stays out; its row is caught by
// its own non-finite radius.
inline __attribute__((always_inline)) void fold(Vec bound, VecI code, VqLanes& lanes, int half) {
  VecU* best = reinterpret_cast<VecU*>(lanes.best) + half;
  VecU* second = reinterpret_cast<VecU*>(lanes.second) + half;
  VecIU* index = reinterpret_cast<VecIU*>(lanes.index) + half;
  Vec b = *best;
  *second = vmin(*second, vmax(bound, b));
  *index = bound < b ? code : static_cast<VecI>(*index);
  *best = vmin(bound, b);
}

struct StepF32 {
  using Value = float;
  static inline __attribute__((always_inline)) void step(Vec& acc, Vec code, Value x) { acc += code * x; }
};

#ifdef __AVX512BF16__
struct StepBf16 {
  using Value = uint32_t;
  static inline __attribute__((always_inline)) void step(Vec& acc, Vec code, Value x) {
    acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)code, (__m512bh)_mm512_set1_epi32(int(x)));
  }
};
#endif

template <class Step, int R>
void tile_panels(const VqScreenTile& t, int row0) {
  using Value = typename Step::Value;
  const Value* x = static_cast<const Value*>(t.x) + row0 * t.ldx;
  for (int64_t p = 0; p < t.panel_count; ++p) {
    const float* code = static_cast<const float*>(t.panels) + p * t.depth * kWidth;
    Vec acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Vec{};
    for (int64_t d = 0; d < t.depth; ++d, code += kWidth) {
      Vec c0 = load(code), c1 = load(code + W);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        Value v = x[r * t.ldx + d];
        Step::step(acc[r][0], c0, v);
        Step::step(acc[r][1], c1, v);
      }
    }
    const float* norm = t.norms + p * kWidth;
    Vec n0 = load(norm), n1 = load(norm + W);
    VecI code0 = iota(t.first_code + int32_t(p) * kWidth), code1 = code0 + W;
    float a = t.radius_a[p], b = t.radius_b[p], c = t.radius_c[p];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      float radius = t.alpha[row0 + r] * a + t.beta[row0 + r] * b + c;
      fold((acc[r][0] - radius) + n0, code0, t.lanes[row0 + r], 0);
      fold((acc[r][1] - radius) + n1, code1, t.lanes[row0 + r], 1);
    }
  }
}

template <class Step>
void screen(const VqScreenTile& t) {
  if (t.rows == kTileRows) return tile_panels<Step, kTileRows>(t, 0);
  int row = 0;
  for (; row + 4 <= t.rows; row += 4) tile_panels<Step, 4>(t, row);
  for (; row < t.rows; ++row) tile_panels<Step, 1>(t, row);
}

template <class T, class Convert>
inline void load_strided(const void* data, int64_t offset, int64_t stride, int64_t count, double* out, Convert convert) {
  const T* p = static_cast<const T*>(data) + offset;
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = convert(p[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = convert(p[i * stride]);
}

void load_row(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t count, double* out) {
  switch (dtype) {
    case DType::f32:
      return load_strided<float>(data, offset, stride, count, out, [](float v) { return double(v); });
    case DType::f64:
      return load_strided<double>(data, offset, stride, count, out, [](double v) { return v; });
    // Written out here rather than called: see the header on inline functions.
    case DType::bf16:
      return load_strided<uint16_t>(data, offset, stride, count, out, [](uint16_t v) {
        uint32_t bits = uint32_t(v) << 16;
        float f;
        __builtin_memcpy(&f, &bits, 4);
        return double(f);
      });
    case DType::f16:
      return load_strided<uint16_t>(data, offset, stride, count, out, [](uint16_t v) {
        // Sign, exponent and mantissa moved into a double, whose exponent range takes f16 subnormals as normal numbers.
        uint64_t body = uint64_t(v & 0x7fffu) << 42, special = (v & 0x7c00u) == 0x7c00u;
        double d;
        __builtin_memcpy(&d, &body, 8);
        d *= 0x1p1008;
        uint64_t bits;
        __builtin_memcpy(&bits, &d, 8);
        bits = (special ? 0x7ff0000000000000ull | body : bits) | uint64_t(v & 0x8000u) << 48;
        __builtin_memcpy(&d, &bits, 8);
        return d;
      });
  }
}

typedef double VecD __attribute__((vector_size(64)));
typedef VecD VecDU __attribute__((aligned(8), may_alias));

// Two vectors of eight partial sums on every instruction set, so that the order of additions is the same on all machines.
template <bool kDistance>
inline double reduce_pair(const double* x, const double* y, int64_t count) {
  VecD sum0 = {}, sum1 = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    VecD x0 = *reinterpret_cast<const VecDU*>(x + i), x1 = *reinterpret_cast<const VecDU*>(x + i + 8);
    VecD y0 = *reinterpret_cast<const VecDU*>(y + i), y1 = *reinterpret_cast<const VecDU*>(y + i + 8);
    if (kDistance) {
      x0 -= y0;
      x1 -= y1;
      sum0 += x0 * x0;
      sum1 += x1 * x1;
    } else {
      sum0 += x0 * y0;
      sum1 += x1 * y1;
    }
  }
  sum0 += sum1;
  double sum = ((sum0[0] + sum0[4]) + (sum0[2] + sum0[6])) + ((sum0[1] + sum0[5]) + (sum0[3] + sum0[7]));
  for (; i < count; ++i) {
    double d = x[i] - y[i];
    sum += kDistance ? d * d : x[i] * y[i];
  }
  return sum;
}

double square_distance(const double* x, const double* y, int64_t count) { return reduce_pair<true>(x, y, count); }
double dot(const double* x, const double* y, int64_t count) { return reduce_pair<false>(x, y, count); }

inline double total(VecD v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

typedef float VecF8 __attribute__((vector_size(32)));
typedef uint32_t VecU8 __attribute__((vector_size(32)));
typedef uint16_t VecH8 __attribute__((vector_size(16)));

template <bool kBf16>
VqLowered lower(const double* x, const double* mean, double scale, float factor, int64_t count, uint32_t* out) {
  VecD norm = {}, kept = {}, residual = {};
  auto eight = [&](VecD v, void* to, int64_t bytes) __attribute__((always_inline)) {
    VecF8 f = __builtin_convertvector(v, VecF8);
    VecU8 bits;
    if (kBf16) {  // nearest even on the upper 16 bits; subnormals become zero, as the processor's bf16 products read them
      __builtin_memcpy(&bits, &f, 32);
      bits = (bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u;
      bits = (bits & 0x7f800000u) != 0 ? bits : VecU8{};
      __builtin_memcpy(&f, &bits, 32);
    }
    VecD k = __builtin_convertvector(f, VecD);
    norm += v * v;
    kept += k * k;
    residual += (v - k) * (v - k);
    f *= factor;
    if (kBf16) {
      __builtin_memcpy(&bits, &f, 32);
      VecH8 half = __builtin_convertvector(bits >> 16, VecH8);
      __builtin_memcpy(to, &half, size_t(bytes));
    } else {
      __builtin_memcpy(to, &f, size_t(bytes));
    }
  };
  constexpr int64_t kBytes = kBf16 ? 2 : 4;
  char* to = reinterpret_cast<char*>(out);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    VecD v = *reinterpret_cast<const VecDU*>(x + i);
    if (mean) v -= *reinterpret_cast<const VecDU*>(mean + i);
    eight(v * scale, to + i * kBytes, 8 * kBytes);
  }
  if (i < count) {
    VecD v = {};
    for (int64_t l = 0; i + l < count; ++l) v[l] = (mean ? x[i + l] - mean[i + l] : x[i + l]) * scale;
    // An odd count leaves half a bf16 word, which must be zero.
    eight(v, to + i * kBytes, kBf16 ? (count - i + 1) / 2 * 4 : (count - i) * 4);
  }
  return {total(norm), total(kept), total(residual)};
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MMFAST_SHUFFLE 1
#endif
#endif

#ifdef MMFAST_SHUFFLE
typedef uint32_t VecW __attribute__((vector_size(4 * W)));
typedef VecW VecWU __attribute__((aligned(4), may_alias));

template <int... I>
struct Lanes {
  // a0 b0 a1 b1 .. of the first or of the second halves
  static inline __attribute__((always_inline)) VecW low(VecW a, VecW b) { return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * W)...); }
  static inline __attribute__((always_inline)) VecW high(VecW a, VecW b) {
    return __builtin_shufflevector(a, b, (W / 2 + I / 2 + (I % 2) * W)...);
  }
};
#if MMFAST_LANES == 16
using Zip = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif MMFAST_LANES == 8
using Zip = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using Zip = Lanes<0, 1, 2, 3>;
#endif

// A W x W block transposed by log2 W rounds of zipping row i with row i + W / 2.
inline void transpose_block(const uint32_t* rows, int64_t ld, uint32_t* out, int64_t ld_out) {
  VecW a[W], b[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) a[i] = *reinterpret_cast<const VecWU*>(rows + i * ld);
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      b[2 * i] = Zip::low(a[i], a[i + W / 2]);
      b[2 * i + 1] = Zip::high(a[i], a[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) *reinterpret_cast<VecWU*>(out + i * ld_out) = a[i];
}
#endif

void transpose_panel(const uint32_t* rows, int64_t depth, uint32_t* tile) {
  int64_t d = 0;
#ifdef MMFAST_SHUFFLE
  for (; d + W <= depth; d += W)
    for (int c = 0; c < kWidth; c += W) transpose_block(rows + c * depth + d, depth, tile + d * kWidth + c, kWidth);
#endif
  for (; d < depth; ++d)
    for (int c = 0; c < kWidth; ++c) tile[d * kWidth + c] = rows[c * depth + d];
}

constexpr VqCpuKernels kKernels = {
    kWidth,
    kTileRows,
    &screen<StepF32>,
#ifdef __AVX512BF16__
    &screen<StepBf16>,
#else
    nullptr,
#endif
    &load_row,
    &square_distance,
    &dot,
    &lower<false>,
    &lower<true>,
    &transpose_panel,
};

}  // namespace

#define MMFAST_CONCAT_(a, b) a##b
#define MMFAST_CONCAT(a, b) MMFAST_CONCAT_(a, b)
const VqCpuKernels* MMFAST_CONCAT(vq_cpu_kernels_, MMFAST_ISA)() { return &kKernels; }

}  // namespace mmfast
