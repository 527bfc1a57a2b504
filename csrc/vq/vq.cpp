// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The torch side of vector quantisation: schemas, checks, allocation, then the CPU or CUDA launcher of vq.h.
#include "vq.h"

#include <array>
#include <initializer_list>
#include <limits>
#include <tuple>
#include <vector>

#include "../common/device.h"

namespace mmfast {
namespace {

using std::optional;

// The size-and-stride groups of all dims but the channel's, row-major, adjacent ones merged where memory allows; false if more than two
// remain, that is, if no VqRows describes the tensor.
bool group_rows(const Tensor& t, int64_t channel, void* data, DType dtype, VqRows& rows) {
  std::array<int64_t, 2> size{1, 1}, stride{0, 0};
  int groups = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (i == channel || t.size(i) == 1) continue;
    if (groups > 0 && stride[groups - 1] == t.size(i) * t.stride(i)) {
      size[groups - 1] *= t.size(i);
      stride[groups - 1] = t.stride(i);
    } else if (groups == 2) {
      return false;
    } else {
      size[groups] = t.size(i);
      stride[groups++] = t.stride(i);
    }
  }
  // One group is the outer one, with a single inner element.
  rows = VqRows{data, dtype, size[0], size[1], t.size(channel), stride[0], stride[1], t.stride(channel)};
  return true;
}

// x as rows; a copy is made, and kept alive by `x`, only if its layout fits no VqRows.
VqRows input_rows(const char* op, const char* name, Tensor& x, int64_t channel) {
  const DType dtype = dtype_of(op, name, x);
  VqRows rows;
  if (!group_rows(x, channel, x.data_ptr(), dtype, rows)) {
    x = as_contiguous(x);
    group_rows(x, channel, x.data_ptr(), dtype, rows);
  }
  return rows;
}

// A tensor like x to be written as rows: `written` receives the rows and equals `result` unless x's layout fits no VqRows.
struct OutputRows {
  Tensor result, written;
  VqRows rows;
  OutputRows(const Tensor& like, DType dtype, int64_t channel)
      : result(like.is_contiguous() ? allocate(like, like.sizes()) : torch::stable::empty_like(like)), written(result) {
    if (group_rows(written, channel, written.data_ptr(), dtype, rows)) return;
    written = allocate(like, like.sizes());
    group_rows(written, channel, written.data_ptr(), dtype, rows);
  }
  Tensor finish() {
    if (written.data_ptr() != result.data_ptr()) torch::stable::copy_(result, written);
    return result;
  }
};

int64_t channel_of(const char* op, const Tensor& x, int64_t channel_dim) {
  const int64_t dims = x.dim();
  MMFAST_CHECK(dims >= 1 && channel_dim >= -dims && channel_dim < dims, op, ": channel_dim ", channel_dim, " does not exist in x of shape ",
               shape_of(x));
  return channel_dim < 0 ? channel_dim + dims : channel_dim;
}

std::vector<int64_t> row_sizes(const Tensor& x, int64_t channel) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i)
    if (i != channel) sizes.push_back(x.size(i));
  return sizes;
}

Tensor codebook_rows(const char* op, const Tensor& codebook, const Tensor& x, int64_t channel) {
  check_same_device(op, "x", x, "codebook", codebook);
  MMFAST_CHECK(codebook.dim() == 2 && codebook.size(1) == x.size(channel), op, ": expected codebook [K, D=", x.size(channel), "] like x ",
               shape_of(x), " along dim ", channel, ", got ", shape_of(codebook));
  MMFAST_CHECK(codebook.size(0) >= 1 && codebook.size(1) >= 1, op, ": expected at least one code and D >= 1, got codebook ",
               shape_of(codebook));
  MMFAST_CHECK(codebook.size(0) <= std::numeric_limits<int32_t>::max() - 1024, op, ": more than 2^31 codes");
  return codebook.stride(1) == 1 && codebook.stride(0) >= 0 ? codebook : as_contiguous(codebook);
}

Tensor contiguous_indices(const char* op, const Tensor& indices, const Tensor& x, int64_t channel) {
  check_same_device(op, "x", x, "indices", indices);
  MMFAST_CHECK(indices.scalar_type() == ScalarType::Long, op, ": expected indices of type int64, got ",
               torch::headeronly::toString(indices.scalar_type()));
  MMFAST_CHECK(indices.numel() * x.size(channel) == x.numel(), op, ": expected one index a row of x ", shape_of(x), " (channel dim ",
               channel, "), got indices ", shape_of(indices));
  return as_contiguous(indices);
}

