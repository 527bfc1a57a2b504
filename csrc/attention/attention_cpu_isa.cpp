// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Inner loops of CPU attention, written once in the compiler's portable vectors and compiled per instruction set: CMake defines
// MMFAST_ISA (the suffix) and MMFAST_LANES (floats a register) and sets the flags.
//
// gemm: all seven products of forward and backward are this one, made of the tiles of cpu_tile.h. `a` may be walked either way, which is
// why scores are never transposed between their uses.
#include "attention_cpu_isa.h"

#include "../common/cpu_tile.h"

namespace mmfast {
namespace {

// ---- products

template <class Mul, int V>
void columns(int64_t m, int64_t k, const typename Mul::Value* a, int64_t row, int64_t col, const typename Mul::Value* b, int64_t ldb,
             float* c, int64_t ldc, bool accumulate) {
  for (int64_t i = 0, tiles = (m + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t rows = (m - i + tiles - 1) / tiles;
    tile_of<Mul, V, kTileRows>(rows, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, accumulate);
    i += rows;
  }
}

template <class Mul>
MMFAST_INLINE void product(int64_t m, int64_t n, int64_t k, const typename Mul::Value* a, int64_t row, int64_t col,
                           const typename Mul::Value* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) columns<Mul, 2>(m, k, a, row, col, b + j, ldb, c + j, ldc, accumulate);
  if (j < n) columns<Mul, 1>(m, k, a, row, col, b + j, ldb, c + j, ldc, accumulate);
}

void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, int64_t col, const float* b, int64_t ldb, float* c, int64_t ldc,
          bool accumulate) {
  product<MulF32>(m, n, k, a, row, col, b, ldb, c, ldc, accumulate);
}
#ifdef __AVX512BF16__
void gemm_bf16(int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t row, int64_t col, const uint32_t* b, int64_t ldb, float* c,
               int64_t ldc, bool accumulate) {
  product<MulBf16>(m, n, k, a, row, col, b, ldb, c, ldc, accumulate);
}
#endif

// ---- softmax

// The scores of one vector of rows at one key, or `hidden` where the row does not see the key.
template <bool Masked>
MMFAST_INLINE Vec seen(Vec s, const AttentionTileMask& mask, int64_t key, int64_t lane, Vec hidden) {
  if constexpr (!Masked) return s;
  if (mask.valid && !mask.valid[key]) return hidden;
  if (mask.limit) return int32_t(key) < *reinterpret_cast<const VecIM*>(mask.limit + lane) ? s : hidden;
  return s;
}

template <bool Masked>
bool softmax_rows(const AttentionSoftmaxTile& t, int64_t lane) {
  const Vec hidden = splat(t.c < 0 ? kInf : -kInf);
  Vec top = load(t.top + lane);
  const Vec before = top;
  for (int64_t j = 0; j < t.keys; ++j) {
    const Vec s = seen<Masked>(load(t.s + j * t.n + lane), t.mask, j, lane, hidden) * t.c;
    top = s > top ? s : top;
  }
  const Vec base = top == -kInf ? Vec{} : top;  // nothing seen yet: any finite base gives weights of 0
  Vec total{};
  Vec even{};
  for (int64_t j = 0; j < t.keys; ++j) {
    float* at = t.s + j * t.n + lane;
    Vec p = exp2(seen<Masked>(load(at), t.mask, j, lane, hidden) * t.c - base);
    total += p;
    if (t.mask.keep) p *= load(t.mask.keep + j * t.n + lane);
    if (!t.pairs) {
      store(at, p);
    } else if (j % 2) {
      store(t.pairs + j / 2 * t.n + lane, pair_bf16(even, p));
    } else {
      even = p;
      if (j + 1 == t.keys) store(t.pairs + j / 2 * t.n + lane, pair_bf16(p, Vec{}));
    }
  }
  const Vec rescale = exp2(before - base);
  store(t.top + lane, top);
  store(t.total + lane, load(t.total + lane) * rescale + total);
  store(t.rescale + lane, rescale);
  bool moved = false;
  for (int l = 0; l < W; ++l) moved |= top[l] != before[l];
  return moved;
}

bool softmax(const AttentionSoftmaxTile& t) {
  bool moved = false;
  const bool masked = t.mask.limit || t.mask.valid;
  for (int64_t lane = 0; lane < t.n; lane += W) moved |= masked ? softmax_rows<true>(t, lane) : softmax_rows<false>(t, lane);
  return moved;
}

template <bool Masked>
void grad_rows(const AttentionGradTile& t, int64_t lane) {
  const Vec hidden = splat(t.c < 0 ? kInf : -kInf), lse2 = load(t.lse2 + lane), delta = load(t.delta + lane);
  Vec even{};
  for (int64_t j = 0; j < t.keys; ++j) {
    const int64_t at = j * t.n + lane;
    Vec p = exp2(seen<Masked>(load(t.s + at), t.mask, j, lane, hidden) * t.c - lse2);
    Vec dp = load(t.dp + at), ds;
    if (t.mask.keep) {
      const Vec keep = load(t.mask.keep + at);
      ds = p * (dp * keep - delta);
      p *= keep;
    } else {
      ds = p * (dp - delta);
    }
    if (!t.p_rows) {
      store(t.s + at, p);
      store(t.dp + at, ds);
      continue;
    }
    store(t.p_rows + at, to_bf16(p));
    store(t.ds_rows + at, to_bf16(ds));
    if (j % 2) {
      store(t.ds_pairs + j / 2 * t.n + lane, pair_bf16(even, ds));
    } else {
      even = ds;
      if (j + 1 == t.keys) store(t.ds_pairs + j / 2 * t.n + lane, pair_bf16(ds, Vec{}));
    }
  }
}

void grad(const AttentionGradTile& t) {
  const bool masked = t.mask.limit || t.mask.valid;
  for (int64_t lane = 0; lane < t.n; lane += W) masked ? grad_rows<true>(t, lane) : grad_rows<false>(t, lane);
}

// ---- dropout

typedef uint64_t VecL __attribute__((vector_size(4 * W)));  // half as many lanes of 64 bits

// Products of the low halves of 64-bit lanes, whatever their high halves hold. Written as a * b, it compiles to a full 64-bit multiply.
MMFAST_INLINE VecL multiply_low(VecL a, uint32_t b) {
#if MMFAST_LANES == 16
  return (VecL)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(int64_t(b)));  // unmasked, GCC 12 warns about its own header
#elif MMFAST_LANES == 8
  return (VecL)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(int64_t(b)));
