// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Attention of few rows on many keys: what the host code and both kernels (CPU, CUDA) agree on. Plain C++, no torch, no CUDA header.
//
// One kernel serves perceiver resampling, the Q-Former and media cross-attention; they differ in which keys a row sees, and that is
// attention_row() below: computed from indices and lengths, never read from a mask tensor.
//
// Letters: B batch, H query heads, G key/value heads (H a multiple of G), D head width, Nq rows, N1 and N2 keys of the two segments.
//   s_ij = scale q_i.k_j,  p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij),  o_i = sum_j drop(p_ij) v_j      over visible j
// A row that sees no key gives o = 0, lse = -inf and zero gradients.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

namespace mmfast {

enum class AttentionRule : int {
  lengths = 0,            // the first len1 keys of segment 1, the first len2 of segment 2
  unimodal = 1,           // rows before N1 see segment 1, the others segment 2 (BLIP-2 contrastive: queries and text apart)
  multimodal_causal = 2,  // rows before N1 see segment 1; text row t sees segment 1 and the text up to and including t (BLIP-2 captioning)
  media = 3,              // row i sees the `latents` keys of image text_time[i] (1-based; 0 none) of segment 1
  media_all = 4,          // .. of all images up to text_time[i]
};

// [batch, rows, heads, D], last dim contiguous, the other strides free (in elements).
struct AttentionTensor {
  void* data;
  int64_t stride_b, stride_n, stride_h;
};

struct AttentionArgs {
  DType dtype;  // of q, k, v, out and their gradients
  int64_t B, H, G, D, Nq, N1, N2;
  AttentionTensor q, k1, v1, k2, v2;
  AttentionTensor out;  // written by forward, read by backward
  void* lse;            // [H, ..] fp32 (fp64 when dtype is f64): row i of (b, h) at b * lse_stride_b + h * lse_stride_h + i
  int64_t lse_stride_b, lse_stride_h;
  double scale;

  AttentionRule rule;
  const int32_t* len1;        // [B] or null (= N1); rule lengths and media
  const int32_t* len2;        // [B] or null (= N2)
  const uint8_t* key2_valid;  // [B, N2] contiguous or null; keys of segment 2 with 0 are invisible to all
  const int32_t* text_time;   // [B, Nq] contiguous; the media rules
  int64_t latents;            // keys an image; the media rules
  // Packed sequences (rule lengths, one segment): sequence b has rows cu_q[b] .. cu_q[b + 1] of q and keys cu_k[b] .. cu_k[b + 1] of
  // segment 1; all stride_b and lse_stride_b are 0, Nq and N1 the longest lengths. Both null otherwise.
  const int32_t* cu_q;
  const int32_t* cu_k;