void run_nearest(const char* op, const Tensor& x, VqNearestArgs& args) {
  if (x.is_cuda()) {
    MMFAST_ON_CUDA(op, x, args, vq_nearest);
    return;
  }
  const int64_t bad = vq_nearest_cpu(args);
  MMFAST_CHECK(bad == -1, op, ": ", bad >= 0 ? "row " : "code ", bad >= 0 ? bad : -2 - bad, " of ", bad >= 0 ? "x" : "the codebook",
               " holds NaN or Inf; it has no nearest code");
}

std::tuple<Tensor, Tensor> nearest(Tensor x, Tensor codebook, int64_t metric, int64_t channel_dim, bool return_distance) {
  const char* op = "vq_nearest";
  const int64_t channel = channel_of(op, x, channel_dim);
  MMFAST_CHECK(metric >= 0 && metric <= 2, op, ": unknown metric number ", metric);
  codebook = codebook_rows(op, codebook, x, channel);
  const std::vector<int64_t> sizes = row_sizes(x, channel);
  Tensor indices = allocate(x, sizes, ScalarType::Long);
  Tensor distance = allocate(x, return_distance ? sizes : std::vector<int64_t>{0}, wide_type(x));
  if (indices.numel() == 0) return {indices, distance};
  VqNearestArgs args{};
  args.x = input_rows(op, "x", x, channel);
  args.codebook = codebook.data_ptr();
  args.codebook_dtype = dtype_of(op, "codebook", codebook);
  args.K = codebook.size(0);
  args.stride_k = codebook.stride(0);
  args.metric = VqMetric(metric);
  args.indices = static_cast<int64_t*>(indices.data_ptr());
  args.distance = return_distance ? distance.data_ptr() : nullptr;
  run_nearest(op, x, args);
  return {indices, distance};
}

// The last three arguments steer the gradient alone (mmfast/ops/vq.py registers it); they pass through here so that autograd sees them.
std::tuple<Tensor, Tensor, Tensor> quantize(Tensor x, Tensor codebook, optional<Tensor> mask, int64_t channel_dim, int64_t /*gradient*/,
                                            double /*commit_share*/, double /*code_share*/) {
  const char* op = "vq_quantize";
  const int64_t channel = channel_of(op, x, channel_dim);
  codebook = codebook_rows(op, codebook, x, channel);
  Tensor indices = allocate(x, row_sizes(x, channel), ScalarType::Long);
  if (mask) {
    check_same_device(op, "x", x, "mask", *mask);
    MMFAST_CHECK(mask->scalar_type() == ScalarType::Bool && same_shape(*mask, indices), op, ": expected a bool mask ", shape_of(indices),
                 ", one entry a row of x, got ", torch::headeronly::toString(mask->scalar_type()), " ", shape_of(*mask));
    mask = as_contiguous(*mask);
  }
  OutputRows quantized(x, dtype_of(op, "x", x), channel);
  Tensor mse = allocate(x, {}, wide_type(x));
  if (indices.numel() == 0) {
    fill_zero(mse);
    return {quantized.result, indices, mse};
  }
  VqNearestArgs args{};
  args.x = input_rows(op, "x", x, channel);
  args.codebook = codebook.data_ptr();
  args.codebook_dtype = dtype_of(op, "codebook", codebook);
  args.K = codebook.size(0);
  args.stride_k = codebook.stride(0);
  args.metric = VqMetric::l2;
  args.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  args.indices = static_cast<int64_t*>(indices.data_ptr());
  args.quantized = quantized.rows;
  args.mse = mse.data_ptr();
  run_nearest(op, x, args);
  return {quantized.finish(), indices, mse};
}

