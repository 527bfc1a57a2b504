// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Attention on tensor cores, for head widths up to 128. Four kernels out of two products:
//
//   scores   s = X Y'    X: 16 rows of a warp, Y: a tile of rows in shared memory, both row-major (the sum runs along D)
//   apply    o += s Y    s: the accumulator of a scores product, used as it lies in registers
//
//   forward      rows stay, keys stream     S = scores(Q, K), online softmax, O = apply(P, V)
//   grad_rows    rows stay, keys stream     S, dP = scores(dO, V), dS = P (dP - delta), dQ = apply(dS, K)
//   grad_keys    keys stay, rows stream     S' = scores(K, Q), dP' = scores(V, dO), dV = apply(P', dO), dK = apply(dS', Q)
//   grad_few     up to 64 rows, all of a head in one CTA, keys stream once: grad_rows, and dV, dK of each tile of keys through a P and dS
//                tile in shared memory. The case of the perceiver and the Q-Former: keys and values are read once, their gradients written
//                once, which is all the traffic that matters there.
//
// A CTA is 1 to 4 warps of 16 rows (keys). Tiles stream through two buffers by cp.async; a tile that nobody sees is not fetched, and what
// a row sees is computed (attention_row), never read. No atomics on floating point: a key's gradient is one CTA's sum in a fixed order,
// and where the keys are split over CTAs the partial results are added in order by one more kernel. So results repeat bit by bit.
//
// Types: f16 and bf16 through m16n8k16; f32 through m16n8k8 in tf32, each operand split into a big and a small part and three products
// taken (3xTF32: about 22 bits). Softmax, sums and accumulators are fp32.
//
// Bound by: memory wherever rows are few (32 to 64 rows make 28 to 62 operations a byte; about 180 are needed), else by the tensor pipe
// and the shared memory that feeds it. Sources: FlashAttention-2 (arXiv:2307.08691), 3xTF32 as in Ootomo and Yokota (arXiv:2203.03341).
#pragma once
#include "../common/cuda.cuh"
#include "attention.h"

namespace mmfast {

// ---- sizes that launchers and kernels share

constexpr int kAttentionMaxWidth = 128;  // wider heads take the plain kernels
MMFAST_HD constexpr int attention_width(int64_t D) { return D <= 32 ? 32 : D <= 64 ? 64 : D <= 96 ? 96 : 128; }
// Keys of a streamed tile, and rows of one in grad_keys: what the registers have room for.
MMFAST_HD constexpr int attention_tile_keys(bool f32, bool backward) { return f32 || backward ? 32 : 64; }
MMFAST_HD constexpr int attention_tile_rows(bool f32) { return f32 ? 16 : 32; }
MMFAST_HD constexpr int attention_row_bytes(bool f32, int width) {
  return width * (f32 ? 4 : 2) + 16;
}  // of a tile: rows fall on different banks
constexpr int kAttentionOwnKeys = 64;  // keys of a CTA in grad_keys
constexpr int kAttentionFewRows = 64;  // the most rows of grad_few

// What the launchers decided; see attention_cuda.cu.
struct AttentionPlan {
  int warps;          // of a CTA; 16 rows each
  int tiles;          // of rows, a head
  int splits;         // runs that the keys are cut into
  bool aligned;       // inputs may be copied 16 bytes at a time
  bool pairs;         // outputs may be stored two elements at a time
  float c;            // scale log2(e)
  float* part_out;    // [splits, B, H, Nq, D]: each run's output before division, or its share of grad_q
  float* part_state;  // [splits, B, H, Nq, 2]: each run's maximum of c s, and its sum of weights
  float* delta;       // [B, H, Nq]: out . grad_out - grad_lse
  size_t shared;      // bytes a CTA
};

template <DType kType>
int attention_forward_tiles(const AttentionArgs&, const AttentionPlan&, void* stream);
template <DType kType>
int attention_grad_rows_tiles(const AttentionBackwardArgs&, const AttentionPlan&, void* stream);
template <DType kType>
int attention_grad_keys_tiles(const AttentionBackwardArgs&, const AttentionPlan&, void* stream);
template <DType kType>
int attention_grad_few_tiles(const AttentionBackwardArgs&, const AttentionPlan&, void* stream);
template <DType kType>
int attention_delta(const AttentionBackwardArgs&, const AttentionPlan&, void* stream);

#ifdef MMFAST_ATTENTION_KERNELS
namespace {

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ int lane_id() { return int(threadIdx.x) % 32; }
__device__ int warp_id() { return int(threadIdx.x) / 32; }

// ---- the two products, for each type. Fragment layouts: lane = 4 g + t holds of an accumulator rows g and g + 8, columns 2 t and 2 t + 1
// of every 8: c[0], c[1] in row g, c[2], c[3] in row g + 8.

template <bool kBf16>
struct Half {
  using Elem = uint16_t;
  static constexpr int kChunk = 8;                                                         // elements of 16 bytes
  static MMFAST_HD constexpr int exchange_pitch(int columns) { return columns + kChunk; }  // of the P and dS tiles

  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    if constexpr (kBf16) mma_bf16(c, a, b);
    else mma_f16(c, a, b);
  }
  static __device__ uint32_t pack(float low, float high) { return kBf16 ? pack_bf16(low, high) : pack_f16(low, high); }
  static __device__ float widen(Elem v) { return kBf16 ? bf16_to_float(v) : f16_to_float(v); }
  static __device__ void store(Elem* to, float v) { *to = uint16_t(pack(v, 0.0f)); }
  static __device__ void store_pair(Elem* to, float x, float y) { *reinterpret_cast<uint32_t*>(to) = pack(x, y); }

  // 16 rows as the left side of scores: in registers, or read again for each product where those are scarce.
  template <int kD, bool kRegisters>
  struct Rows {
    uint32_t held[kRegisters ? kD / 16 : 1][4];
    const Elem* at;
    __device__ void load(const Elem* rows) {
      at = rows + (lane_id() % 16) * (kD + kChunk) + lane_id() / 16 * 8;
      if constexpr (kRegisters)
#pragma unroll
        for (int k = 0; k < kD / 16; ++k) ldmatrix<4>(held[k], at + k * 16);
    }
    __device__ void get(int k, uint32_t (&a)[4]) const {
      if constexpr (kRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = held[k][i];
      } else {
        ldmatrix<4>(a, at + k * 16);
      }
    }
  };

