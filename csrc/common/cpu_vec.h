// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The compiler's portable vectors for code that CMake compiles once per instruction set (MMFAST_LANES floats a register): loads, stores,
// conversion and exponential. Everything has internal linkage, so that no copy for a newer machine can be linked into code for an older.
#pragma once
#include <cstdint>

#include "dtype.h"

#if MMFAST_LANES > 4
#include <immintrin.h>
#endif

#define MMFAST_INLINE inline __attribute__((always_inline, unused))

namespace mmfast {
namespace {

constexpr int W = MMFAST_LANES;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t VecI __attribute__((vector_size(4 * W)));
typedef uint32_t VecU __attribute__((vector_size(4 * W)));
typedef uint16_t VecH __attribute__((vector_size(2 * W)));
typedef Vec VecM __attribute__((aligned(4), may_alias));
typedef VecI VecIM __attribute__((aligned(4), may_alias));
typedef VecU VecUM __attribute__((aligned(4), may_alias));
typedef VecH VecHM __attribute__((aligned(2), may_alias));

MMFAST_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecM*>(p); }
MMFAST_INLINE VecU load(const uint32_t* p) { return *reinterpret_cast<const VecUM*>(p); }
MMFAST_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecM*>(p) = v; }
MMFAST_INLINE void store(uint32_t* p, VecU v) { *reinterpret_cast<VecUM*>(p) = v; }
MMFAST_INLINE void store(uint16_t* p, VecH v) { *reinterpret_cast<VecHM*>(p) = v; }
MMFAST_INLINE Vec splat(float v) { return Vec{} + v; }

constexpr float kInf = __builtin_inff();

// ---- exponential

// 2^x for x <= 0 (a little above is fine), relative error below 8e-8 and exact at 0; 0 below 2^-125. x is split into an integer, which goes
// into the exponent's bits, and a rest in [-.5, .5], for which a polynomial of degree 6 is fitted (least maximum relative error 1.9e-9).
MMFAST_INLINE Vec exp2(Vec x) {
  const Vec shifted = x + 12582912.0f;  // 1.5 2^23: the sum's low bits are x rounded
  const Vec f = x - (shifted - 12582912.0f);
  Vec p = f * 0.00015345812158740183f + 0.001339993120947414f;
  p = p * f + 0.009618488956522791f;
  p = p * f + 0.055503287769976636f;
  p = p * f + 0.24022646890639573f;
  p = p * f + 0.6931472057372526f;
  p = p * f + 1.0f;
  const Vec y = (Vec)((VecI)p + ((VecI)shifted << 23));
  return x < -125.0f ? Vec{} : y;
}

// Nearest bf16, ties to even, in the upper half of each word. Finite values.
MMFAST_INLINE VecU round_bf16(Vec v) {
  const VecU u = (VecU)v;
  return u + 0x7fffu + ((u >> 16) & 1u);
}
#ifdef __AVX512BF16__
MMFAST_INLINE VecH to_bf16(Vec v) { return (VecH)_mm512_cvtneps_pbh((__m512)v); }
MMFAST_INLINE VecU pair_bf16(Vec low, Vec high) {
  typedef uint16_t Words __attribute__((vector_size(4 * W)));
  Words order;
  for (int l = 0; l < W; ++l) {
    order[2 * l] = uint16_t(l);
    order[2 * l + 1] = uint16_t(W + l);
  }
  return (VecU)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#else
MMFAST_INLINE VecH to_bf16(Vec v) { return __builtin_convertvector(round_bf16(v) >> 16, VecH); }
MMFAST_INLINE VecU pair_bf16(Vec low, Vec high) { return (round_bf16(low) >> 16) | (round_bf16(high) & 0xffff0000u); }
#endif

// ---- transposition

// W rows of W words: log2(W) rounds, each interleaving row i with row i + W / 2.
MMFAST_INLINE void transpose_block(VecU (&row)[W]) {
  VecI low, high;
  for (int l = 0; l < W; ++l) {
    low[l] = l / 2 + (l % 2) * W;
    high[l] = W / 2 + l / 2 + (l % 2) * W;
  }
#pragma GCC unroll 4
  for (int step = W; step > 1; step /= 2) {
    VecU next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(row[i], row[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(row[i], row[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) row[i] = next[i];
  }
}

// ---- rows of any type

MMFAST_INLINE float half_to_float(uint16_t h) {  // written out here rather than called: see the header on inline functions
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, body = uint32_t(h & 0x7fffu) << 13;
  float v;
  __builtin_memcpy(&v, &body, 4);
  v *= 5.192296858534828e33f;  // 2^112
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  if ((h & 0x7c00u) == 0x7c00u) bits = 0x7f800000u | body;
  bits |= sign;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}
MMFAST_INLINE uint16_t float_to_half(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (a < 0x38800000u) {
    float r;
    __builtin_memcpy(&r, &a, 4);
    r += 0.5f;
    __builtin_memcpy(&u, &r, 4);
    return uint16_t(sign | (u - 0x3f000000u));
  }
  return uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
}

MMFAST_INLINE void load_row(const void* data, DType dtype, int64_t offset, int64_t D, float* to) {
  int64_t d = 0;
  if (dtype == DType::f32) {
    const float* p = static_cast<const float*>(data) + offset;
    for (; d + W <= D; d += W) store(to + d, load(p + d));
    for (; d < D; ++d) to[d] = p[d];
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(data) + offset;
  if (dtype == DType::bf16) {
    for (; d + W <= D; d += W) store(to + d, (Vec)(__builtin_convertvector(*reinterpret_cast<const VecHM*>(p + d), VecU) << 16));
    for (; d < D; ++d) {
      const uint32_t bits = uint32_t(p[d]) << 16;
      __builtin_memcpy(to + d, &bits, 4);
    }
    return;
  }
#ifdef __F16C__
  for (; d + 8 <= D; d += 8) _mm256_storeu_ps(to + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + d))));
#endif
  for (; d < D; ++d) to[d] = half_to_float(p[d]);
}

MMFAST_INLINE void store_row(const float* from, float factor, int64_t D, DType dtype, void* data, int64_t offset) {
  int64_t d = 0;
  if (dtype == DType::f32) {
    float* to = static_cast<float*>(data) + offset;
    for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
    for (; d < D; ++d) to[d] = from[d] * factor;
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(data) + offset;
  if (dtype == DType::bf16) {
    for (; d + W <= D; d += W) {
      const Vec v = load(from + d) * factor;
      store(to + d, __builtin_convertvector((v == v ? round_bf16(v) >> 16 : VecU{} + 0x7fc0u), VecH));
    }
    for (; d < D; ++d) {
      const float v = from[d] * factor;
      uint32_t u;
      __builtin_memcpy(&u, &v, 4);
      to[d] = v == v ? uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
    }
    return;
  }
#ifdef __F16C__
  for (; d + 8 <= D; d += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d),
                     _mm256_cvtps_ph(_mm256_mul_ps(_mm256_loadu_ps(from + d), _mm256_set1_ps(factor)), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; d < D; ++d) to[d] = float_to_half(from[d] * factor);
}

}  // namespace
}  // namespace mmfast
