// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Attention on the CPU. A task owns one (batch, key head) and a run of q tiles; it walks the keys in blocks of 64, each block packed once
// (K and V come from strided rows, often a page apart) and used by all tiles of the task. A tile is 16 or 32 rows of q, held transposed,
// so that scores have keys along rows and a q row in each vector lane: softmax needs no horizontal sum, and the packed K and V serve all
// products as they are.
//
//   forward   S' = K Q'    P' = online softmax    O += P V
//   backward  S' = K Q'    dP' = V dO'    P', dS'    dV += P' dO    dK += dS' Q    dQ += dS K          (' transposed; one walk, no atomics)
//
// bf16 on AVX512-BF16 multiplies pairs along the summed dimension; K, V, Q, dO then come twice, as rows and as interleaved row pairs.
// Every other type is widened to fp32 while packing; fp64 takes the plain loops at the end.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "../common/cpu_isa.h"
#include "../common/parallel.h"
#include "attention.h"
#include "attention_cpu_isa.h"

namespace mmfast {
namespace {

constexpr int64_t kKeys = kAttentionKeys, kMostKeys = kAttentionMostKeys;
constexpr int64_t kTilesPerTask = 16;  // bounds a task's output accumulators
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kInf = std::numeric_limits<float>::infinity();

const AttentionCpuKernels& kernels() { return MMFAST_CPU_KERNELS(attention_cpu_kernels); }

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// A thread's scratch memory, handed out piece by piece and kept for the next task.
class Scratch {
 public:
  void begin() {  // all pieces are given back; several blocks become one
    if (blocks_.size() > 1) {
      size_t total = 0;
      for (const Block& b : blocks_) total += b.size;
      blocks_.clear();
      grow(total);
    }
    used_ = 0;
  }
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = size_t(round_up(count * int64_t(sizeof(T)), 64));
    if (blocks_.empty() || used_ + bytes > blocks_.back().size) grow(std::max<size_t>(bytes, 1 << 18));
    T* p = reinterpret_cast<T*>(blocks_.back().data.get() + used_);
    used_ += bytes;
    return p;
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<unsigned char, Free> data;
    size_t size;
  };
  void grow(size_t bytes) {
    unsigned char* p = static_cast<unsigned char*>(std::aligned_alloc(64, bytes));
    if (!p) throw std::bad_alloc();
    blocks_.push_back({std::unique_ptr<unsigned char, Free>(p), bytes});
    used_ = 0;
  }
  std::vector<Block> blocks_;
  size_t used_ = 0;
};

Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

template <class T = char>
T* at(const AttentionTensor& t, DType dtype, int64_t b, int64_t n, int64_t h) {
  return reinterpret_cast<T*>(static_cast<char*>(t.data) + (b * t.stride_b + n * t.stride_n + h * t.stride_h) * dtype_size(dtype));
}

// Rows of one head that see the same keys, but for the end of segment 2, which a causal rule moves row by row.
struct Tile {
  int64_t head, row, rows, n;  // n: rows rounded up to vectors
  int64_t begin[2], end[2];    // what the tile sees of each segment
  bool ragged;
  int32_t end2[32];  // each row's end in segment 2, with `ragged`
};

std::vector<Tile> make_tiles(const AttentionArgs& a, int64_t b, int64_t g, int lanes) {
  const AttentionSequence seq = attention_sequence(a, b);
  const int64_t group = a.H / a.G;
  std::vector<Tile> tiles;
  tiles.reserve(size_t(group * (seq.q_count / (2 * lanes) + 1)));
  for (int64_t head = g * group; head < (g + 1) * group; ++head)
    for (int64_t i = 0; i < seq.q_count;) {
      const AttentionRow first = attention_row(a, b, i);
      Tile t{head, i, 0, 0, {first.begin1, 0}, {first.end1, first.end2}, false, {}};
      for (; i < seq.q_count && t.rows < 2 * lanes; ++i, ++t.rows) {
        const AttentionRow row = attention_row(a, b, i);
        if (row.begin1 != first.begin1 || row.end1 != first.end1) break;
        t.end2[t.rows] = int32_t(row.end2);
        t.ragged |= row.end2 != first.end2;
        t.end[1] = std::max(t.end[1], row.end2);
      }
      t.n = round_up(t.rows, lanes);
      for (int64_t r = t.rows; r < t.n; ++r) t.end2[r] = int32_t(t.end[1]);
      tiles.push_back(t);
    }
  return tiles;
}

// The end of the block of keys that starts at `block`, of `total`.
int64_t block_end(int64_t block, int64_t total) { return total - block <= kMostKeys ? total : block + kKeys; }

// Rows of keys and values that will be packed next: their cache lines are asked for while the current block is multiplied, for a row is
// often a page away from the one before, where the processor does not guess it.
struct Ahead {
  const char *k = nullptr, *v = nullptr;
  int64_t stride_k = 0, stride_v = 0, rows = 0, bytes = 0, at = 0;  // strides in bytes
  void fetch(int64_t count) {
    for (; count > 0 && at < rows; --count, ++at)
      for (int64_t line = 0; line < bytes; line += 64) {
        __builtin_prefetch(k + at * stride_k + line, 0, 2);  // into L2: rows a page apart share few sets of L1
        __builtin_prefetch(v + at * stride_v + line, 0, 2);
      }
  }
};

// What one task works on; the parts that forward and backward share.
struct Work {
  const AttentionArgs& a;
  const AttentionCpuKernels& k;
  bool bf16;      // dot products of bf16 pairs
  int64_t width;  // D rounded up to vectors
  int64_t even;   // D rounded up to pairs
  float c;