  template <int kD, int kN, bool kRegisters>
  static __device__ void scores(float (&s)[kN / 8][4], const Rows<kD, kRegisters>& rows, const Elem* y) {
    constexpr int kPitch = kD + kChunk;
    const Elem* at = y + (lane_id() % 8 + lane_id() / 16 * 8) * kPitch + lane_id() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t a[4];
      rows.get(k, a);
#pragma unroll
      for (int n = 0; n < kN / 16; ++n) {
        uint32_t b[4];
        ldmatrix<4>(b, at + n * 16 * kPitch + k * 16);
        mma(s[2 * n], a, b[0], b[1]);
        mma(s[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  template <int kColumns>
  static __device__ void apply_step(float (&o)[kColumns / 8][4], const uint32_t (&a)[4], const Elem* at) {
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      ldmatrix<4, true>(b, at + n * 16);
      mma(o[2 * n], a, b[0], b[1]);
      mma(o[2 * n + 1], a, b[2], b[3]);
    }
  }
  template <int kD, int kN>
  static __device__ void apply(float (&o)[kD / 8][4], const float (&s)[kN / 8][4], const Elem* y) {
    constexpr int kPitch = kD + kChunk;
    const Elem* at = y + (lane_id() % 16) * kPitch + lane_id() / 16 * 8;
#pragma unroll
    for (int k = 0; k < kN / 16; ++k) {
      const float (&low)[4] = s[2 * k], (&high)[4] = s[2 * k + 1];
      const uint32_t a[4] = {pack(low[0], low[1]), pack(low[2], low[3]), pack(high[0], high[1]), pack(high[2], high[3])};
      apply_step<kD>(o, a, at + k * 16 * kPitch);
    }
  }
  // o += (16 columns of such a tile)' (columns of Y), of a tile that put() filled: both pointers are at the first of the columns.
  // Both tiles have `rows` rows.
  template <int kD, int kN, int kColumns>
  static __device__ void apply_transposed(float (&o)[kColumns / 8][4], const Elem* s, const Elem* y, int rows) {
    constexpr int kPitch = kD + kChunk, kFrom = exchange_pitch(kN);
    const Elem* from = s + (lane_id() / 16 * 8 + lane_id() % 8) * kFrom + lane_id() / 8 % 2 * 8;
    const Elem* at = y + (lane_id() % 16) * kPitch + lane_id() / 16 * 8;
    for (int k = 0; k < rows; k += 16) {
      uint32_t a[4];
      ldmatrix<4, true>(a, from + k * kFrom);
      apply_step<kColumns>(o, a, at + k * kPitch);
    }
  }
};

struct Single {
  using Elem = float;
  static constexpr int kChunk = 4;
  static MMFAST_HD constexpr int exchange_pitch(int columns) { return columns + kChunk; }

  // v = big + small, both tf32: big is rounded, of small mma ignores the low bits; what is lost is below 2^-22 of v.
  static __device__ void split(float v, uint32_t& big, uint32_t& small) {
    big = float_to_tf32(v);
    small = float_bits(v - bits_float(big));
  }
  // Both operands of a product, split.
  struct Left {
    uint32_t big[4], small[4];
    __device__ Left(float v0, float v1, float v2, float v3) {
      split(v0, big[0], small[0]), split(v1, big[1], small[1]), split(v2, big[2], small[2]), split(v3, big[3], small[3]);
    }
  };
  static __device__ void mma(float (&c)[4], const Left& a, float y0, float y1) {
    uint32_t big[2], small[2];
    split(y0, big[0], small[0]), split(y1, big[1], small[1]);
    mma_tf32(c, a.small, big);
    mma_tf32(c, a.big, small);
    mma_tf32(c, a.big, big);
  }
  // .. the three among themselves first: tensor cores truncate where they add, and the exponential of a long sum shows it. This addition
  // rounds. (In apply there are no registers for it.)
  static __device__ void mma_apart(float (&c)[4], const Left& a, float y0, float y1) {
    float sum[4] = {};
    mma(sum, a, y0, y1);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
  }
  static __device__ float widen(Elem v) { return v; }
  static __device__ void store(Elem* to, float v) { *to = v; }
  static __device__ void store_pair(Elem* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }

  template <int kD, bool>
  struct Rows {
    const Elem* at;
    __device__ void load(const Elem* rows) { at = rows + lane_id() / 4 * (kD + kChunk) + lane_id() % 4; }
    __device__ Left get(int k) const {
      const Elem *p = at + k * 8, *below = p + 8 * (kD + kChunk);
      return Left(p[0], below[0], p[4], below[4]);
    }
  };

  template <int kD, int kN, bool kRegisters>
  static __device__ void scores(float (&s)[kN / 8][4], const Rows<kD, kRegisters>& rows, const Elem* y) {
    const Elem* at = y + lane_id() / 4 * (kD + kChunk) + lane_id() % 4;
#pragma unroll 1
    for (int k = 0; k < kD / 8; ++k) {
      const Left a = rows.get(k);
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) mma_apart(s[n], a, at[n * 8 * (kD + kChunk) + k * 8], at[n * 8 * (kD + kChunk) + k * 8 + 4]);
    }
  }

  // The order of a sum is free: its elements t and t + 4 are rows 2 t and 2 t + 1 of Y, which is where the accumulator has them.
  template <int kD, int kColumns>
  static __device__ void apply_step(float (&o)[kColumns / 8][4], const Left& a, const Elem* at) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) mma(o[n], a, at[n * 8], at[n * 8 + kD + kChunk]);
  }
  template <int kD, int kN>
  static __device__ void apply(float (&o)[kD / 8][4], const float (&s)[kN / 8][4], const Elem* y) {
    const Elem* at = y + lane_id() % 4 * 2 * (kD + kChunk) + lane_id() / 4;
#pragma unroll
    for (int k = 0; k < kN / 8; ++k) apply_step<kD, kD>(o, Left(s[k][0], s[k][2], s[k][1], s[k][3]), at + k * 8 * (kD + kChunk));
  }
  template <int kD, int kN, int kColumns>
  static __device__ void apply_transposed(float (&o)[kColumns / 8][4], const Elem* s, const Elem* y, int rows) {
    constexpr int kFrom = exchange_pitch(kN);
    const Elem* from = s + lane_id() % 4 * 2 * kFrom + lane_id() / 4;
    const Elem* at = y + lane_id() % 4 * 2 * (kD + kChunk) + lane_id() / 4;
    for (int k = 0; k < rows; k += 8) {
      const Elem *p = from + k * kFrom, *next = p + kFrom;
      apply_step<kD, kColumns>(o, Left(p[0], p[8], next[0], next[8]), at + k * (kD + kChunk));
    }
  }
};

template <DType kType>
struct OpsOf {
  using Type = Half<kType == DType::bf16>;
};
template <>
struct OpsOf<DType::f32> {
  using Type = Single;
};
template <DType kType>
using Ops = typename OpsOf<kType>::Type;

// An accumulator into a row-major tile [.., exchange_pitch(kN)], this warp's 16 rows of it.
template <class T, int kN>
__device__ void put(const float (&s)[kN / 8][4], typename T::Elem* to) {
  typename T::Elem* at = to + lane_id() / 4 * T::exchange_pitch(kN) + lane_id() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
    T::store_pair(at + n * 8, s[n][0], s[n][1]);
    T::store_pair(at + 8 * T::exchange_pitch(kN) + n * 8, s[n][2], s[n][3]);
  }
}