#else
  return (a & 0xffffffffu) * uint64_t(b);
#endif
}

// Philox with the even rows in one half and the odd rows in the other, so that a product needs no shuffling; high halves of lanes are
// left as they come, for nothing reads them.
void dropout(float* keep, int64_t keys, int64_t n, int64_t seed, int64_t bh, int64_t first_row, int64_t first_key, int segment,
             uint32_t threshold) {
  const float kept = 65536.0f / float(65536u - threshold);
  VecL lane_rows[2];
  for (int l = 0; l < W; ++l) lane_rows[l % 2][l / 2] = uint64_t(l);
  for (int64_t lane = 0; lane < n; lane += W)
    for (int64_t j0 = 0; j0 < keys; j0 += 32)
      for (int quad = 0; quad < 4; ++quad) {  // a Philox call for keys j0 + 8 word + 2 quad + {0, 1}
        VecL c[2][4];
        for (int half = 0; half < 2; ++half) {
          c[half][0] = VecL{} + uint64_t((first_key + j0) / 32 * 4 + quad);
          c[half][1] = lane_rows[half] + uint64_t(first_row + lane);
          c[half][2] = VecL{} + uint64_t(bh);
          c[half][3] = VecL{} + uint64_t(segment);
        }
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(uint64_t(seed) >> 32);
        for (int round = 0; round < 10; ++round) {
          for (auto& h : c) {
            const VecL p0 = multiply_low(h[0], 0xD2511F53u), p1 = multiply_low(h[2], 0xCD9E8D57u);
            h[0] = (p1 >> 32) ^ h[1] ^ uint64_t(k0);
            h[2] = (p0 >> 32) ^ h[3] ^ uint64_t(k1);
            h[1] = p1;
            h[3] = p0;
          }
          k0 += 0x9E3779B9u;
          k1 += 0xBB67AE85u;
        }
        for (int word = 0; word < 4; ++word) {
          const VecU bits = (VecU)((c[0][word] & 0xffffffffu) | (c[1][word] << 32));
          const int64_t j = j0 + 8 * word + 2 * quad;
          if (j < keys) store(keep + j * n + lane, (VecI)(bits & 0xffffu) >= int32_t(threshold) ? splat(kept) : Vec{});
          if (j + 1 < keys) store(keep + (j + 1) * n + lane, (VecI)(bits >> 16) >= int32_t(threshold) ? splat(kept) : Vec{});
        }
      }
}