  explicit Work(const AttentionArgs& args) : a(args), k(kernels()) {
    bf16 = a.dtype == DType::bf16 && k.gemm_bf16;
    width = round_up(a.D, k.lanes);
    even = round_up(a.D, 2);
    c = float(a.scale * kLog2e);
    if (std::abs(c) < FLT_MIN) c = FLT_MIN;  // scale 0; hidden keys are infinite scores, which 0 would turn into NaN
  }

  const AttentionTensor& key(int segment) const { return segment ? a.k2 : a.k1; }
  const AttentionTensor& value(int segment) const { return segment ? a.v2 : a.v1; }

  Ahead ahead(int64_t b, int64_t g, int segment, int64_t first, int64_t rows) const {
    const int64_t size = dtype_size(a.dtype);
    return {at(key(segment), a.dtype, b, first, g),
            at(value(segment), a.dtype, b, first, g),
            key(segment).stride_n * size,
            value(segment).stride_n * size,
            rows,
            a.D * size,
            0};
  }

  // Scores, or their gradient: m keys against a tile, fetching ahead between slices.
  void score(int64_t m, int64_t n, const uint32_t* keys, int64_t stride, const uint32_t* rows, float* to, Ahead& next) const {
    constexpr int64_t kSlice = 12;
    for (int64_t i = 0; i < m; i += kSlice) {
      next.fetch(kSlice);
      product(std::min(kSlice, m - i), n, depth(), keys + i * stride, stride, 1, rows, n, to + i * n, n, false);
    }
  }

  // The mask of keys [key, key + keys) for a tile; `limits` is room for it.
  AttentionTileMask mask(const Tile& t, int64_t b, int segment, int64_t key, int64_t keys, int32_t* limits, const float* keep) const {
    AttentionTileMask m{nullptr, nullptr, keep};
    if (segment == 1 && a.key2_valid) m.valid = a.key2_valid + b * a.N2 + key;
    if (segment == 1 && t.ragged) {
      bool all = true;
      for (int64_t r = 0; r < t.n; ++r) {
        limits[r] = int32_t(std::clamp<int64_t>(t.end2[r] - key, 0, keys));
        all &= limits[r] == keys;
      }
      if (!all) m.limit = limits;
    }
    return m;
  }

  // Rows of a [.., D] tensor for the left side of a product: floats, or bf16 with an even width.
  void pack_rows(const void* from, int64_t stride, int64_t rows, int64_t padded, void* to) const {
    if (bf16) k.copy_rows(static_cast<const uint16_t*>(from), stride, rows, a.D, static_cast<uint16_t*>(to), padded, even);
    else k.load_rows(from, a.dtype, stride, rows, a.D, static_cast<float*>(to), padded, width);
  }
  int64_t depth() const { return bf16 ? even / 2 : a.D; }        // steps of a product over D
  int64_t row_words() const { return bf16 ? even / 2 : width; }  // a packed row in 32-bit words

