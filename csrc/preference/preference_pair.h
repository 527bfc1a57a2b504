// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// One pair's loss and its derivatives, one formula for host and device, in fp64: a pair is a handful of numbers, and log-ratios of long
// answers reach thousands, where fp32 exponentials are gone.
//
//     a = chosen - ref_chosen        c = scale (rejected - ref_rejected)          log-ratios
//     u = f(a) / chosen_lens         v = f(c) / rejected_lens                     scores
//     x = beta (u - v)               e = label_smoothing, m = margin, b = beta
// with sp(x) = log(1 + exp(x)) = -log sigmoid(-x) and s = sigmoid:
//
//     sigmoid      (1 - e) sp(m - x) + e sp(x - m)
//     hinge        max(0, 1 - x)
//     ipo          (u - v - 1 / (2 b))^2
//     exo          s(x) (log s(x) - log(1 - e)) + s(-x) (log s(-x) - log e)
//     nca          sp(-b u) + sp(b u) / 2 + sp(b v) / 2
//     robust       ((1 - e) sp(-x) - e sp(x)) / (1 - 2 e)
//     bco          sp(m - b u) + sp(b v - m)
//     sppo         (u - 1 / (2 b))^2 + (v + 1 / (2 b))^2
//     apo_zero     s(-b a) + s(b c)
//     apo_down     s(b a) + s(-x)
//     discopop     (1 - s(x / tau)) sp(-x) + s(x / tau) exp(-x)
//     odds_ratio   b sp(-(logit(u) - logit(v))),  logit(u) = u - log(1 - exp(u))
//     anchor       sp(m - b u)
//     prospect     s(b (m - u))
//
// f is the divergence: reverse_kl f(r) = r, forward_kl -exp(-r), js log s(r), alpha exp((alpha - 1) r) / (alpha - 1). The exponent is held
// below 80: past that the score is a constant, where it would have overflowed fp32 and the sum with it.
#pragma once
#include <cmath>

#include "preference.h"

