"""The terms of preference objectives, pure functions of what policy and reference make of an answer.

A method is a sum of terms over views (a text scored under an image): DPO is one contrast, mDPO two contrasts and an anchor, STIC a
contrast and a likelihood, POVID two half contrasts, RLHF-V a contrast of sums with dense token weights, HALVA a phrase contrast and a
forward KL. ``preference_loss`` has the other pair losses by name.

Letters: S sequences, P pairs, B samples, K phrases, V vocabulary. Unless said otherwise a sequence's log-probability is the sum over its
answer's tokens (``segment_logp``), and terms average over pairs.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmfast.ops.preference import preference_loss, segment_logp


def contrast(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    severity: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``-log sigmoid(beta [(chosen - ref_chosen) - severity (rejected - ref_rejected)])``: DPO (arXiv:2305.18290, eq. 7).

    ``rejected`` may be another answer, the same answer under a degraded image (the conditional contrast of mDPO, arXiv:2406.11839), or the
    tokens that a noised image suggests in its place (POVID, arXiv:2402.11411). ``severity`` (HSA-DPO, arXiv:2404.14233): how bad the
    rejected answer is, 1 to 3. Returns the loss and both rewards, as ``preference_loss``.
    """
    return preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, rejected_scale=severity)


def anchor(chosen: Tensor, ref_chosen: Tensor, *, beta: float = 0.1, margin: float = 0.0) -> Tensor:
    """``-log sigmoid(beta (chosen - ref_chosen) - margin)``: the chosen reward shall exceed a margin (mDPO, arXiv:2406.11839).

    Without it a contrast may sink both answers as long as the rejected one sinks faster.
    """
    return preference_loss(chosen, None, ref_chosen, loss_type="anchor", beta=beta, margin=margin)[0]


def likelihood(logp: Tensor, lens: Tensor | None = None) -> Tensor:
    """The negative log-probability of answers: a mean over sequences of their sums, or with ``lens`` a mean over all their tokens.

    STIC's weight (arXiv:2405.19716; 1 / 1024 in its code) belongs to the first; that of RPO (arXiv:2404.19733), CPO, ORPO and supervised
    training to the second, the same as ``preference_loss``'s ``sft``.
    """
    total = logp.to(torch.float64 if logp.dtype == torch.float64 else torch.float32).sum()
    return -total / (max(logp.numel(), 1) if lens is None else lens.sum().clamp_min(1))


def phrase_contrast(correct: Tensor, wrong: Tensor, present: Tensor | None = None, *, padded_mean: bool = False) -> Tensor:
    """``log(1 + exp(wrong - correct))`` for every pair of aligned phrases, no reference: HALVA (arXiv:2405.18654).

    Args:
        correct, wrong: ``[B, K]`` or any one shape, sums over a phrase's tokens (``segment_logp`` with ``segment_ids``), each token
            conditioned on its own text. The two texts of a sample must have the same number of phrases.
        present: bool, which phrases exist; default those that do not sum to 0 on both sides.
        padded_mean: average over all places, absent phrases giving log 2 (HALVA's code), instead of over the phrases that exist (its
            paper). Samples with fewer phrases than the batch's largest then pull less.
    """
    losses = preference_loss(correct, wrong, beta=1.0, reduction="none")[0]
    if padded_mean:
        return losses.sum() / max(losses.numel(), 1)
    present = (correct != 0) | (wrong != 0) if present is None else present
    return torch.where(present, losses, 0.0).sum() / present.sum().clamp_min(1)


def forward_kl(
    logits: Tensor, ref_logits: Tensor, keep: Tensor | None = None, *, total: float | Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """``KL(reference || policy)`` over the whole vocabulary, summed over tokens, divided by ``total``.

    HALVA (arXiv:2405.18654) keeps the policy near the reference on other samples by it, dividing by their number.

    Args:
        logits, ref_logits: ``[.., V]``, logits or log-probabilities; the reference is a constant.
        keep: bool ``[..]``, the tokens that count; default all.
        total: what to divide by; default the number of tokens.
        chunk: tokens at a time, in backward too: beside the gradient, nothing of the size of all logits is made.
    """
    flat, ref = logits.reshape(-1, logits.shape[-1]), ref_logits.detach().reshape(-1, logits.shape[-1])
    rows = torch.arange(len(flat), device=flat.device) if keep is None else keep.reshape(-1).nonzero().squeeze(-1)
    pieces = [checkpoint(_kl_of_rows, flat, ref, part, use_reentrant=False) for part in rows.split(chunk)]
    return sum(pieces) / (max(len(rows), 1) if total is None else total)


def _kl_of_rows(logits: Tensor, ref: Tensor, rows: Tensor) -> Tensor:
    logq, logp = (x[rows].to(torch.float64 if x.dtype == torch.float64 else torch.float32).log_softmax(-1) for x in (logits, ref))
    p = logp.exp()
    return torch.where(p > 0, p * (logp - logq), 0.0).sum()  # a token that the reference excludes adds 0, not 0 times infinity


def kto_margin(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KTO's reference point ``max(0, mean(logp - ref_logp))`` over answers that belong to other prompts (arXiv:2402.01306), a constant.

    Average over ranks before use; give it to ``preference_loss`` as the margin.
    """
    return (logp.detach() - ref_logp.detach()).double().mean().clamp_min(0)


def wpo_weights(logp: Tensor, log_square_sum: Tensor, seq_ids: Tensor, num_segments: int | None = None) -> Tensor:
    """``exp(mean_t[logp_t - log sum_v p_tv^2])`` of each sequence, a constant: WPO (arXiv:2406.11827).

    A pair's weight is the product of its two answers'. ``log_square_sum`` is ``logsumexp(2 z) - 2 logsumexp(z)`` over a token's logits z.
    """
    return segment_logp(logp.detach() - log_square_sum.detach(), seq_ids, norm="count", num_segments=num_segments).exp()


def strongest_alternative(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest token that is not the label: the arg-max, or the runner-up where the arg-max is the label. ``[.., V]``, ``[..]`` -> ids.

    An ablation, not a method. The released code of STIC (arXiv:2405.19716), and POVID's (arXiv:2402.11411) before it was repaired, scores
    these ids in place of the rejected text, policy and reference each its own: that sinks what competes with the rejected tokens, the
    opposite of the paper's objective. POVID's second stage in its first version took them from the chosen text under a noised image; the
    present one takes the arg-max, so that only tokens whose prediction the noise changes count. Score them by ``label_logp``.
    """
    first, second = logits.detach().topk(2, dim=-1).indices.unbind(-1)
    return torch.where(first == labels, second, first)