// ---- where things are

// Element 0 of row `n` of a head.
template <class Elem>
__device__ Elem* row_of(const AttentionTensor& t, int64_t b, int64_t n, int64_t h) {
  return static_cast<Elem*>(t.data) + b * t.stride_b + n * t.stride_n + h * t.stride_h;
}

// `rows` rows of a head into a tile; rows from `count` on, rows whose bit in `valid` is 0, and columns from D on become 0.
template <class Elem, int kD>
__device__ void fetch(Elem* tile, const Elem* from, int64_t stride, int rows, int count, uint64_t valid, int D, bool aligned) {
  constexpr int kChunk = 16 / int(sizeof(Elem)), kChunks = kD / kChunk;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < rows * kChunks; i += int(blockDim.x)) {
    const int r = i / kChunks, d = i % kChunks * kChunk;
    const bool there = r < count && d < D && (valid >> r & 1);
    const Elem* source = there ? from + r * stride + d : from;
    Elem* to = tile + r * (kD + kChunk) + d;
    if (aligned) {
      cp_async<16>(to, source, there ? 16 : 0);
    } else {
#pragma unroll 1
      for (int e = 0; e < kChunk; ++e) to[e] = there && d + e < D ? source[e] : Elem(0);
    }
  }
}

// Bit i: key begin + i of segment 2 is real.
__device__ uint64_t valid_keys(const AttentionArgs& a, int64_t b, int segment, int begin) {
  if (segment == 0 || !a.key2_valid) return ~uint64_t(0);
  const uint8_t* valid = a.key2_valid + b * a.N2;
  const int j = begin + lane_id();
  const unsigned low = __ballot_sync(kFullWarp, j < a.N2 && valid[j]);
  const unsigned high = __ballot_sync(kFullWarp, j + 32 < a.N2 && valid[j + 32]);
  return low | uint64_t(high) << 32;
}

// The work of a CTA that owns rows: a run of keys, a tile of rows, a head, a sequence.
struct Place {
  int split, tile;
  int64_t h, b, g;
  __device__ Place(const AttentionArgs& a, const AttentionPlan& p, unsigned index) {
    const unsigned splits = unsigned(p.splits), tiles = unsigned(p.tiles), heads = unsigned(a.H);
    split = int(index % splits), index /= splits;
    tile = int(index % tiles), index /= tiles;
    h = index % heads, b = index / heads;
    g = unsigned(h) / (heads / unsigned(a.G));
  }
};

// What the rows of a CTA see: this lane's two rows, any of the rows, all of the rows.
constexpr int kSeenTiles = 1024;
struct View {
  int begin1[2], end1[2], end2[2];
  int low1, high1, high2;
  int all_low1, all_high1, all_high2;
  const unsigned* seen;  // bit per tile of keys from low1 on, or null: all (the media rules may leave holes)

  // Every thread of the CTA calls this.
  __device__ View(const AttentionArgs& a, int64_t b, int row0, int rows, int tile_keys) {
    seen = nullptr;
    if (a.rule == AttentionRule::lengths) {
      const AttentionRow row = attention_row(a, b, 0);
      low1 = all_low1 = 0;
      high1 = all_high1 = int(row.end1), high2 = all_high2 = int(row.end2);
#pragma unroll
      for (int i = 0; i < 2; ++i) begin1[i] = 0, end1[i] = high1, end2[i] = high2;
      return;
    }
    MMFAST_SHARED(int[3][64], of);
    MMFAST_SHARED(unsigned[kSeenTiles / 32], bits);
    const int lane = lane_id();
    for (int r = int(threadIdx.x); r < rows; r += int(blockDim.x)) {
      const AttentionRow row = attention_row(a, b, row0 + r);
      of[0][r] = int(row.begin1), of[1][r] = int(row.end1), of[2][r] = int(row.end2);
    }
    if (a.rule == AttentionRule::media)
      for (int i = int(threadIdx.x); i < kSeenTiles / 32; i += int(blockDim.x)) bits[i] = 0;
    __syncthreads();
    low1 = all_high1 = all_high2 = 0x7fffffff, high1 = high2 = all_low1 = 0;
    for (int r = lane; r < rows; r += 32) {
      const int from = of[0][r], to = of[1][r], to2 = of[2][r];
      if (from < to) low1 = min(low1, from), high1 = max(high1, to);
      high2 = max(high2, to2);
      all_low1 = max(all_low1, from), all_high1 = min(all_high1, to), all_high2 = min(all_high2, to2);
    }
    low1 = warp_min(low1), high1 = warp_max(high1), high2 = warp_max(high2);
    all_low1 = warp_max(all_low1), all_high1 = warp_min(all_high1), all_high2 = warp_min(all_high2);
    if (high1 == 0) low1 = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = warp_id() * 16 + lane / 4 + 8 * i;
      begin1[i] = r < rows ? of[0][r] : 0, end1[i] = r < rows ? of[1][r] : 0, end2[i] = r < rows ? of[2][r] : 0;
    }
    if (a.rule == AttentionRule::media) {
      const int first = low1 / tile_keys;
      for (int r = int(threadIdx.x); r < rows; r += int(blockDim.x))
        for (int t = of[0][r] / tile_keys; t * tile_keys < of[1][r] && t - first < kSeenTiles; ++t)
          atomicOr(&bits[(t - first) / 32], 1u << (t - first) % 32);
      __syncthreads();
      seen = bits;
    }
  }
};

// The tiles of keys that a CTA walks: those of segment 1 from low1 on, then those of segment 2.
template <int kKeys>
struct Walk {
  int first1, count1, count;
  const unsigned* seen;
  __device__ explicit Walk(const View& v) : seen(v.seen) {
    first1 = v.low1 / kKeys;
    count1 = (v.high1 + kKeys - 1) / kKeys - first1;
    count = count1 + (v.high2 + kKeys - 1) / kKeys;
  }
  // The first tile from t on that any row sees.
  __device__ int next(int t) const {
    while (seen && t < count1 && t < kSeenTiles && !(seen[t / 32] >> t % 32 & 1)) ++t;
    return t;
  }
  __device__ int segment(int t) const { return t >= count1; }
  __device__ int begin(int t) const { return (t < count1 ? first1 + t : t - count1) * kKeys; }
};