// ---- moving and converting

void load_rows(const void* data, DType dtype, int64_t stride, int64_t rows, int64_t D, float* to, int64_t padded_rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    load_row(data, dtype, r * stride, D, to + r * width);
    for (int64_t d = D; d < width; ++d) to[r * width + d] = 0;
  }
  for (int64_t i = rows * width; i < padded_rows * width; ++i) to[i] = 0;
}

void copy_rows(const uint16_t* data, int64_t stride, int64_t rows, int64_t D, uint16_t* to, int64_t padded_rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {  // rows are too short for a call to memcpy to pay
    const uint16_t* from = data + r * stride;
    uint16_t* row = to + r * width;
    int64_t d = 0;
    for (; d + W <= D; d += W) *reinterpret_cast<VecHM*>(row + d) = *reinterpret_cast<const VecHM*>(from + d);
    for (; d < D; ++d) row[d] = from[d];
    for (; d < width; ++d) row[d] = 0;
  }
  for (int64_t i = rows * width; i < padded_rows * width; ++i) to[i] = 0;
}

void transpose(const uint32_t* from, int64_t rows, int64_t width, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += W) {
    int64_t c = 0;
    for (; c + W <= width; c += W) {
      VecU block[W];
      for (int i = 0; i < W; ++i) block[i] = load(from + (r + i) * width + c);
      transpose_block(block);
      for (int i = 0; i < W; ++i) store(to + (c + i) * rows + r, block[i]);
    }
    for (; c < width; ++c)
      for (int i = 0; i < W; ++i) to[c * rows + r + i] = from[(r + i) * width + c];
  }
}

void interleave(const uint16_t* from, int64_t rows, int64_t width, int64_t columns, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += 2, to += columns) {
    const uint16_t *a = from + r * width, *b = a + width;
    int64_t c = 0;
    for (; c + W <= width && c + W <= columns; c += W)
      store(to + c, __builtin_convertvector(*reinterpret_cast<const VecHM*>(a + c), VecU) |
                        (__builtin_convertvector(*reinterpret_cast<const VecHM*>(b + c), VecU) << 16));
    for (; c < columns; ++c) to[c] = c < width ? uint32_t(a[c]) | uint32_t(b[c]) << 16 : 0;
  }
}

void store(const float* from, float factor, int64_t D, DType dtype, void* to, int64_t offset) {
  store_row(from, factor, D, dtype, to, offset);
}

void scale_rows(float* rows, int64_t count, int64_t width, const float* factor) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < width; d += W) store(rows + r * width + d, load(rows + r * width + d) * factor[r]);
}

float dot(const float* a, const float* b, int64_t count) {
  Vec sum{};
  int64_t d = 0;
  for (; d + W <= count; d += W) sum += load(a + d) * load(b + d);
  float total = 0;
  for (int l = 0; l < W; ++l) total += sum[l];
  for (; d < count; ++d) total += a[d] * b[d];
  return total;
}

const AttentionCpuKernels kKernels = {
    W,         gemm,
#ifdef __AVX512BF16__
    gemm_bf16,
#else
    nullptr,
#endif
    softmax,   grad, dropout, load_rows, copy_rows, transpose, interleave, store, scale_rows, dot,
};

}  // namespace

#define MMFAST_JOIN2(a, b) a##b
#define MMFAST_JOIN(a, b) MMFAST_JOIN2(a, b)
const AttentionCpuKernels* MMFAST_JOIN(attention_cpu_kernels_, MMFAST_ISA)() { return &kKernels; }

}  // namespace mmfast