  // Products of a [m, k] with packed b; the word type is float or a bf16 pair.
  void product(int64_t m, int64_t n, int64_t steps, const void* x, int64_t row, int64_t col, const void* y, int64_t ldy, float* z,
               int64_t ldz, bool accumulate) const {
    if (bf16) k.gemm_bf16(m, n, steps, static_cast<const uint32_t*>(x), row, col, static_cast<const uint32_t*>(y), ldy, z, ldz, accumulate);
    else k.gemm(m, n, steps, static_cast<const float*>(x), row, col, static_cast<const float*>(y), ldy, z, ldz, accumulate);
  }
};

// ------------------------------------------------------------------------------------------------------------------- forward

void forward_task(const Work& w, int64_t b, int64_t g, const Tile* tiles, int64_t count, const Ahead& after) {
  const AttentionArgs& a = w.a;
  const AttentionCpuKernels& k = w.k;
  const int64_t lanes2 = 2 * k.lanes, width = w.width, words = w.row_words();
  const AttentionSequence seq = attention_sequence(a, b);
  Scratch& s = scratch();
  s.begin();
  uint32_t* rows = s.take<uint32_t>(lanes2 * width);
  struct State {
    uint32_t* q;               // [D, n] transposed
    float *out, *top, *total;  // [n, width], [n], [n]
    bool started;
  };
  std::vector<State> state(static_cast<size_t>(count));
  for (int64_t t = 0; t < count; ++t) {
    State& st = state[size_t(t)];
    st = {s.take<uint32_t>(lanes2 * words), s.take<float>(lanes2 * width), s.take<float>(lanes2), s.take<float>(lanes2), false};
    w.pack_rows(at(a.q, a.dtype, b, seq.q_begin + tiles[t].row, tiles[t].head), a.q.stride_n, tiles[t].rows, tiles[t].n, rows);
    k.transpose(rows, tiles[t].n, words, st.q);
    std::fill_n(st.top, tiles[t].n, -kInf);
    std::fill_n(st.total, tiles[t].n, 0.0f);
  }
  uint32_t *keys = s.take<uint32_t>(kMostKeys * width), *values = s.take<uint32_t>(kMostKeys * width);
  uint16_t* raw = s.take<uint16_t>((kMostKeys + 2) * width);
  float *scores = s.take<float>(kMostKeys * lanes2), *keep = s.take<float>(kMostKeys * lanes2), *rescale = s.take<float>(lanes2);
  uint32_t* pairs = s.take<uint32_t>(kMostKeys / 2 * lanes2);
  int32_t* limits = s.take<int32_t>(lanes2);

  struct Block {
    int segment;
    int64_t begin, end, low, high;  // [low, high): what any tile sees of it
  };
  std::vector<Block> blocks;
  for (int segment = 0; segment < 2; ++segment) {
    const int64_t total = segment ? a.N2 : seq.k_count;
    for (int64_t block = 0, end; block < total; block = end) {
      end = block_end(block, total);
      int64_t low = end, high = block;
      for (int64_t t = 0; t < count; ++t)
        if (tiles[t].begin[segment] < end && tiles[t].end[segment] > block && tiles[t].begin[segment] < tiles[t].end[segment]) {
          low = std::min(low, std::max(block, tiles[t].begin[segment]));
          high = std::max(high, std::min(end, tiles[t].end[segment]));
        }
      if (low < high) blocks.push_back({segment, block, end, low, high});
    }
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto [segment, block, end, low, high] = blocks[i];
    Ahead next = after;
    if (i + 1 < blocks.size()) {
      const Block& n = blocks[i + 1];
      next = w.ahead(b, g, n.segment, (n.segment ? 0 : seq.k_begin) + n.low, n.high - n.low);
    }
    const int64_t first = (segment ? 0 : seq.k_begin) + low;
    const AttentionTensor& source = w.key(segment);
    // A single tile reads each key once, so fp32 keys serve as they lie; not when rows are whole pages apart and fall on one set of L1.
    const bool direct = a.dtype == DType::f32 && count == 1 && source.stride_n % 1024 != 0;
    const uint32_t* key_rows = direct ? at<uint32_t>(source, a.dtype, b, first, g) : keys;
    const int64_t key_stride = direct ? source.stride_n : words;
    if (!direct) w.pack_rows(at(source, a.dtype, b, first, g), source.stride_n, high - low, high - low, keys);
    // bf16 pairs the values' rows along the keys from where a tile begins; the rows of zeros complete the last pair.
    w.pack_rows(at(w.value(segment), a.dtype, b, first, g), w.value(segment).stride_n, high - low, high - low + (w.bf16 ? 2 : 0),
                w.bf16 ? static_cast<void*>(raw) : values);
    int64_t paired = -1;  // the key at which `values` starts its pairs
    for (int64_t t = 0; t < count; ++t) {
      const Tile& tile = tiles[t];
      State& st = state[size_t(t)];
      const int64_t from = std::max(block, tile.begin[segment]), to = std::min(end, tile.end[segment]), m = to - from;
      if (m <= 0) continue;
      w.score(m, tile.n, key_rows + (from - low) * key_stride, key_stride, st.q, scores, next);
      if (a.dropout_threshold)
        k.dropout(keep, to - block, tile.n, *a.seed, b * a.H + tile.head, tile.row, block, segment, a.dropout_threshold);
      const float* factors = a.dropout_threshold ? keep + (from - block) * tile.n : nullptr;
      const bool moved = k.softmax({scores, m, tile.n, w.c, w.mask(tile, b, segment, from, m, limits, factors), st.top, st.total, rescale,
                                    w.bf16 ? pairs : nullptr});
      if (moved && st.started) k.scale_rows(st.out, tile.rows, width, rescale);
      if (w.bf16) {
        if (paired != from) {
          k.interleave(raw + (from - low) * w.even, round_up(high - from, 2), w.even, width, values);
          paired = from;
        }
        w.product(tile.rows, width, (m + 1) / 2, pairs, 1, tile.n, values, width, st.out, width, st.started);
      } else {
        w.product(tile.rows, width, m, scores, 1, tile.n, values + (from - low) * width, width, st.out, width, st.started);
      }
      st.started = true;
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const Tile& tile = tiles[t];
    const State& st = state[size_t(t)];
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = seq.q_begin + tile.row + r;
      const float total = st.started ? st.total[r] : 0.0f;
      static_cast<float*>(a.lse)[b * a.lse_stride_b + tile.head * a.lse_stride_h + row] =
          total == 0.0f ? -kInf : float((double(st.top[r]) + std::log2(double(total))) * kLn2);
      if (total == 0.0f) std::fill_n(st.out + r * width, width, 0.0f);
      k.store_row(st.out + r * width, total == 0.0f ? 0.0f : 1.0f / total, a.D, a.dtype, a.out.data,
                  b * a.out.stride_b + row * a.out.stride_n + tile.head * a.out.stride_h);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------ backward

void backward_task(const Work& w, const AttentionBackwardArgs& args, int64_t b, int64_t g, const Ahead& after) {
  const AttentionArgs& a = w.a;
  const AttentionCpuKernels& k = w.k;
  const int64_t lanes2 = 2 * k.lanes, width = w.width, words = w.row_words();
  const AttentionSequence seq = attention_sequence(a, b);
  const std::vector<Tile> tiles = make_tiles(a, b, g, k.lanes);
  const int64_t count = int64_t(tiles.size());
  const bool want_q = args.grad_q.data, want_kv = args.grad_k1.data || args.grad_k2.data;
  Scratch& s = scratch();
  s.begin();
  float *rows_f = s.take<float>(lanes2 * width), *grad_f = s.take<float>(lanes2 * width);
  struct State {
    uint32_t *q_t, *do_t;  // [D, n] transposed, for scores and their gradient
    uint32_t *q, *grad;    // [n, width] floats or [n / 2, width] bf16 pairs along the rows, for dK and dV
    float *dq, *lse2, *delta;
    bool started;
  };
  std::vector<State> state(static_cast<size_t>(count));
  const AttentionTensor& d_out = args.grad_out;
  const int64_t stride_lse = b * a.lse_stride_b;
  for (int64_t t = 0; t < count; ++t) {
    const Tile& tile = tiles[size_t(t)];
    State& st = state[size_t(t)];
    st.q_t = s.take<uint32_t>(lanes2 * words);
    st.do_t = s.take<uint32_t>(lanes2 * words);
    st.q = s.take<uint32_t>(lanes2 * width);
    st.grad = s.take<uint32_t>(lanes2 * width);
    st.dq = s.take<float>(lanes2 * width);
    st.lse2 = s.take<float>(lanes2);
    st.delta = s.take<float>(lanes2);
    st.started = false;
    const int64_t row = seq.q_begin + tile.row;
    const void* q = at(a.q, a.dtype, b, row, tile.head);
    if (w.bf16) {
      uint16_t* half = reinterpret_cast<uint16_t*>(rows_f);
      w.pack_rows(q, a.q.stride_n, tile.rows, tile.n, half);
      k.transpose(reinterpret_cast<uint32_t*>(half), tile.n, words, st.q_t);
      k.interleave(half, tile.n, w.even, width, st.q);
    } else {
      w.pack_rows(q, a.q.stride_n, tile.rows, tile.n, st.q);
      k.transpose(st.q, tile.n, words, st.q_t);
    }
    // delta = out . grad_out - grad_lse, in fp32 from the stored values.
    k.load_rows(at(a.out, a.dtype, b, row, tile.head), a.dtype, a.out.stride_n, tile.rows, a.D, rows_f, tile.n, width);
    if (d_out.data) k.load_rows(at(d_out, a.dtype, b, row, tile.head), a.dtype, d_out.stride_n, tile.rows, a.D, grad_f, tile.n, width);
    else std::fill_n(grad_f, tile.n * width, 0.0f);
    for (int64_t r = 0; r < tile.n; ++r) {
      const int64_t i = stride_lse + tile.head * a.lse_stride_h + row + r;
      const float lse = r < tile.rows ? static_cast<const float*>(a.lse)[i] : -kInf;
      const bool sees = lse != -kInf;
      st.lse2[r] = sees ? float(lse * kLog2e) : kInf;
      st.delta[r] =
          sees ? k.dot(rows_f + r * width, grad_f + r * width, a.D) - (args.grad_lse ? static_cast<const float*>(args.grad_lse)[i] : 0.0f)
               : 0.0f;
    }
    if (w.bf16) {
      uint16_t* half = reinterpret_cast<uint16_t*>(rows_f);
      if (d_out.data) w.pack_rows(at(d_out, a.dtype, b, row, tile.head), d_out.stride_n, tile.rows, tile.n, half);
      else std::fill_n(half, tile.n * w.even, uint16_t(0));
      k.transpose(reinterpret_cast<uint32_t*>(half), tile.n, words, st.do_t);
      k.interleave(half, tile.n, w.even, width, st.grad);
    } else {
      std::copy_n(grad_f, tile.n * width, reinterpret_cast<float*>(st.grad));
      k.transpose(st.grad, tile.n, words, st.do_t);
    }
  }
  uint32_t *keys = s.take<uint32_t>((kMostKeys + 2) * width), *values = s.take<uint32_t>(kMostKeys * width),
           *key_pairs = s.take<uint32_t>(kMostKeys * width);
  float *dk = s.take<float>(kMostKeys * width), *dv = s.take<float>(kMostKeys * width);
  float *scores = s.take<float>(kMostKeys * lanes2), *dp = s.take<float>(kMostKeys * lanes2), *keep = s.take<float>(kMostKeys * lanes2);
  uint16_t *p_rows = s.take<uint16_t>(kMostKeys * lanes2), *ds_rows = s.take<uint16_t>(kMostKeys * lanes2);
  uint32_t* ds_pairs = s.take<uint32_t>(kMostKeys / 2 * lanes2);
  int32_t* limits = s.take<int32_t>(lanes2);

  for (int segment = 0; segment < 2; ++segment) {
    const int64_t total = segment ? a.N2 : seq.k_count;
    const AttentionTensor& grad_k = segment ? args.grad_k2 : args.grad_k1;
    const AttentionTensor& grad_v = segment ? args.grad_v2 : args.grad_v1;
    for (int64_t block = 0, size; block < total; block += size) {
      size = block_end(block, total) - block;
      const int64_t first = (segment ? 0 : seq.k_begin) + block;
      int64_t seen = 0;  // keys of the block that any tile sees; what lies behind may be padding
      for (const Tile& tile : tiles)
        if (tile.begin[segment] < tile.end[segment]) seen = std::max(seen, std::min(size, tile.end[segment] - block));
      Ahead next = after;
      if (block + size < total) next = w.ahead(b, g, segment, first + size, std::min(kKeys, total - block - size));
      else if (segment == 0 && a.N2) next = w.ahead(b, g, 1, 0, std::min(kKeys, a.N2));
      if (seen > 0) {
        w.pack_rows(at(w.key(segment), a.dtype, b, first, g), w.key(segment).stride_n, seen, seen + 2, keys);
        w.pack_rows(at(w.value(segment), a.dtype, b, first, g), w.value(segment).stride_n, seen, seen, values);
      }
      bool empty = true;  // dk and dv hold nothing yet
      const auto clear = [&] {
        std::fill_n(dk, size * width, 0.0f);
        std::fill_n(dv, size * width, 0.0f);
        empty = false;
      };
      int64_t paired = -1;
      for (int64_t t = 0; t < count; ++t) {
        const Tile& tile = tiles[size_t(t)];
        State& st = state[size_t(t)];
        const int64_t from = std::max(block, tile.begin[segment]), to = std::min(block + size, tile.end[segment]), m = to - from;
        if (m <= 0) continue;
        const int64_t offset = from - block;
        w.score(m, tile.n, keys + offset * words, words, st.q_t, scores, next);
        w.score(m, tile.n, values + offset * words, words, st.do_t, dp, next);
        if (a.dropout_threshold)
          k.dropout(keep, to - block, tile.n, *a.seed, b * a.H + tile.head, tile.row, block, segment, a.dropout_threshold);
        const float* factors = a.dropout_threshold ? keep + offset * tile.n : nullptr;
        k.grad({scores, dp, m, tile.n, w.c, w.mask(tile, b, segment, from, m, limits, factors), st.lse2, st.delta,
                w.bf16 ? p_rows : nullptr, ds_rows, ds_pairs});
        if (want_kv) {
          if (empty && m < size) clear();
          float *to_k = dk + offset * width, *to_v = dv + offset * width;
          if (w.bf16) {
            w.product(m, width, tile.n / 2, p_rows, tile.n / 2, 1, st.grad, width, to_v, width, !empty);
            w.product(m, width, tile.n / 2, ds_rows, tile.n / 2, 1, st.q, width, to_k, width, !empty);
          } else {
            w.product(m, width, tile.rows, scores, tile.n, 1, st.grad, width, to_v, width, !empty);
            w.product(m, width, tile.rows, dp, tile.n, 1, st.q, width, to_k, width, !empty);
          }
          empty = false;
        }
        if (want_q) {
          if (w.bf16) {
            if (paired != from) {
              k.interleave(reinterpret_cast<uint16_t*>(keys) + offset * w.even, round_up(seen - offset, 2), w.even, width, key_pairs);
              paired = from;
            }
            w.product(tile.rows, width, (m + 1) / 2, ds_pairs, 1, tile.n, key_pairs, width, st.dq, width, st.started);
          } else {
            w.product(tile.rows, width, m, dp, 1, tile.n, keys + offset * width, width, st.dq, width, st.started);
          }
          st.started = true;
        }
      }
      if (!want_kv) continue;
      if (empty) clear();
      for (int64_t j = 0; j < size; ++j) {
        k.store_row(dk + j * width, float(a.scale), a.D, a.dtype, grad_k.data,
                    b * grad_k.stride_b + (first + j) * grad_k.stride_n + g * grad_k.stride_h);
        k.store_row(dv + j * width, 1.0f, a.D, a.dtype, grad_v.data,
                    b * grad_v.stride_b + (first + j) * grad_v.stride_n + g * grad_v.stride_h);
      }
    }
  }
  if (!want_q) return;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < tiles[size_t(t)].rows; ++r) {
      float* dq = state[size_t(t)].dq + r * width;
      if (!state[size_t(t)].started) std::fill_n(dq, width, 0.0f);
      k.store_row(dq, float(a.scale), a.D, a.dtype, args.grad_q.data,
                  b * args.grad_q.stride_b + (seq.q_begin + tiles[size_t(t)].row + r) * args.grad_q.stride_n +
                      tiles[size_t(t)].head * args.grad_q.stride_h);
    }
}

// ---------------------------------------------------------------------------------------------------------------------- fp64

// Calls f(segment, j, factor) for every key that row i sees; factor is dropout's.
template <class F>
void each_key(const AttentionArgs& a, int64_t b, int64_t h, int64_t i, F&& f) {
  const AttentionRow row = attention_row(a, b, i);
  const double kept = 65536.0 / (65536.0 - a.dropout_threshold);
  for (int segment = 0; segment < 2; ++segment)
    for (int64_t j = segment ? 0 : row.begin1; j < (segment ? row.end2 : row.end1); ++j) {
      if (segment && a.key2_valid && !a.key2_valid[b * a.N2 + j]) continue;
      double factor = 1;
      if (a.dropout_threshold) factor = attention_random(*a.seed, b * a.H + h, i, j, segment) >= a.dropout_threshold ? kept : 0;
      f(segment, j, factor);
    }
}

struct Row64 {
  const AttentionArgs& a;
  int64_t b, g;
  AttentionSequence seq;
  const double* row(const AttentionTensor& t, int segment, int64_t j) const {
    return at<double>(t, DType::f64, b, (segment ? 0 : seq.k_begin) + j, g);
  }
  const double* key(int segment, int64_t j) const { return row(segment ? a.k2 : a.k1, segment, j); }
  const double* value(int segment, int64_t j) const { return row(segment ? a.v2 : a.v1, segment, j); }
  double dot(const double* x, const double* y) const {
    double sum = 0;
    for (int64_t d = 0; d < a.D; ++d) sum += x[d] * y[d];
    return sum;
  }
};

void forward64(const AttentionArgs& a, int64_t b, int64_t h) {
  const Row64 r{a, b, h / (a.H / a.G), attention_sequence(a, b)};
  std::vector<double> sum(static_cast<size_t>(a.D));
  for (int64_t i = 0; i < r.seq.q_count; ++i) {
    const double* q = at<double>(a.q, a.dtype, b, r.seq.q_begin + i, h);
    double top = -INFINITY, total = 0;
    each_key(a, b, h, i, [&](int s, int64_t j, double) { top = std::max(top, a.scale * r.dot(q, r.key(s, j))); });
    std::fill(sum.begin(), sum.end(), 0.0);
    each_key(a, b, h, i, [&](int s, int64_t j, double factor) {
      const double p = std::exp(a.scale * r.dot(q, r.key(s, j)) - top);
      total += p;
      for (int64_t d = 0; d < a.D; ++d) sum[size_t(d)] += p * factor * r.value(s, j)[d];
    });
    double* out = at<double>(a.out, a.dtype, b, r.seq.q_begin + i, h);
    for (int64_t d = 0; d < a.D; ++d) out[d] = total == 0 ? 0 : sum[size_t(d)] / total;
    static_cast<double*>(a.lse)[b * a.lse_stride_b + h * a.lse_stride_h + r.seq.q_begin + i] =
        total == 0 ? -INFINITY : top + std::log(total);
  }
}

void zero64(const AttentionArgs& a, const AttentionTensor& t, int64_t b, int64_t g, int64_t first, int64_t rows) {
  if (!t.data) return;
  for (int64_t j = 0; j < rows; ++j) std::fill_n(at<double>(t, DType::f64, b, first + j, g), a.D, 0.0);
}

void backward64(const AttentionBackwardArgs& args, int64_t b, int64_t g) {
  const AttentionArgs& a = args.forward;
  const Row64 r{a, b, g, attention_sequence(a, b)};
  zero64(a, args.grad_k1, b, g, r.seq.k_begin, r.seq.k_count);
  zero64(a, args.grad_v1, b, g, r.seq.k_begin, r.seq.k_count);
  zero64(a, args.grad_k2, b, g, 0, a.N2);
  zero64(a, args.grad_v2, b, g, 0, a.N2);
  const std::vector<double> zero(static_cast<size_t>(a.D), 0.0);
  for (int64_t h = g * (a.H / a.G); h < (g + 1) * (a.H / a.G); ++h)
    for (int64_t i = 0; i < r.seq.q_count; ++i) {
      const int64_t row = r.seq.q_begin + i, at_lse = b * a.lse_stride_b + h * a.lse_stride_h + row;
      if (args.grad_q.data) zero64(a, args.grad_q, b, h, row, 1);
      const double lse = static_cast<const double*>(a.lse)[at_lse];
      if (lse == -INFINITY) continue;
      const double* q = at<double>(a.q, a.dtype, b, row, h);
      const double* grad = args.grad_out.data ? at<double>(args.grad_out, a.dtype, b, row, h) : zero.data();
      const double delta =
          r.dot(at<double>(a.out, a.dtype, b, row, h), grad) - (args.grad_lse ? static_cast<const double*>(args.grad_lse)[at_lse] : 0);
      each_key(a, b, h, i, [&](int s, int64_t j, double factor) {
        const double *key = r.key(s, j), p = std::exp(a.scale * r.dot(q, key) - lse);
        const double ds = p * (r.dot(grad, r.value(s, j)) * factor - delta) * a.scale;
        const int64_t first = s ? 0 : r.seq.k_begin;
        const AttentionTensor &grad_k = s ? args.grad_k2 : args.grad_k1, &grad_v = s ? args.grad_v2 : args.grad_v1;
        double* dq = args.grad_q.data ? at<double>(args.grad_q, a.dtype, b, row, h) : nullptr;
        double* dk = grad_k.data ? at<double>(grad_k, a.dtype, b, first + j, g) : nullptr;
        double* dv = grad_v.data ? at<double>(grad_v, a.dtype, b, first + j, g) : nullptr;
        for (int64_t d = 0; d < a.D; ++d) {
          if (dq) dq[d] += ds * key[d];
          if (dk) dk[d] += ds * q[d];
          if (dv) dv[d] += p * factor * grad[d];
        }
      });
    }
}

}  // namespace

void attention_cpu(const AttentionArgs& a) {
  if (a.dtype == DType::f64) {
    parallel_for(a.B * a.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) forward64(a, i / a.H, i % a.H);
    });
    return;
  }
  const Work w(a);
  // Tasks: runs of tiles of one (batch, key head), shorter where there are few of these for the threads at hand.
  const int64_t tiles_guess = (a.H / a.G) * ((a.Nq + 2 * w.k.lanes - 1) / (2 * w.k.lanes));
  const int64_t wanted = std::max<int64_t>(1, 2 * num_threads() / std::max<int64_t>(1, a.B * a.G));
  const int64_t size = std::clamp<int64_t>(tiles_guess / wanted, 1, kTilesPerTask);
  struct Task {
    int64_t b, g, first, count;
  };
  std::vector<std::vector<Tile>> tiles(static_cast<size_t>(a.B * a.G));
  std::vector<Task> tasks;
  for (int64_t i = 0; i < a.B * a.G; ++i) {
    tiles[size_t(i)] = make_tiles(a, i / a.G, i % a.G, w.k.lanes);
    const int64_t count = int64_t(tiles[size_t(i)].size());
    for (int64_t first = 0; first < count; first += size) tasks.push_back({i / a.G, i % a.G, first, std::min(size, count - first)});
  }
  parallel_for(int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = tasks[size_t(i)];
      Ahead after;
      if (i + 1 < end) {
        const Task& n = tasks[size_t(i + 1)];
        const AttentionSequence seq = attention_sequence(a, n.b);
        after = w.ahead(n.b, n.g, 0, seq.k_begin, std::min(kKeys, seq.k_count));
      }
      forward_task(w, t.b, t.g, tiles[size_t(t.b * a.G + t.g)].data() + t.first, t.count, after);
    }
  });
}