// One tile of keys and values into a buffer: keys first.
template <class Elem, int kD, int kKeys>
__device__ void fetch_keys(Elem* buffer, const AttentionArgs& a, const AttentionPlan& p, const Place& at, const View& view,
                           int64_t first_key, int segment, int begin) {
  constexpr int kTile = kKeys * (kD + 16 / int(sizeof(Elem)));
  const int count = (segment ? view.high2 : view.high1) - begin;
  const uint64_t valid = valid_keys(a, at.b, segment, begin);
  const AttentionTensor &k = segment ? a.k2 : a.k1, &v = segment ? a.v2 : a.v1;
  const int64_t row = (segment ? 0 : first_key) + begin;
  fetch<Elem, kD>(buffer, row_of<Elem>(k, at.b, row, at.g), k.stride_n, kKeys, count, valid, int(a.D), p.aligned);
  fetch<Elem, kD>(buffer + kTile, row_of<Elem>(v, at.b, row, at.g), v.stride_n, kKeys, count, valid, int(a.D), p.aligned);
}

// Calls visit(keys, values, segment, begin) for each tile of this CTA's run, while the next one is on its way.
template <class Elem, int kD, int kKeys, class Visit>
__device__ void stream_keys(Elem* buffers, const AttentionArgs& a, const AttentionPlan& p, const Place& at, const View& view,
                            int64_t first_key, Visit visit) {
  constexpr int kTile = kKeys * (kD + 16 / int(sizeof(Elem)));
  const Walk<kKeys> walk(view);
  const int run = (walk.count + p.splits - 1) / p.splits, end = min(walk.count, run * (at.split + 1));
  // One round more than there are tiles: the first only fetches, so that the code for it stands once.
  for (int now = -1, next = walk.next(run * at.split), buffer = 1; now >= 0 || next < end; buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // the tile has landed for all, and nobody reads the other buffer any more
    if (next < end)
      fetch_keys<Elem, kD, kKeys>(buffers + (buffer ^ 1) * 2 * kTile, reread(a), p, at, view, first_key, walk.segment(next),
                                  walk.begin(next));
    cp_async_commit();
    const Elem* keys = buffers + buffer * 2 * kTile;
    if (now >= 0) visit(keys, keys + kTile, walk.segment(now), walk.begin(now));
    now = next < end ? next : -1;
    next = next < end ? walk.next(next + 1) : end;
  }
}

// Scores in units of log2, -Inf where a row does not see a key.
template <int kN>
__device__ void scale_and_hide(float (&s)[kN / 8][4], float c, const AttentionArgs& a, int64_t b, const View& view, int segment,
                               int begin) {
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] *= c;
  const uint64_t valid = valid_keys(a, b, segment, begin);
  const int low = segment ? 0 : view.all_low1, high = segment ? view.all_high2 : view.all_high1;
  if (begin >= low && begin + kN <= high && valid == ~uint64_t(0)) return;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = n * 8 + lane_id() % 4 * 2 + i % 2, key = begin + j;
      const int from = segment ? 0 : view.begin1[i / 2], to = segment ? view.end2[i / 2] : view.end1[i / 2];
      if (key < from || key >= to || !(valid >> j & 1)) s[n][i] = -kInf;
    }
}

// Bit 4 n + i: element s[n][i] is kept by dropout. A Philox call a row and 32 keys (attention_random).
template <int kN>
__device__ uint32_t kept(const AttentionArgs& a, int64_t bh, int row, int segment, int begin) {
  uint32_t bits = 0;
  const int64_t seed = *a.seed;
#pragma unroll
  for (int group = 0; group < kN / 32; ++group)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Philox4 r = philox(uint32_t((begin / 32 + group) * 4 + lane_id() % 4), uint32_t(row + 8 * half), uint32_t(bh),
                               uint32_t(segment), uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int at = (group * 4 + w) * 4 + 2 * half;
        bits |= uint32_t((r.w[w] & 0xffffu) >= a.dropout_threshold) << at;
        bits |= uint32_t((r.w[w] >> 16) >= a.dropout_threshold) << (at + 1);
      }
    }
  return bits;
}
__device__ float keep_factor(const AttentionArgs& a) { return 65536.0f / float(65536u - a.dropout_threshold); }

// The sum (maximum) over the four lanes that share a row.
__device__ float quad_sum(float v) {
  v += __shfl_xor_sync(kFullWarp, v, 1);
  return v + __shfl_xor_sync(kFullWarp, v, 2);
}
__device__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, 1));
  return fmaxf(v, __shfl_xor_sync(kFullWarp, v, 2));
}

// Row g (half 0) or g + 8 (half 1) of an accumulator times `factor`, to a row in memory.
template <class T, int kD>
__device__ void store_row(typename T::Elem* to, const float (&o)[kD / 8][4], int half, float factor, int D, bool pairs) {
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
    const int d = n * 8 + lane_id() % 4 * 2;
    const float x = o[n][2 * half] * factor, y = o[n][2 * half + 1] * factor;
    if (pairs) {
      if (d < D) T::store_pair(to + d, x, y);
    } else {
      if (d < D) T::store(to + d, x);
      if (d + 1 < D) T::store(to + d + 1, y);
    }
  }
}
template <int kD>
__device__ void store_part(float* to, const float (&o)[kD / 8][4], int half, int D) {
  store_row<Single, kD>(to, o, half, 1.0f, D, D % 2 == 0);
}

// Row i of (b, h) in the workspace's arrays.
__device__ int64_t part_row(const AttentionArgs& a, int split, int64_t b, int64_t h, int64_t i) {
  return ((split * a.B + b) * a.H + h) * a.Nq + i;
}

// ---- forward