std::tuple<Tensor, Tensor> quantize_backward(optional<Tensor> grad_q, optional<Tensor> grad_mse, Tensor x, Tensor codebook, Tensor indices,
                                             double commit_share, double code_share, int64_t gradient, int64_t channel_dim, bool need_x,
                                             bool need_codebook) {
  const char* op = "vq_quantize_backward";
  const int64_t channel = channel_of(op, x, channel_dim);
  codebook = codebook_rows(op, codebook, x, channel);
  indices = contiguous_indices(op, indices, x, channel);
  MMFAST_CHECK(gradient >= 0 && gradient <= 2, op, ": unknown gradient number ", gradient);
  VqBackwardArgs args{};
  args.x = input_rows(op, "x", x, channel);
  args.codebook = codebook.data_ptr();
  args.codebook_dtype = dtype_of(op, "codebook", codebook);
  args.K = codebook.size(0);
  args.stride_k = codebook.stride(0);
  args.indices = static_cast<const int64_t*>(indices.data_ptr());
  if (grad_q) {
    check_same_device(op, "x", x, "grad_q", *grad_q);
    MMFAST_CHECK(grad_q->dim() == x.dim() && grad_q->numel() == x.numel(), op, ": expected grad_q ", shape_of(x), ", got ",
                 shape_of(*grad_q));
    args.grad_q = input_rows(op, "grad_q", *grad_q, channel);
  }
  if (grad_mse) {
    check_same_device(op, "x", x, "grad_mse", *grad_mse);
    grad_mse = as_contiguous(as_type(*grad_mse, wide_type(x)));
    MMFAST_CHECK(grad_mse->numel() == 1, op, ": expected a scalar grad_mse, got ", shape_of(*grad_mse));
    args.grad_loss = grad_mse->data_ptr();
  }
  args.w_commit = commit_share;
  args.w_code = code_share;
  args.gradient = VqGradient(gradient);
  Tensor nothing_x = allocate(x, {0}), nothing_e = allocate(codebook, {0});
  optional<OutputRows> grad_x;
  if (need_x) {
    grad_x.emplace(x, args.x.dtype, channel);
    args.grad_x = grad_x->rows;
  }
  Tensor grad_codebook = need_codebook ? allocate(codebook, codebook.sizes()) : nothing_e;
  args.grad_codebook = need_codebook ? grad_codebook.data_ptr() : nullptr;
  if (x.numel() == 0) {
    if (need_codebook) fill_zero(grad_codebook);
  } else if (x.is_cuda()) {
    MMFAST_ON_CUDA(op, x, args, vq_backward);
  } else {
    vq_backward_cpu(args);
  }
  return {grad_x ? grad_x->finish() : nothing_x, grad_codebook};
}

// Checks and fills the row side of a statistics op; the weight's contiguous copy, if one is needed, stays alive in `weight`.
VqStatsArgs stats_args(const char* op, Tensor& x, Tensor& indices, optional<Tensor>& weight, int64_t K, int64_t channel) {
  indices = contiguous_indices(op, indices, x, channel);
  if (weight) {
    check_same_device(op, "x", x, "weight", *weight);
    MMFAST_CHECK(weight->scalar_type() == ScalarType::Float && weight->numel() == indices.numel(), op,
                 ": expected float32 weights, one a row, like indices ", shape_of(indices), ", got ",
                 torch::headeronly::toString(weight->scalar_type()), " ", shape_of(*weight));
    weight = as_contiguous(*weight);
  }
  VqStatsArgs args{};
  args.x = input_rows(op, "x", x, channel);
  args.indices = static_cast<const int64_t*>(indices.data_ptr());
  args.weight = weight ? static_cast<const float*>(weight->data_ptr()) : nullptr;
  args.K = K;
  return args;
}

void check_index(const char* op, int64_t bad, const VqStatsArgs& args) {
  MMFAST_CHECK(bad == -1, op, ": index ", args.indices[bad], " of row ", bad, " is outside [-1, K=", args.K, ")");
}

std::tuple<Tensor, Tensor> code_stats(Tensor x, Tensor indices, int64_t K, optional<Tensor> weight, int64_t channel_dim) {
  const char* op = "vq_code_stats";
  const int64_t channel = channel_of(op, x, channel_dim);
  MMFAST_CHECK(K >= 1, op, ": expected K >= 1, got ", K);
  VqStatsArgs args = stats_args(op, x, indices, weight, K, channel);
  Tensor counts = torch::stable::new_zeros(x, {K}, wide_type(x));
  Tensor sums = torch::stable::new_zeros(x, {K, x.size(channel)}, wide_type(x));
  if (x.numel() == 0) return {counts, sums};
  args.counts = counts.data_ptr();
  args.sums = sums.data_ptr();
  if (x.is_cuda()) {
    MMFAST_ON_CUDA(op, x, args, vq_code_stats);
  } else {
    check_index(op, vq_code_stats_cpu(args), args);
  }
  return {counts, sums};
}

using Named = std::pair<const char*, const Tensor*>;