void attention_backward_cpu(const AttentionBackwardArgs& args) {
  const AttentionArgs& a = args.forward;
  const Work w(a);
  parallel_for(a.B * a.G, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (a.dtype == DType::f64) {
        backward64(args, i / a.G, i % a.G);
        continue;
      }
      Ahead after;
      if (i + 1 < end) {
        const AttentionSequence seq = attention_sequence(a, (i + 1) / a.G);
        after = w.ahead((i + 1) / a.G, (i + 1) % a.G, 0, seq.k_begin, std::min(kKeys, seq.k_count));
      }
      backward_task(w, args, i / a.G, i % a.G, after);
    }
  });
}

// --------------------------------------------------------------------------------------------------------------------- merge

namespace {

struct MergeWeights {
  double a, b, lse;
};
MergeWeights merge_weights(double a, double b) {
  const double top = std::max(a, b);
  if (top == -INFINITY) return {0, 0, -INFINITY};
  const double ea = std::exp(a - top), eb = std::exp(b - top), total = ea + eb;
  return {ea / total, eb / total, top + std::log(total)};
}

template <class F>
void each_row(const AttentionMergeArgs& a, F&& f) {
  parallel_for(a.B * a.Nq, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t h = 0; h < a.H; ++h) f(r / a.Nq, r % a.Nq, h, (r / a.Nq * a.H + h) * a.Nq + r % a.Nq);
  });
}