template <DType kType, int kD>
__global__ void __launch_bounds__(128, kD <= 64   ? 4
                                       : kD <= 96 ? 3
                                                  : 2)
    forward_kernel(const __grid_constant__ AttentionArgs a, const __grid_constant__ AttentionPlan p) {
  using T = Ops<kType>;
  using Elem = typename T::Elem;
  constexpr int kKeys = attention_tile_keys(kType == DType::f32, false), kPitch = kD + T::kChunk;
  MMFAST_DYNAMIC_SHARED(shared);
  const Place at(a, p, blockIdx.x);
  const AttentionSequence seq = attention_sequence(a, at.b);
  const int tile_rows = int(blockDim.x) / 2, row0 = at.tile * tile_rows;
  if (row0 >= seq.q_count) return;
  const int rows = int(min(int64_t(tile_rows), seq.q_count - row0));
  Elem* queries = reinterpret_cast<Elem*>(shared);
  fetch<Elem, kD>(queries, row_of<Elem>(a.q, at.b, seq.q_begin + row0, at.h), a.q.stride_n, tile_rows, rows, ~uint64_t(0), int(a.D),
                  p.aligned);
  const View view(a, at.b, row0, rows, kKeys);
  typename T::template Rows<kD, (kD > 64)> q;
  bool loaded = false;
  const int row = row0 + warp_id() * 16 + lane_id() / 4;  // and row + 8
  float out[kD / 8][4] = {}, top[2] = {-kInf, -kInf}, total[2] = {};

  const auto visit = [&](const Elem* keys, const Elem* values, int segment, int begin) {
    if (!loaded) q.load(queries + warp_id() * 16 * kPitch), loaded = true;
    float s[kKeys / 8][4] = {};
    T::template scores<kD, kKeys>(s, q, keys);
    scale_and_hide<kKeys>(s, p.c, a, at.b, view, segment, begin);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = top[i];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) most = fmaxf(most, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      most = quad_max(most);
      const float base = most == -kInf ? 0.0f : most, rescale = fast_exp2(top[i] - base);
      top[i] = most;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        s[n][2 * i] = fast_exp2(s[n][2 * i] - base);
        s[n][2 * i + 1] = fast_exp2(s[n][2 * i + 1] - base);
        sum += s[n][2 * i] + s[n][2 * i + 1];
      }
      total[i] = total[i] * rescale + sum;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) out[n][2 * i] *= rescale, out[n][2 * i + 1] *= rescale;
    }
    if (a.dropout_threshold) {
      const uint32_t keep = kept<kKeys>(a, at.b * a.H + at.h, row, segment, begin);
      const float factor = keep_factor(a);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = keep >> (4 * n + i) & 1 ? s[n][i] * factor : 0.0f;
    }
    T::template apply<kD, kKeys>(out, s, values);
  };
  stream_keys<Elem, kD, kKeys>(queries + tile_rows * kPitch, a, p, at, view, seq.k_begin, visit);
  cp_async_wait<0>();  // nothing may land after the block has ended

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = quad_sum(total[i]);
    const int64_t n = row + 8 * i;
    if (n >= seq.q_count || n >= row0 + rows) continue;
    if (p.splits == 1) {
      const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
      store_row<T, kD>(row_of<Elem>(a.out, at.b, seq.q_begin + n, at.h), out, i, inverse, int(a.D), p.pairs);
      if (lane_id() % 4 == 0)
        static_cast<float*>(a.lse)[at.b * a.lse_stride_b + at.h * a.lse_stride_h + seq.q_begin + n] =
            sum == 0 ? -kInf : (top[i] + log2f(sum)) * kLn2;
    } else {
      const int64_t to = part_row(a, at.split, at.b, at.h, n);
      store_part<kD>(p.part_out + to * a.D, out, i, int(a.D));
      if (lane_id() % 4 == 0) p.part_state[2 * to] = top[i], p.part_state[2 * to + 1] = sum;
    }
  }
}

// ---- backward

// lse in units of log2, +Inf for a row that is not there or sees nothing: its weights are exp2(-Inf) = 0.
__device__ float lse2_of(const AttentionArgs& a, const AttentionSequence& seq, int64_t b, int64_t h, int64_t i) {
  if (i >= seq.q_count) return kInf;
  const float lse = static_cast<const float*>(a.lse)[b * a.lse_stride_b + h * a.lse_stride_h + seq.q_begin + i];
  return lse == -kInf ? kInf : lse * kLog2e;
}

// s (scores in units of log2, hidden ones -Inf) becomes the dropped weights, dp the gradient of the scores.
template <int kN>
__device__ void grad_scores(float (&s)[kN / 8][4], float (&dp)[kN / 8][4], const float (&lse2)[2], const float (&delta)[2], uint32_t keep,
                            float factor) {
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float f = keep >> (4 * n + i) & 1 ? factor : 0.0f, weight = fast_exp2(s[n][i] - lse2[i / 2]);
      dp[n][i] = weight == 0 ? 0.0f : weight * (dp[n][i] * f - delta[i / 2]);
      s[n][i] = weight * f;
    }
}

// out . grad_out - grad_lse of row i, by the four lanes that share it in an accumulator (all lanes of the warp call this).
template <class T>
__device__ float row_delta(const AttentionBackwardArgs& args, const AttentionSequence& seq, int64_t b, int64_t h, int64_t i) {
  using Elem = typename T::Elem;
  const AttentionArgs& a = args.forward;
  const bool there = i < seq.q_count;
  float sum = 0;
  if (there && args.grad_out.data) {
    const Elem* out = row_of<const Elem>(a.out, b, seq.q_begin + i, h);
    const Elem* grad = row_of<const Elem>(args.grad_out, b, seq.q_begin + i, h);
#pragma unroll 4
    for (int d = lane_id() % 4; d < a.D; d += 4) sum += T::widen(out[d]) * T::widen(grad[d]);
  }
  sum = quad_sum(sum);
  const int64_t at = b * a.lse_stride_b + h * a.lse_stride_h + seq.q_begin + i;
  if (!there || static_cast<const float*>(a.lse)[at] == -kInf) return 0.0f;
  return args.grad_lse ? sum - static_cast<const float*>(args.grad_lse)[at] : sum;
}

// Four lanes a row: 32 rows a block.
template <DType kType>
__global__ void __launch_bounds__(128)
    delta_kernel(const __grid_constant__ AttentionBackwardArgs args, const __grid_constant__ AttentionPlan p) {
  const AttentionArgs& a = args.forward;
  const unsigned index = blockIdx.x * 32 + threadIdx.x / 4, heads = unsigned(a.H), n = unsigned(a.Nq);
  const bool inside = index < unsigned(a.B) * heads * n;
  const int64_t i = inside ? index % n : n, h = inside ? index / n % heads : 0, b = inside ? index / n / heads : 0;
  const AttentionSequence seq = attention_sequence(a, b);
  const float delta = row_delta<Ops<kType>>(args, seq, b, h, i);
  if (inside && i < seq.q_count && lane_id() % 4 == 0) p.delta[index] = delta;
}