  // Dropout on p, element (b, h, i, j): kept when its 16 random bits are >= dropout_threshold, and then multiplied by
  // 65536 / (65536 - dropout_threshold). 0 is no dropout. The bits: attention_random() below.
  uint32_t dropout_threshold;
  const int64_t* seed;  // [1], on the kernel's device
};

struct AttentionBackwardArgs {
  AttentionArgs forward;
  AttentionTensor grad_out;                            // data null: zero
  const void* grad_lse;                                // laid out as lse, or null
  AttentionTensor grad_q;                              // data null: not wanted
  AttentionTensor grad_k1, grad_v1, grad_k2, grad_v2;  // either all null: not wanted, or set for each segment that exists
};

// What row i of sequence b sees: keys [begin1, end1) of segment 1 and [0, end2) of segment 2, key2_valid aside. Always within the
// segments, whatever lengths and text_time hold.
struct AttentionRow {
  int64_t begin1, end1, end2;
};

// Rows and keys of sequence b, and where they start.
struct AttentionSequence {
  int64_t q_begin, q_count, k_begin, k_count;
};

MMFAST_HD int64_t attention_clamp(int64_t v, int64_t top) { return v < 0 ? 0 : v > top ? top : v; }

MMFAST_HD AttentionSequence attention_sequence(const AttentionArgs& a, int64_t b) {
  AttentionSequence s{0, a.Nq, 0, a.N1};
  if (a.cu_q) s.q_begin = a.cu_q[b], s.q_count = attention_clamp(int64_t(a.cu_q[b + 1]) - a.cu_q[b], a.Nq);
  if (a.cu_k) s.k_begin = a.cu_k[b], s.k_count = attention_clamp(int64_t(a.cu_k[b + 1]) - a.cu_k[b], a.N1);
  return s;
}

MMFAST_HD AttentionRow attention_row(const AttentionArgs& a, int64_t b, int64_t i) {
  const int64_t n1 = a.cu_k ? attention_clamp(int64_t(a.cu_k[b + 1]) - a.cu_k[b], a.N1) : a.len1 ? attention_clamp(a.len1[b], a.N1) : a.N1;
  const int64_t n2 = a.len2 ? attention_clamp(a.len2[b], a.N2) : a.N2;
  switch (a.rule) {
    case AttentionRule::lengths:
      return {0, n1, n2};
    case AttentionRule::unimodal: {
      const bool text = i + (a.N1 + a.N2 - a.Nq) >= a.N1;  // rows are the last Nq of the sequence: fewer when the first ones are cached
      return {0, text ? 0 : n1, text ? n2 : 0};
    }
    case AttentionRule::multimodal_causal: {
      const int64_t t = i + (a.N1 + a.N2 - a.Nq) - a.N1;
      return {0, n1, attention_clamp(t + 1, n2)};
    }
    default: {
      const int64_t time = a.text_time[b * a.Nq + i], images = int32_t(n1) / int32_t(a.latents);
      if (a.rule == AttentionRule::media_all) return {0, attention_clamp(time, images) * a.latents, 0};
      if (time < 1 || time > images) return {0, 0, 0};
      return {(time - 1) * a.latents, time * a.latents, 0};
    }
  }
}

// Philox4x32-10 (Salmon et al., SC 2011): four random words of a counter under a key.
struct Philox4 {
  uint32_t w[4];
};
MMFAST_HD Philox4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The 16 random bits of row i, key j of a segment (0 or 1). One Philox call serves the 8 keys of a row that a lane of a tensor-core
// accumulator holds among 32: keys 32 g + 8 w + 2 l + {0, 1}, w = 0 .. 3, are the low and high halves of word w of the counter
// (4 g + l, i, b H + h, segment).
MMFAST_HD uint32_t attention_random(int64_t seed, int64_t bh, int64_t i, int64_t j, int segment) {
  const Philox4 r = philox(uint32_t(j / 32 * 4 + j % 8 / 2), uint32_t(i), uint32_t(bh), uint32_t(segment), uint32_t(seed),
                           uint32_t(uint64_t(seed) >> 32));
  return (r.w[j % 32 / 8] >> (j % 2 * 16)) & 0xffffu;
}

// Two partial results into one (merge_attention): rows of D values, their lse indexed [batch, head, row] as above.
//   lse = log(exp lse_a + exp lse_b),  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
struct AttentionMergeArgs {
  DType dtype;
  int64_t B, H, D, Nq;
  AttentionTensor out_a, out_b, out;
  const void* lse_a;  // contiguous [B, H, Nq]; fp64 when dtype is f64, else fp32
  const void* lse_b;
  void* lse;
  // Backward (grad_out_a.data not null; out and lse are read): gradients of all four.
  AttentionTensor grad_out;  // data null: zero
  const void* grad_lse;      // or null
  AttentionTensor grad_out_a, grad_out_b;
  void* grad_lse_a;
  void* grad_lse_b;
};

// CPU. Lengths, text_time and cu_* were checked by the caller.
void attention_cpu(const AttentionArgs&);
void attention_backward_cpu(const AttentionBackwardArgs&);
void attention_merge_cpu(const AttentionMergeArgs&);
void attention_merge_backward_cpu(const AttentionMergeArgs&);

// CUDA. `workspace` holds the bytes that the matching *_workspace asks for; results are cudaError_t (0 = success).
size_t attention_cuda_workspace(const AttentionArgs&);
int attention_cuda(const AttentionArgs&, void* workspace, void* stream);
size_t attention_backward_cuda_workspace(const AttentionBackwardArgs&);
int attention_backward_cuda(const AttentionBackwardArgs&, void* workspace, void* stream);
int attention_merge_cuda(const AttentionMergeArgs&, void* stream);
int attention_merge_backward_cuda(const AttentionMergeArgs&, void* stream);

}  // namespace mmfast