double load_lse(const AttentionMergeArgs& a, const void* lse, int64_t i) {
  return a.dtype == DType::f64 ? static_cast<const double*>(lse)[i] : static_cast<const float*>(lse)[i];
}
void store_lse(const AttentionMergeArgs& a, void* lse, int64_t i, double v) {
  if (a.dtype == DType::f64) static_cast<double*>(lse)[i] = v;
  else static_cast<float*>(lse)[i] = float(v);
}
int64_t offset(const AttentionTensor& t, int64_t b, int64_t n, int64_t h) { return b * t.stride_b + n * t.stride_n + h * t.stride_h; }

}  // namespace

void attention_merge_cpu(const AttentionMergeArgs& a) {
  each_row(a, [&](int64_t b, int64_t n, int64_t h, int64_t i) {
    const MergeWeights w = merge_weights(load_lse(a, a.lse_a, i), load_lse(a, a.lse_b, i));
    const int64_t from_a = offset(a.out_a, b, n, h), from_b = offset(a.out_b, b, n, h), to = offset(a.out, b, n, h);
    for (int64_t d = 0; d < a.D; ++d)
      store_double(a.out.data, a.dtype, to + d,
                   w.a * load_double(a.out_a.data, a.dtype, from_a + d) + w.b * load_double(a.out_b.data, a.dtype, from_b + d));
    store_lse(a, a.lse, i, w.lse);
  });
}