// Rows of q and grad_out into two tiles behind each other.
template <class Elem, int kD>
__device__ void fetch_rows(Elem* tiles, const AttentionBackwardArgs& args, const AttentionPlan& p, const AttentionSequence& seq, int64_t b,
                           int64_t h, int64_t row0, int tile_rows, int rows) {
  const AttentionArgs& a = args.forward;
  const Elem* q = row_of<Elem>(a.q, b, seq.q_begin + row0, h);
  const bool some = args.grad_out.data != nullptr;
  const Elem* grad = some ? row_of<Elem>(args.grad_out, b, seq.q_begin + row0, h) : q;
  fetch<Elem, kD>(tiles, q, a.q.stride_n, tile_rows, rows, ~uint64_t(0), int(a.D), p.aligned);
  fetch<Elem, kD>(tiles + tile_rows * (kD + 16 / int(sizeof(Elem))), grad, some ? args.grad_out.stride_n : 0, tile_rows, some ? rows : 0,
                  ~uint64_t(0), int(a.D), p.aligned);
}

// Gradients of rows, and with kFew of the keys as well.
template <DType kType, int kD, bool kFew>
__global__ void __launch_bounds__(128, kD <= 64 ? 3 : 2)
    grad_rows_kernel(const __grid_constant__ AttentionBackwardArgs outer_args, const __grid_constant__ AttentionPlan p) {
  using T = Ops<kType>;
  using Elem = typename T::Elem;
  constexpr int kKeys = attention_tile_keys(kType == DType::f32, true), kPitch = kD + T::kChunk;
  constexpr int kExchange = T::exchange_pitch(kKeys), kPart = kD > 32 ? kD / 2 : kD;  // columns of a sum over rows
  MMFAST_DYNAMIC_SHARED(shared);
  const AttentionBackwardArgs& args = outer_args;
  const AttentionArgs& a = args.forward;
  const Place at(a, p, blockIdx.x);
  const AttentionSequence seq = attention_sequence(a, at.b);
  const int tile_rows = int(blockDim.x) / 2, row0 = at.tile * tile_rows;
  if (!kFew && row0 >= seq.q_count) return;
  const int rows = int(max(int64_t(0), min(int64_t(tile_rows), seq.q_count - row0)));
  Elem* queries = reinterpret_cast<Elem*>(shared);
  Elem* grads = queries + tile_rows * kPitch;
  Elem* buffers = grads + tile_rows * kPitch;
  Elem* weights = buffers + 4 * kKeys * kPitch;  // [tile_rows, kExchange], with kFew
  Elem* slopes = weights + tile_rows * kExchange;
  fetch_rows<Elem, kD>(queries, args, p, seq, at.b, at.h, row0, tile_rows, rows);
  View view(a, at.b, row0, rows, kKeys);
  if constexpr (kFew) {  // not for the media rules: the compiler may know that every view starts at key 0
    view.begin1[0] = view.begin1[1] = view.low1 = view.all_low1 = 0;
    view.seen = nullptr;
  }

  const int row = row0 + warp_id() * 16 + lane_id() / 4;
  const float lse2[2] = {lse2_of(a, seq, at.b, at.h, row), lse2_of(a, seq, at.b, at.h, row + 8)};
  float delta[2] = {};
  if constexpr (kFew) {
#pragma unroll
    for (int i = 0; i < 2; ++i) delta[i] = row_delta<T>(args, seq, at.b, at.h, row + 8 * i);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (row + 8 * i < seq.q_count) delta[i] = p.delta[part_row(a, 0, at.b, at.h, row + 8 * i)];
  }
  typename T::template Rows<kD, false> q, grad;
  bool loaded = false;
  const float factor = keep_factor(a);
  float grad_q[kD / 8][4] = {};

  const auto visit = [&](const Elem* keys, const Elem* values, int segment, int begin) {
    if (!loaded) q.load(queries + warp_id() * 16 * kPitch), grad.load(grads + warp_id() * 16 * kPitch), loaded = true;
    float s[kKeys / 8][4] = {}, dp[kKeys / 8][4] = {};
    T::template scores<kD, kKeys>(s, q, keys);
    T::template scores<kD, kKeys>(dp, grad, values);
    scale_and_hide<kKeys>(s, p.c, a, at.b, view, segment, begin);
    const uint32_t keep = a.dropout_threshold ? kept<kKeys>(a, at.b * a.H + at.h, row, segment, begin) : ~0u;
    grad_scores<kKeys>(s, dp, lse2, delta, keep, factor);
    if constexpr (kFew) {
      put<T, kKeys>(s, weights + warp_id() * 16 * kExchange);
      put<T, kKeys>(dp, slopes + warp_id() * 16 * kExchange);
    }
    T::template apply<kD, kKeys>(grad_q, dp, keys);
    if constexpr (kFew) {
      __syncthreads();  // weights and slopes of all rows are there; stream_keys' own barrier keeps the next ones from replacing them
      const AttentionBackwardArgs& args = reread(outer_args);
      const AttentionArgs& a = args.forward;
      const AttentionTensor &grad_k = segment ? args.grad_k2 : args.grad_k1, &grad_v = segment ? args.grad_v2 : args.grad_v1;
      const int64_t there = segment ? a.N2 : seq.k_count, first = (segment ? 0 : seq.k_begin);
      for (int block = warp_id() * 16; grad_k.data && block < kKeys; block += tile_rows) {
#pragma unroll 1
        for (int part = 0; part < 2 * (kD / kPart); ++part) {  // of grad_v, then of grad_k
          const bool is_k = part >= kD / kPart;
          const int column = part % (kD / kPart) * kPart;
          float sum[kPart / 8][4] = {};
          T::template apply_transposed<kD, kKeys, kPart>(sum, (is_k ? slopes : weights) + block, (is_k ? queries : grads) + column,
                                                         tile_rows);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int64_t key = begin + block + lane_id() / 4 + 8 * i;
            if (key < there)
              store_row<T, kPart>(row_of<Elem>(is_k ? grad_k : grad_v, at.b, first + key, at.g) + column, sum, i,
                                  is_k ? float(a.scale) : 1.0f, int(a.D) - column, p.pairs);
          }
        }
      }
    }
  };
  stream_keys<Elem, kD, kKeys>(buffers, a, p, at, view, seq.k_begin, visit);
  cp_async_wait<0>();

  if constexpr (kFew) {  // keys that no row sees: those behind the last tile of each segment, divided among the runs
    const Walk<kKeys> walk(view);
    for (int segment = 0; segment < 2; ++segment) {
      const AttentionTensor &grad_k = segment ? args.grad_k2 : args.grad_k1, &grad_v = segment ? args.grad_v2 : args.grad_v1;
      const int64_t there = segment ? a.N2 : seq.k_count, first = (segment ? 0 : seq.k_begin);
      const int64_t behind = int64_t(segment ? walk.count - walk.count1 : walk.count1) * kKeys;
      for (int64_t key = behind + int64_t(at.split) * (blockDim.x / 32) + warp_id(); grad_k.data && key < there;
           key += int64_t(p.splits) * (blockDim.x / 32))
        for (int d = lane_id(); d < a.D; d += 32) {
          T::store(row_of<Elem>(grad_k, at.b, first + key, at.g) + d, 0.0f);
          T::store(row_of<Elem>(grad_v, at.b, first + key, at.g) + d, 0.0f);
        }
    }
  }
  if (!args.grad_q.data) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t n = row + 8 * i;
    if (n >= row0 + rows) continue;
    if (p.splits == 1)
      store_row<T, kD>(row_of<Elem>(args.grad_q, at.b, seq.q_begin + n, at.h), grad_q, i, float(a.scale), int(a.D), p.pairs);
    else store_part<kD>(p.part_out + part_row(a, at.split, at.b, at.h, n) * a.D, grad_q, i, int(a.D));
  }
}

