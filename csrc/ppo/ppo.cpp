// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The torch side of proximal policy optimisation: schemas, checks, allocation, then the CPU or CUDA launcher of ppo.h.
#include "ppo.h"

#include <initializer_list>
#include <tuple>
#include <vector>

#include "../common/device.h"

namespace mmfast {
namespace {

using std::optional;

// Checks `t` against the first input of its op and makes it contiguous; the copy, if one is needed, stays alive in `t`.
void match(const char* op, const char* first_name, const Tensor& first, const char* name, Tensor& t) {
  check_same_device(op, first_name, first, name, t);
  MMFAST_CHECK(same_shape(t, first), op, ": expected ", name, " ", shape_of(first), " like ", first_name, ", got ", shape_of(t));
  t = as_contiguous(t);
}

PpoInput values(const char* op, const char* name, const Tensor& t) { return {t.data_ptr(), dtype_of(op, name, t)}; }

const uint8_t* flags(const char* op, const char* first_name, const Tensor& first, const char* name, optional<Tensor>& t) {
  if (!t) return nullptr;
  MMFAST_CHECK(t->scalar_type() == ScalarType::Bool, op, ": expected a bool ", name, ", got ",
               torch::headeronly::toString(t->scalar_type()));
  match(op, first_name, first, name, *t);
  return static_cast<const uint8_t*>(t->data_ptr());
}

// Runs `name` on the device of `x`.
#define MMFAST_RUN(op, x, args, name)  \
  if ((x).is_cuda()) {                 \
    MMFAST_ON_CUDA(op, x, args, name); \
  } else {                             \
    name##_cpu(args);                  \
  }

std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor value, optional<Tensor> mask, optional<Tensor> dones, optional<Tensor> bootstrap,
                               double gamma, double lam) {
  const char* op = "gae";
  MMFAST_CHECK(rewards.dim() == 2, op, ": expected rewards [B, T], got ", shape_of(rewards));
  rewards = as_contiguous(rewards);
  match(op, "rewards", rewards, "values", value);
  GaeArgs args{};
  args.rewards = values(op, "rewards", rewards);
  args.values = values(op, "values", value);
  args.mask = flags(op, "rewards", rewards, "mask", mask);
  args.dones = flags(op, "rewards", rewards, "dones", dones);
  args.B = rewards.size(0);
  args.T = rewards.size(1);
  args.gamma = gamma;
  args.lam = lam;
  if (bootstrap) {
    check_same_device(op, "rewards", rewards, "bootstrap", *bootstrap);
    MMFAST_CHECK(bootstrap->dim() == 1 && bootstrap->size(0) == args.B, op, ": expected bootstrap [B=", args.B, "], got ",
                 shape_of(*bootstrap));
    bootstrap = as_contiguous(*bootstrap);
    args.bootstrap = values(op, "bootstrap", *bootstrap);
  }
  const ScalarType type = wide_type(wide_type(rewards) == ScalarType::Double ? rewards : value);
  Tensor advantages = allocate(rewards, rewards.sizes(), type);
  Tensor returns = allocate(rewards, rewards.sizes(), type);
  if (rewards.numel() == 0) return {advantages, returns};
  args.advantages = advantages.data_ptr();
  args.returns = returns.data_ptr();
  args.out = dtype_of(op, "rewards", advantages);
  MMFAST_RUN(op, rewards, args, gae)
  return {advantages, returns};
}

Tensor masked_whiten(Tensor x, optional<Tensor> mask, bool shift_mean, double eps, bool unbiased, bool eps_on_std) {
  const char* op = "masked_whiten";
  MMFAST_CHECK(eps >= 0, op, ": expected eps >= 0, got ", eps);
  x = as_contiguous(x);
  WhitenArgs args{};
  args.x = values(op, "x", x);
  args.mask = flags(op, "x", x, "mask", mask);
  args.n = x.numel();
  args.shift_mean = shift_mean;
  args.unbiased = unbiased;
  args.eps_on_std = eps_on_std;
  args.eps = eps;
  Tensor out = allocate(x, x.sizes(), wide_type(x));
  if (args.n == 0) return out;
  args.out = out.data_ptr();
  args.out_type = dtype_of(op, "x", out);
  MMFAST_RUN(op, x, args, masked_whiten)
  return out;
}

// What both losses have in common: `names[0]` is the one with a gradient and gives the outputs their type and device.
std::tuple<Tensor, Tensor, Tensor, Tensor> loss(const char* op, std::initializer_list<const char*> names,
                                                std::vector<optional<Tensor>> inputs, optional<Tensor> mask, PpoLossArgs args) {
  Tensor& first = *inputs[0];
  first = as_contiguous(first);
  for (size_t j = 0; j < inputs.size(); ++j) {
    if (!inputs[j]) continue;
    if (j) match(op, names.begin()[0], first, names.begin()[j], *inputs[j]);
    args.in[j] = values(op, names.begin()[j], *inputs[j]);
  }
  args.mask = flags(op, names.begin()[0], first, "mask", mask);
  args.n = first.numel();
  const ScalarType type = wide_type(first);
  Tensor loss = allocate(first, {}, type), stats = allocate(first, {kPpoStats}, type), scale = allocate(first, {}, type);
  Tensor grad = allocate(first, first.sizes(), type);
  if (args.n == 0) {
    for (const Tensor& t : {loss, stats, scale}) fill_zero(t);
    return {loss, stats, scale, grad};
  }
  args.out = dtype_of(op, names.begin()[0], grad);
  args.loss = loss.data_ptr();
  args.stats = stats.data_ptr();
  args.scale = scale.data_ptr();
  args.grad = grad.data_ptr();
  MMFAST_RUN(op, first, args, ppo_loss)
  return {loss, stats, scale, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(Tensor logp, Tensor old_logp, Tensor advantages, optional<Tensor> mask,
                                                       optional<Tensor> weights, optional<Tensor> ref_logp, double clip_low,
                                                       double clip_high, double dual_clip, double kl_coef, int64_t kl) {
  const char* op = "ppo_policy_loss";
  MMFAST_CHECK(kl >= 0 && kl <= 4, op, ": unknown kl number ", kl);
  MMFAST_CHECK(kl == 0 || ref_logp, op, ": a KL estimate needs ref_logp");
  PpoLossArgs args{};
  args.kind = PpoLoss::policy;
  args.clip_low = clip_low;
  args.clip_high = clip_high;
  args.dual_clip = dual_clip;
  args.kl_coef = kl_coef;
  args.kl = PpoKl(kl);
  return loss(op, {"logp", "old_logp", "advantages", "weights", "ref_logp"}, {logp, old_logp, advantages, weights, ref_logp}, mask, args);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss(Tensor value, Tensor old_values, Tensor returns, optional<Tensor> mask, double clip) {
  PpoLossArgs args{};
  args.kind = PpoLoss::value;
  args.clip_low = args.clip_high = clip;
  return loss("ppo_value_loss", {"values", "old_values", "returns"}, {value, old_values, returns}, mask, args);
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def("gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, Tensor? bootstrap, float gamma, float lam) -> (Tensor, Tensor)");
  m.def("masked_whiten(Tensor x, Tensor? mask, bool shift_mean, float eps, bool unbiased, bool eps_on_std) -> Tensor");
  m.def(
      "ppo_policy_loss(Tensor logp, Tensor old_logp, Tensor advantages, Tensor? mask, Tensor? weights, Tensor? ref_logp, float clip_low, "
      "float clip_high, float dual_clip, float kl_coef, int kl) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, float clip) -> (Tensor, Tensor, Tensor, Tensor)");
}

// The same functions serve both devices: they branch on the tensor. Without CUDA code they say how to rebuild.
#define MMFAST_PPO_IMPL(m)                                    \
  m.impl("gae", TORCH_BOX(&mmfast::gae));                     \
  m.impl("masked_whiten", TORCH_BOX(&mmfast::masked_whiten)); \
  m.impl("ppo_policy_loss", TORCH_BOX(&mmfast::policy_loss)); \
  m.impl("ppo_value_loss", TORCH_BOX(&mmfast::value_loss));

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m){MMFAST_PPO_IMPL(m)} STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) { MMFAST_PPO_IMPL(m) }