// d out_a = w_a g,  d lse_a = w_a (g.(out_a - out) + d lse), and so for b.
void attention_merge_backward_cpu(const AttentionMergeArgs& a) {
  each_row(a, [&](int64_t b, int64_t n, int64_t h, int64_t i) {
    const MergeWeights w = merge_weights(load_lse(a, a.lse_a, i), load_lse(a, a.lse_b, i));
    const int64_t from_a = offset(a.out_a, b, n, h), from_b = offset(a.out_b, b, n, h), from = offset(a.out, b, n, h);
    const double grad_lse = a.grad_lse ? load_lse(a, a.grad_lse, i) : 0;
    double dot_a = 0, dot_b = 0;
    for (int64_t d = 0; d < a.D; ++d) {
      const double g = a.grad_out.data ? load_double(a.grad_out.data, a.dtype, offset(a.grad_out, b, n, h) + d) : 0;
      const double out = load_double(a.out.data, a.dtype, from + d);
      dot_a += g * (load_double(a.out_a.data, a.dtype, from_a + d) - out);
      dot_b += g * (load_double(a.out_b.data, a.dtype, from_b + d) - out);
      store_double(a.grad_out_a.data, a.dtype, offset(a.grad_out_a, b, n, h) + d, w.a * g);
      store_double(a.grad_out_b.data, a.dtype, offset(a.grad_out_b, b, n, h) + d, w.b * g);
    }
    store_lse(a, a.grad_lse_a, i, w.a == 0 ? 0 : w.a * (dot_a + grad_lse));
    store_lse(a, a.grad_lse_b, i, w.b == 0 ? 0 : w.b * (dot_b + grad_lse));
  });
}

}  // namespace mmfast