// Gradients of 64 keys: all rows of all heads that share them stream by.
template <DType kType, int kD>
__global__ void __launch_bounds__(128, kD <= (kType == DType::f32 ? 32 : 64) ? 3 : 2)
    grad_keys_kernel(const __grid_constant__ AttentionBackwardArgs outer_args, const __grid_constant__ AttentionPlan p) {
  using T = Ops<kType>;
  using Elem = typename T::Elem;
  constexpr int kRows = attention_tile_rows(kType == DType::f32), kPitch = kD + T::kChunk, kOwn = kAttentionOwnKeys;
  // What the streamed rows bring along, beside q and grad_out. kept: a byte for keys 32 group + 8 w + 2 l + half, bit 2 w + half.
  struct alignas(16) RowState {
    float lse2, delta;
    int low, high;
  };
  struct Buffer {
    RowState row[kRows];
    uint8_t kept[kRows][2][4];
  };
  MMFAST_DYNAMIC_SHARED(shared);
  MMFAST_SHARED(unsigned[kSeenTiles / 32], seen);
  const AttentionBackwardArgs& args = outer_args;
  const AttentionArgs& a = args.forward;
  Elem* keys = reinterpret_cast<Elem*>(shared);
  Elem* values = keys + kOwn * kPitch;
  Elem* buffers = values + kOwn * kPitch;
  Buffer* states = reinterpret_cast<Buffer*>(buffers + 4 * kRows * kPitch);

  const int64_t tiles1 = (a.N1 + kOwn - 1) / kOwn, tiles = tiles1 + (a.N2 + kOwn - 1) / kOwn;
  const int64_t tile = blockIdx.x % unsigned(tiles), g = blockIdx.x / unsigned(tiles) % unsigned(a.G),
                b = blockIdx.x / unsigned(tiles) / unsigned(a.G);
  const int segment = tile >= tiles1, begin = int(tile - (segment ? tiles1 : 0)) * kOwn;
  const AttentionSequence seq = attention_sequence(a, b);
  const int64_t there = (segment ? a.N2 : seq.k_count) - begin, first = (segment ? 0 : seq.k_begin) + begin;
  if (there <= 0) return;
  const int group = int(unsigned(a.H) / unsigned(a.G)), row_tiles = int((seq.q_count + kRows - 1) / kRows);

  const int64_t real1 = a.len1 ? attention_clamp(a.len1[b], a.N1) : seq.k_count;
  const int64_t real = (segment ? (a.len2 ? attention_clamp(a.len2[b], a.N2) : a.N2) : real1) - begin;
  const uint64_t valid = valid_keys(a, b, segment, begin);
  const AttentionTensor &k = segment ? a.k2 : a.k1, &v = segment ? a.v2 : a.v1;
  const int count = int(max(int64_t(0), min(int64_t(kOwn), min(there, real))));
  fetch<Elem, kD>(keys, row_of<Elem>(k, b, first, g), k.stride_n, kOwn, count, valid, int(a.D), p.aligned);
  fetch<Elem, kD>(values, row_of<Elem>(v, b, first, g), v.stride_n, kOwn, count, valid, int(a.D), p.aligned);

  // Which tiles of rows see any of these keys.
  for (int i = int(threadIdx.x); i < kSeenTiles / 32; i += int(blockDim.x)) seen[i] = 0;
  __syncthreads();
  const auto sees = [&](const AttentionArgs& a, int64_t i, int& low, int& high) {
    const AttentionRow row = attention_row(a, b, i);
    low = segment ? 0 : int(row.begin1), high = segment ? int(row.end2) : int(row.end1);
    return low < high && low < begin + kOwn && high > begin;
  };
  for (int i = int(threadIdx.x); i < seq.q_count && i / kRows < kSeenTiles; i += blockDim.x) {
    int low, high;
    if (sees(a, i, low, high)) atomicOr(&seen[i / kRows / 32], 1u << i / kRows % 32);
  }
  __syncthreads();
  const int end = group * row_tiles;
  const auto next_tile = [&](int u) {
    for (; u < end; ++u) {
      const int t = u % row_tiles;
      if (t >= kSeenTiles || (seen[t / 32] >> t % 32 & 1)) break;
    }
    return u;
  };
  const auto fetch_tile = [&](int u, int buffer) {
    const AttentionBackwardArgs& args = reread(outer_args);
    const AttentionArgs& a = args.forward;
    const int64_t h = g * group + u / row_tiles;
    const int row0 = u % row_tiles * kRows, rows = int(min(int64_t(kRows), seq.q_count - row0));
    fetch_rows<Elem, kD>(buffers + buffer * 2 * kRows * kPitch, args, p, seq, b, h, row0, kRows, rows);
    Buffer& state = states[buffer];
    for (int r = int(threadIdx.x); r < kRows; r += int(blockDim.x)) {
      RowState row{lse2_of(a, seq, b, h, row0 + r), 0.0f, 0, 0};
      if (r < rows) {
        row.delta = p.delta[part_row(a, 0, b, h, row0 + r)];
        sees(a, row0 + r, row.low, row.high);
      }
      state.row[r] = row;
    }
    if (a.dropout_threshold)
      for (int i = int(threadIdx.x); i < kRows * 8; i += int(blockDim.x)) {
        const Philox4 x = philox(uint32_t((begin / 32 + i / 4 % 2) * 4 + i % 4), uint32_t(row0 + i / 8), uint32_t(b * a.H + h),
                                 uint32_t(segment), uint32_t(*a.seed), uint32_t(uint64_t(*a.seed) >> 32));
        unsigned bits = 0;
        for (int w = 0; w < 4; ++w)
          bits |= unsigned((x.w[w] & 0xffffu) >= a.dropout_threshold) << 2 * w | unsigned((x.w[w] >> 16) >= a.dropout_threshold)
                                                                                     << (2 * w + 1);
        state.kept[i / 8][i / 4 % 2][i % 4] = uint8_t(bits);
      }
  };

  typename T::template Rows<kD, false> key, value;
  bool loaded = false;
  const int own = warp_id() * 16 + lane_id() / 4;  // this lane's keys: own and own + 8; -1 is seen by no row
  const int own_key[2] = {valid >> own & 1 ? begin + own : -1, valid >> (own + 8) & 1 ? begin + own + 8 : -1};
  const float factor = keep_factor(a);
  float grad_k[kD / 8][4] = {}, grad_v[kD / 8][4] = {};
  for (int now = -1, next = next_tile(0), buffer = 1; now >= 0 || next < end; buffer ^= 1) {  // as in stream_keys
    cp_async_wait<0>();
    __syncthreads();  // the tile has landed for all, and nobody reads the other buffer any more
    const bool work = now >= 0;
    if (next < end) fetch_tile(next, buffer ^ 1);
    cp_async_commit();
    now = next < end ? next : -1;
    next = next < end ? next_tile(next + 1) : end;
    if (!work) continue;
    if (!loaded) key.load(keys + warp_id() * 16 * kPitch), value.load(values + warp_id() * 16 * kPitch), loaded = true;
    const Elem *queries = buffers + buffer * 2 * kRows * kPitch, *grads = queries + kRows * kPitch;
    const Buffer& state = states[buffer];
    float s[kRows / 8][4] = {}, dp[kRows / 8][4] = {};
    T::template scores<kD, kRows>(s, key, queries);
    T::template scores<kD, kRows>(dp, value, grads);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int r = n * 8 + lane_id() % 4 * 2 + c;
        const RowState row = state.row[r];
#pragma unroll
        for (int i = c; i < 4; i += 2) {
          const int j = own + i / 2 * 8;
          const float weight = own_key[i / 2] >= row.low && own_key[i / 2] < row.high ? fast_exp2(s[n][i] * p.c - row.lse2) : 0.0f;
          float f = 1.0f;
          if (a.dropout_threshold) f = state.kept[r][j / 32][j % 8 / 2] >> (2 * (j % 32 / 8) + j % 2) & 1 ? factor : 0.0f;
          dp[n][i] = weight == 0 ? 0.0f : weight * (dp[n][i] * f - row.delta);
          s[n][i] = weight * f;
        }
      }
    T::template apply<kD, kRows>(grad_v, s, grads);
    T::template apply<kD, kRows>(grad_k, dp, queries);
  }
  cp_async_wait<0>();
  const AttentionTensor &to_k = segment ? args.grad_k2 : args.grad_k1, &to_v = segment ? args.grad_v2 : args.grad_v1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (own + 8 * i >= there) continue;
    store_row<T, kD>(row_of<Elem>(to_k, b, first + own + 8 * i, g), grad_k, i, float(a.scale), int(a.D), p.pairs);
    store_row<T, kD>(row_of<Elem>(to_v, b, first + own + 8 * i, g), grad_v, i, 1.0f, int(a.D), p.pairs);
  }
}