namespace mmfast {

// log(1 + exp(x)), linear for large x.
MMFAST_HD double softplus(double x) { return (x > 0 ? x : 0.0) + log1p(exp(-fabs(x))); }
// Without ever dividing infinities.
MMFAST_HD double logistic(double x) {
  const double e = exp(-fabs(x));
  return (x < 0 ? e : 1.0) / (1 + e);
}

struct Score {
  double value, slope;
};

MMFAST_HD Score exponential_score(double rate, double r) {  // exp(rate r) / rate
  constexpr double kMost = 80;
  const bool held = rate * r > kMost;
  const double power = exp(held ? kMost : rate * r);
  return {power / rate, held ? 0.0 : power};
}

MMFAST_HD Score divergence_score(Divergence divergence, double alpha, double r) {
  switch (divergence) {
    case Divergence::forward_kl:
      return exponential_score(-1, r);
    case Divergence::js:
      return {-softplus(-r), logistic(-r)};
    case Divergence::alpha:
      return exponential_score(alpha - 1, r);
    default:
      return {r, 1};
  }
}

// log(p / (1 - p)) and its derivative at u = log p. A certain answer (u = 0) would be infinitely likely to win: held just below.
MMFAST_HD Score logit_score(double u) {
  constexpr double kMost = -1e-12;
  const bool held = u > kMost;
  const double w = held ? kMost : u, rest = -expm1(w);  // 1 - p
  return {w - (w > -0.6931471805599453 ? log(rest) : log1p(-exp(w))), held ? 0.0 : 1 / rest};
}

struct PairResult {
  double loss, chosen_reward, rejected_reward, chosen_slope, rejected_slope;
};

MMFAST_HD PairResult pair_loss(const PreferenceArgs& args, int64_t p) {
  const double b = args.beta, e = args.label_smoothing, m = args.margin.at(p, 0), half = 0.5 / b;
  const double scale = args.rejected_scale.at(p, 1);
  const double a = args.chosen.at(p, 0) - args.ref_chosen.at(p, 0);
  const double lost = args.rejected.at(p, 0) - args.ref_rejected.at(p, 0), c = scale * lost;
  const double chosen_len = args.chosen_lens.at(p, 1), rejected_len = args.rejected_lens.at(p, 1);
  const double nu = chosen_len > 1 ? chosen_len : 1, nv = rejected_len > 1 ? rejected_len : 1;  // an answer without tokens sums to 0
  Score f = divergence_score(args.divergence, args.alpha, a), g = divergence_score(args.divergence, args.alpha, c);
  f.value /= nu, f.slope /= nu, g.value /= nv, g.slope /= nv;
  const double u = f.value, v = g.value, x = b * (u - v);
  // The loss, its derivatives by x, u and v, and those by a and c where it looks past the scores.
  double loss = 0, by_x = 0, by_u = 0, by_v = 0, by_a = 0, by_c = 0;
  switch (args.loss) {
    case PairLoss::sigmoid:
      loss = (1 - e) * softplus(m - x) + (e > 0 ? e * softplus(x - m) : 0.0);
      by_x = -(1 - e) * logistic(m - x) + e * logistic(x - m);
      break;
    case PairLoss::hinge:
      loss = x < 1 ? 1 - x : 0.0;
      by_x = x < 1 ? -1.0 : 0.0;
      break;
    case PairLoss::ipo:
      loss = (u - v - half) * (u - v - half);
      by_u = 2 * (u - v - half);
      by_v = -by_u;
      break;
    case PairLoss::exo: {
      const double q = logistic(x), r = logistic(-x);
      loss = q * (-softplus(-x) - log1p(-e)) + r * (-softplus(x) - log(e));
      by_x = q * r * (x - log1p(-e) + log(e));
      break;
    }
    case PairLoss::nca:
      loss = softplus(-b * u) + 0.5 * softplus(b * u) + 0.5 * softplus(b * v);
      by_u = b * (0.5 * logistic(b * u) - logistic(-b * u));
      by_v = 0.5 * b * logistic(b * v);
      break;
    case PairLoss::robust:
      loss = ((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e);
      by_x = -((1 - e) * logistic(-x) + e * logistic(x)) / (1 - 2 * e);
      break;
    case PairLoss::bco:
      loss = softplus(m - b * u) + softplus(b * v - m);
      by_u = -b * logistic(m - b * u);
      by_v = b * logistic(b * v - m);
      break;
    case PairLoss::sppo:
      loss = (u - half) * (u - half) + (v + half) * (v + half);
      by_u = 2 * (u - half);
      by_v = 2 * (v + half);
      break;
    case PairLoss::apo_zero:
      loss = logistic(-b * a) + logistic(b * c);
      by_a = -b * logistic(b * a) * logistic(-b * a);
      by_c = b * logistic(b * c) * logistic(-b * c);
      break;
    case PairLoss::apo_down:
      loss = logistic(b * a) + logistic(-x);
      by_a = b * logistic(b * a) * logistic(-b * a);
      by_x = -logistic(x) * logistic(-x);
      break;
    case PairLoss::discopop: {
      // s(y) exp(-x) as one exponential: far below zero its factors are 0 and infinity.
      const double y = x / args.tau, g0 = logistic(y), g1 = logistic(-y), power = exp(-x - softplus(-y));
      loss = g1 * softplus(-x) + power;
      by_x = -g0 * g1 / args.tau * softplus(-x) - g1 * logistic(-x) + power * (g1 / args.tau - 1);
      break;
    }
    case PairLoss::odds_ratio: {
      const Score w = logit_score(u), l = logit_score(v);
      const double d = w.value - l.value;
      loss = b * softplus(-d);
      by_u = -b * logistic(-d) * w.slope;
      by_v = b * logistic(-d) * l.slope;
      break;
    }
    case PairLoss::anchor:
      loss = softplus(m - b * u);
      by_u = -b * logistic(m - b * u);
      break;
    case PairLoss::prospect:
      loss = logistic(b * (m - u));
      by_u = -b * loss * logistic(b * (u - m));
      break;
  }
  by_u += b * by_x;
  by_v -= b * by_x;
  // Where a score is held its slope is 0, and 0 times an infinite derivative must not be NaN.
  const double to_a = f.slope == 0 ? by_a : by_u * f.slope + by_a;
  const double to_c = g.slope == 0 ? by_c : by_v * g.slope + by_c;
  return {loss, b * a, b * lost, to_a, scale * to_c};
}

}  // namespace mmfast