// Checks the running state and fills its side of the arguments.
VqEmaArgs ema_args(const char* op, const Tensor& cluster_size, const Tensor& embed_avg, const Tensor& codebook, double decay, double eps,
                   bool normalize, std::initializer_list<Named> more = {}) {
  MMFAST_CHECK(codebook.dim() == 2, op, ": expected codebook [K, D], got ", shape_of(codebook));
  const int64_t K = codebook.size(0), D = codebook.size(1);
  std::vector<Named> all{{"cluster_size", &cluster_size}, {"embed_avg", &embed_avg}, {"codebook", &codebook}};
  all.insert(all.end(), more);
  for (const auto& [name, t] : all) {
    const bool vector = t == &cluster_size || std::string(name) == "counts";
    MMFAST_CHECK(t->dim() == (vector ? 1 : 2) && t->size(0) == K && (vector || t->size(1) == D), op, ": expected ", name,
                 vector ? " [K=" : " [K, D]=[", K, vector ? "" : ", " + std::to_string(D), "] like codebook, got ", shape_of(*t));
    MMFAST_CHECK(
        t->scalar_type() == codebook.scalar_type() && (t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::Double), op,
        ": expected ", name, " of the codebook's type, float32 or float64: running statistics need full precision, got ",
        torch::headeronly::toString(t->scalar_type()), " beside a codebook of ", torch::headeronly::toString(codebook.scalar_type()));
    MMFAST_CHECK(t->is_contiguous(), op, ": expected contiguous ", name, "; the state is updated in place");
    check_same_device(op, "codebook", codebook, name, *t);
  }
  MMFAST_CHECK(decay >= 0 && decay <= 1 && eps >= 0, op, ": expected 0 <= decay <= 1 and eps >= 0, got ", decay, " and ", eps);
  VqEmaArgs args{};
  args.cluster_size = cluster_size.data_ptr();
  args.embed_avg = embed_avg.data_ptr();
  args.codebook = codebook.data_ptr();
  args.dtype = dtype_of(op, "codebook", codebook);
  args.K = K;
  args.D = D;
  args.decay = decay;
  args.eps = eps;
  args.normalize = normalize;
  return args;
}

void ema_step(Tensor cluster_size, Tensor embed_avg, Tensor codebook, Tensor counts, Tensor sums, double decay, double eps,
              bool normalize) {
  const char* op = "vq_ema_step_";
  VqEmaArgs args = ema_args(op, cluster_size, embed_avg, codebook, decay, eps, normalize, {{"counts", &counts}, {"sums", &sums}});
  args.counts = counts.data_ptr();
  args.sums = sums.data_ptr();
  if (codebook.numel() == 0) return;
  if (codebook.is_cuda()) {
    MMFAST_ON_CUDA(op, codebook, args, vq_ema);
  } else {
    vq_ema_cpu(args);
  }
}

void ema_update(Tensor cluster_size, Tensor embed_avg, Tensor codebook, Tensor x, Tensor indices, optional<Tensor> weight,
                int64_t channel_dim, double decay, double eps, bool normalize) {
  const char* op = "vq_ema_update_";
  const int64_t channel = channel_of(op, x, channel_dim);
  codebook_rows(op, codebook, x, channel);
  const VqEmaArgs args = ema_args(op, cluster_size, embed_avg, codebook, decay, eps, normalize);
  if (x.is_cuda()) {
    auto [counts, sums] = code_stats(x, indices, args.K, weight, channel_dim);
    const ScalarType type = codebook.scalar_type();
    ema_step(cluster_size, embed_avg, codebook, as_type(counts, type), as_type(sums, type), decay, eps, normalize);
    return;
  }
  const VqStatsArgs rows = stats_args(op, x, indices, weight, args.K, channel);
  check_index(op, vq_ema_update_cpu(args, rows), rows);
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def("vq_nearest(Tensor x, Tensor codebook, int metric, int channel_dim, bool return_distance) -> (Tensor, Tensor)");
  m.def(
      "vq_quantize(Tensor x, Tensor codebook, Tensor? mask, int channel_dim, int gradient, float commit_share, float "
      "code_share) -> (Tensor, Tensor, Tensor)");
  m.def(
      "vq_quantize_backward(Tensor? grad_q, Tensor? grad_mse, Tensor x, Tensor codebook, Tensor indices, float commit_share, float "
      "code_share, "
      "int gradient, int channel_dim, bool need_x, bool need_codebook) -> (Tensor, Tensor)");
  m.def("vq_code_stats(Tensor x, Tensor indices, int K, Tensor? weight, int channel_dim) -> (Tensor, Tensor)");
  m.def(
      "vq_ema_step_(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!) codebook, Tensor counts, Tensor sums, float decay, float "
      "eps, bool normalize) -> ()");
  m.def(
      "vq_ema_update_(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!) codebook, Tensor x, Tensor indices, Tensor? weight, int "
      "channel_dim, float decay, float eps, bool normalize) -> ()");
}

// The same functions serve both devices: they branch on the tensor. Without CUDA code they say how to rebuild.
#define MMFAST_VQ_IMPL(m)                                                \
  m.impl("vq_nearest", TORCH_BOX(&mmfast::nearest));                     \
  m.impl("vq_quantize", TORCH_BOX(&mmfast::quantize));                   \
  m.impl("vq_quantize_backward", TORCH_BOX(&mmfast::quantize_backward)); \
  m.impl("vq_code_stats", TORCH_BOX(&mmfast::code_stats));               \
  m.impl("vq_ema_step_", TORCH_BOX(&mmfast::ema_step));                  \
  m.impl("vq_ema_update_", TORCH_BOX(&mmfast::ema_update));

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { MMFAST_VQ_IMPL(m) }
STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) { MMFAST_VQ_IMPL(m) }