template <class F>
int with_width(int64_t D, F&& f) {
  switch (attention_width(D)) {
    case 32:
      return f(std::integral_constant<int, 32>());
    case 64:
      return f(std::integral_constant<int, 64>());
    case 96:
      return f(std::integral_constant<int, 96>());
    default:
      return f(std::integral_constant<int, 128>());
  }
}

dim3 row_grid(const AttentionArgs& a, const AttentionPlan& p) { return dim3(unsigned(a.B * a.H * p.tiles * p.splits)); }

}  // namespace

template <DType kType>
int attention_forward_tiles(const AttentionArgs& a, const AttentionPlan& p, void* stream) {
  return with_width(a.D, [&](auto width) {
    return launch(forward_kernel<kType, decltype(width)::value>, row_grid(a, p), dim3(32 * unsigned(p.warps)), p.shared, stream, a, p);
  });
}

template <DType kType>
int attention_grad_rows_tiles(const AttentionBackwardArgs& args, const AttentionPlan& p, void* stream) {
  return with_width(args.forward.D, [&](auto width) {
    return launch(grad_rows_kernel<kType, decltype(width)::value, false>, row_grid(args.forward, p), dim3(32 * unsigned(p.warps)), p.shared,
                  stream, args, p);
  });
}

template <DType kType>
int attention_grad_few_tiles(const AttentionBackwardArgs& args, const AttentionPlan& p, void* stream) {
  return with_width(args.forward.D, [&](auto width) {
    return launch(grad_rows_kernel<kType, decltype(width)::value, true>, row_grid(args.forward, p), dim3(32 * unsigned(p.warps)), p.shared,
                  stream, args, p);
  });
}

template <DType kType>
int attention_grad_keys_tiles(const AttentionBackwardArgs& args, const AttentionPlan& p, void* stream) {
  const AttentionArgs& a = args.forward;
  const int64_t tiles = ceil_div(a.N1, kAttentionOwnKeys) + ceil_div(a.N2, kAttentionOwnKeys);
  return with_width(a.D, [&](auto width) {
    return launch(grad_keys_kernel<kType, decltype(width)::value>, dim3(unsigned(a.B * a.G * tiles)), dim3(2 * kAttentionOwnKeys), p.shared,
                  stream, args, p);
  });
}

template <DType kType>
int attention_delta(const AttentionBackwardArgs& args, const AttentionPlan& p, void* stream) {
  const AttentionArgs& a = args.forward;
  return launch(delta_kernel<kType>, dim3(unsigned(ceil_div(a.B * a.H * a.Nq, 32))), dim3(128), 0, stream, args, p);
}

#define MMFAST_ATTENTION_INSTANCES(type)                                                                   \
  template int attention_forward_tiles<type>(const AttentionArgs&, const AttentionPlan&, void*);           \
  template int attention_grad_rows_tiles<type>(const AttentionBackwardArgs&, const AttentionPlan&, void*); \
  template int attention_grad_keys_tiles<type>(const AttentionBackwardArgs&, const AttentionPlan&, void*); \
  template int attention_grad_few_tiles<type>(const AttentionBackwardArgs&, const AttentionPlan&, void*);  \
  template int attention_delta<type>(const AttentionBackwardArgs&, const AttentionPlan&, void*);
#endif  // MMFAST_ATTENTION_KERNELS

}  // namespace mmfast
