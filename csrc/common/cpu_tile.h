// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The register tile of all matrix products on the CPU. R rows x 2 vectors live in registers (12 x 2 accumulators on AVX-512, 6 x 2 on
// AVX2); each step loads two vectors of b and broadcasts one value of a per row, so 2 R multiply-adds stand against R + 2 loads.
#pragma once
#include "cpu_vec.h"

namespace mmfast {
namespace {

constexpr int kTileRows = W == 16 ? 12 : 6;

struct MulF32 {
  using Value = float;
  using Packed = Vec;
  static MMFAST_INLINE void step(Vec& acc, Vec b, float a) { acc += b * a; }
};

#ifdef __AVX512BF16__
struct MulBf16 {
  using Value = uint32_t;
  using Packed = VecU;
  static MMFAST_INLINE void step(Vec& acc, VecU b, uint32_t a) {
    acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32(int(a)));
  }
};
#endif

template <class Mul, int R, int V>
MMFAST_INLINE void tile(int64_t k, const typename Mul::Value* a, int64_t row, int64_t col, const typename Mul::Value* b, int64_t ldb,
                        float* c, int64_t ldc, bool accumulate) {
  Vec acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = Vec{};
  for (int64_t t = 0; t < k; ++t, a += col, b += ldb) {
    typename Mul::Packed x[V];
    for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) Mul::step(acc[r][v], x[v], a[r * row]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * W, accumulate ? load(c + r * ldc + v * W) + acc[r][v] : acc[r][v]);
}

// The m rows as tiles of almost equal height: a low tile left over would wait for its few accumulators.
template <class Mul, int V, int R>
MMFAST_INLINE void tile_of(int64_t rows, int64_t k, const typename Mul::Value* a, int64_t row, int64_t col, const typename Mul::Value* b,
                           int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if constexpr (R > 1)
    if (rows < R) return tile_of<Mul, V, R - 1>(rows, k, a, row, col, b, ldb, c, ldc, accumulate);
  // A row stride of 1 known to the compiler turns R address computations into one.
  if (row == 1) return tile<Mul, R, V>(k, a, 1, col, b, ldb, c, ldc, accumulate);
  tile<Mul, R, V>(k, a, row, col, b, ldb, c, ldc, accumulate);
}

}  // namespace
}  // namespace mmfast
