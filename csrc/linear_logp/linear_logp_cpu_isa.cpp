// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Inner loops over one row of logits, and of the products around them, in portable vectors. A piece of kPiece logits is widened (and
// capped) into a buffer that stays in L1; its maximum is found first, so that the exponentials of the piece need no correction on the way.
#include "linear_logp_cpu_isa.h"

#include "../common/cpu_tile.h"

namespace mmfast {
namespace {

constexpr int64_t kPiece = 2048;
constexpr float kLog2e = 1.4426950408889634f;

MMFAST_INLINE float max_of(Vec v) {
  float m = v[0];
  for (int l = 1; l < W; ++l) m = v[l] > m ? v[l] : m;
  return m;
}
MMFAST_INLINE float sum_of(Vec v) {
  float s = v[0];
  for (int l = 1; l < W; ++l) s += v[l];
  return s;
}
MMFAST_INLINE float exp_of(float x) { return exp2(splat(x * kLog2e))[0]; }

// tanh to an absolute 1e-7, which is what softcap multiplies.
MMFAST_INLINE Vec tanh_of(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec e = exp2(magnitude * (-2.0f * kLog2e));
  const Vec t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

// z of `count` logits in `to`, the last vector filled up with -inf. NaN passes through.
MMFAST_INLINE void widen(const void* data, DType dtype, int64_t offset, int64_t count, float temperature, float softcap, float* to) {
  load_row(data, dtype, offset, count, to);
  if (softcap != 0.0f || temperature != 1.0f) {
    const float inverse = 1.0f / temperature;
    for (int64_t i = 0; i < count; i += W) {
      Vec v = load(to + i);
      if (softcap != 0.0f) v = tanh_of(v / softcap) * softcap;
      store(to + i, v * inverse);
    }
  }
  for (int64_t i = count; i % W; ++i) to[i] = -kInf;
}

MMFAST_INLINE float top_of(const float* z, int64_t count) {
  Vec top = load(z);
  for (int64_t i = W; i < count; i += W) {
    const Vec v = load(z + i);
    top = v > top ? v : top;
  }
  return max_of(top);
}

void update(const void* z, const void* z0, DType dtype, int64_t count, int64_t first, int64_t at, float temperature, float softcap,
            bool wants_more, LogpRowState* state) {
  alignas(64) float buffer[kPiece + W], buffer0[kPiece + W];
  LogpRowState s = *state;
  for (int64_t from = 0; from < count; from += kPiece) {
    const int64_t m = count - from < kPiece ? count - from : kPiece;
    const bool here = at >= from && at < from + m;
    widen(z, dtype, from, m, temperature, softcap, buffer);
    if (here) s.label = buffer[at - from];
    const float top = top_of(buffer, m);
    if (top > s.top) {
      if (wants_more) {
        int64_t best = 0;
        while (best + 1 < m && buffer[best] != top) ++best;
        s.best = first + from + best;
      }
      const float shrink = exp_of(s.top - top);
      s.dot = s.sum > 0 ? (s.dot + s.sum * (s.top - top)) * shrink : 0.0f;
      s.sum *= shrink;
      s.square *= shrink * shrink;
      s.top = top;
    }
    const float base = s.top == -kInf ? 0.0f : s.top;
    Vec sum{}, dot{}, square{};
    if (wants_more) {
      for (int64_t i = 0; i < m; i += W) {
        const Vec v = load(buffer + i) - base, e = exp2(v * kLog2e);
        sum += e;
        dot += v == -kInf ? Vec{} : e * v;
        square += e * e;
      }
      s.dot += sum_of(dot);
      s.square += sum_of(square);
    } else {
      for (int64_t i = 0; i < m; i += W) sum += exp2((load(buffer + i) - base) * kLog2e);
    }
    s.sum += sum_of(sum);
    if (!z0) continue;
    widen(z0, dtype, from, m, temperature, softcap, buffer0);
    if (here) s.label0 = buffer0[at - from];
    const float top0 = top_of(buffer0, m);
    if (top0 > s.top0) {
      const float shrink = exp_of(s.top0 - top0);
      s.sum0 *= shrink;
      s.cross *= shrink;
      s.top0 = top0;
    }
    const float base0 = s.top0 == -kInf ? 0.0f : s.top0;
    Vec sum0{}, cross{};
    for (int64_t i = 0; i < m; i += W) {
      const Vec v0 = load(buffer0 + i), e = exp2((v0 - base0) * kLog2e);
      sum0 += e;
      cross += v0 == -kInf ? Vec{} : e * (v0 - load(buffer + i));
    }
    s.sum0 += sum_of(sum0);
    s.cross += sum_of(cross);
  }
  *state = s;
}

void grad(const void* z, const void* z0, void* grad, DType dtype, int64_t count, float temperature, float softcap, float top, float log_sum,
          float top0, float log_sum0, float a, float b, float c, float k) {
  alignas(64) float buffer[kPiece + W], buffer0[kPiece + W];
  const float inverse = 1.0f / temperature;
  for (int64_t from = 0; from < count; from += kPiece) {
    const int64_t m = count - from < kPiece ? count - from : kPiece;
    widen(z, dtype, from, m, temperature, softcap, buffer);
    if (z0) widen(z0, dtype, from, m, temperature, softcap, buffer0);
    for (int64_t i = 0; i < m; i += W) {
      const Vec v = load(buffer + i), y = v - top, p = exp2((y - log_sum) * kLog2e);
      Vec d = p * (b == 0.0f ? splat(a) : a + b * (v == -kInf ? Vec{} : y));
      d += p * p * c;
      if (z0) d -= exp2((load(buffer0 + i) - top0 - log_sum0) * kLog2e) * k;
      d *= inverse;
      if (softcap != 0.0f) {
        const Vec t = v * (temperature / softcap);
        d *= 1.0f - t * t;
      }
      store(buffer + i, d);
    }
    store_row(buffer, 1.0f, m, dtype, grad, from);
  }
}

// ---- products

constexpr int kTileColumns = 2 * W;

// One panel: to[t * Width + r] = from[r * stride + t], r < rows <= Width: rows of memory become columns, a block of W x W at a time.
template <int Width>
MMFAST_INLINE void pack_transposed(const float* from, int64_t stride, int64_t rows, int64_t k, float* to) {
  int64_t t = 0;
  for (; t + W <= k; t += W)
    for (int64_t r0 = 0; r0 < Width; r0 += W) {
      VecU block[W];
      for (int i = 0; i < W; ++i) block[i] = r0 + i < rows ? (VecU)load(from + (r0 + i) * stride + t) : VecU{};
      transpose_block(block);
      for (int i = 0; i < W; ++i) {
        float* at = to + (t + i) * Width + r0;
        // A vector that is wider than the panel may spill into the next step, which is written after it; the last one has none.
        if (Width % W == 0 || (Width < W && t + i + 1 < k)) store(at, (Vec)block[i]);
        else
          for (int64_t l = 0; l < Width - r0 && l < W; ++l) at[l] = ((Vec)block[i])[l];
      }
    }
  for (; t < k; ++t)
    for (int64_t r = 0; r < Width; ++r) to[t * Width + r] = r < rows ? from[r * stride + t] : 0.0f;
}

// One panel of rows that lie side by side: to[t * Width + r] = from[t * stride + r].
template <int Width>
MMFAST_INLINE void pack_straight(const float* from, int64_t stride, int64_t rows, int64_t k, float* to) {
  if (rows == Width)
    for (int64_t t = 0; t < k; ++t)
      for (int64_t r = 0; r < Width; ++r) to[t * Width + r] = from[t * stride + r];
  else
    for (int64_t t = 0; t < k; ++t)
      for (int64_t r = 0; r < Width; ++r) to[t * Width + r] = r < rows ? from[t * stride + r] : 0.0f;
}

template <int Width>
MMFAST_INLINE void pack(const float* from, int64_t across, int64_t along, int64_t count, int64_t k, float* to) {
  for (int64_t first = 0; first < count; first += Width, to += k * Width) {
    const int64_t rows = count - first < Width ? count - first : Width;
    if (along == 1) pack_transposed<Width>(from + first * across, across, rows, k, to);
    else pack_straight<Width>(from + first, along, rows, k, to);
  }
}

void pack_a(const float* from, int64_t row, int64_t col, int64_t m, int64_t k, float* to) { pack<kTileRows>(from, row, col, m, k, to); }
void pack_b(const float* from, int64_t row, int64_t col, int64_t k, int64_t n, float* to) { pack<kTileColumns>(from, col, row, n, k, to); }

MMFAST_INLINE void tile_at(int64_t rows, int64_t columns, int64_t k, const float* a, const float* b, float* c, int64_t ldc,
                           bool accumulate) {
  if (rows == kTileRows && columns == kTileColumns)
    return tile<MulF32, kTileRows, 2>(k, a, 1, kTileRows, b, kTileColumns, c, ldc, accumulate);
  float whole[kTileRows * kTileColumns];  // a ragged tile goes through a whole one
  tile<MulF32, kTileRows, 2>(k, a, 1, kTileRows, b, kTileColumns, whole, kTileColumns, false);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) {
      float& to = c[r * ldc + j];
      to = accumulate ? to + whole[r * kTileColumns + j] : whole[r * kTileColumns + j];
    }
}

void block(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c, int64_t ldc, bool accumulate, bool a_stays) {
  const auto at = [&](int64_t i, int64_t j) {
    const int64_t rows = m - i < kTileRows ? m - i : kTileRows, columns = n - j < kTileColumns ? n - j : kTileColumns;
    tile_at(rows, columns, k, a + i * k, b + j * k, c + i * ldc + j, ldc, accumulate);
  };
  if (a_stays)
    for (int64_t i = 0; i < m; i += kTileRows)
      for (int64_t j = 0; j < n; j += kTileColumns) at(i, j);
  else
    for (int64_t j = 0; j < n; j += kTileColumns)
      for (int64_t i = 0; i < m; i += kTileRows) at(i, j);
}

const LogpCpuKernels kKernels = {update, grad, kTileRows, kTileColumns, pack_a, pack_b, block};

}  // namespace

#define MMFAST_JOIN2(a, b) a##b
#define MMFAST_JOIN(a, b) MMFAST_JOIN2(a, b)
const LogpCpuKernels* MMFAST_JOIN(logp_cpu_kernels_, MMFAST_ISA)() { return &kKernels; }

}  // namespace mmfast
