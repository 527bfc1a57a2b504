"""Rules over the next token's logits, applied before a token is drawn."""

import math

import torch
from torch import Tensor


def contrastive_logits(clean: Tensor, noisy: Tensor, *, weight: float = 1.0, plausible: float = 0.2) -> Tensor:
    """``(1 + weight) clean - weight noisy`` where clean is at least its maximum + log plausible, else -inf (VCD, arXiv:2311.16922).

    It takes away what a model says without looking, so it makes better answers. BPO (arXiv:2403.08730) wants worse ones, but its released
    generator samples by this rule; its paper's negatives are sampled from ``noisy`` alone, which is plain generation with a noised picture
    (``mmfast.data.degrade.diffuse``).

    Args:
        clean, noisy: ``[.., V]`` logits of the same text under the picture and under its noised form.
    """
    cut = clean.amax(-1, keepdim=True) + math.log(plausible)
    return torch.where(clean >= cut, (1 + weight) * clean - weight * noisy, -torch.inf)


def check_repetition(no_repeat: int, repetition_penalty: float) -> None:
    """ValueError for what ``unrepeating`` cannot be asked."""
    if no_repeat < 0:
        raise ValueError(f"generate: expected no_repeat >= 0, got {no_repeat}")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"generate: expected a finite repetition_penalty > 0, got {repetition_penalty}")


def unrepeating(logits: Tensor, told: Tensor, *, no_repeat: int = 0, repetition_penalty: float = 1.0) -> Tensor:
    """``logits [B, V]`` behind ``told [B, T]`` (prompt and all that was said) with both rules against repetition, in transformers' order."""
    logits = logits if repetition_penalty == 1 else penalised(logits, told, repetition_penalty)
    return unrepeated(logits, told, no_repeat) if no_repeat else logits


def penalised(logits: Tensor, told: Tensor, penalty: float) -> Tensor:
    """``logits [B, V]`` with those of every token in ``told [B, T]`` over ``penalty`` (CTRL, arXiv:1909.05858, section 4.1); negative ones times
    it, as in transformers, so that more than 1 makes either rarer."""
    # Placeholders of pictures may lie beyond the vocabulary: one column more takes them.
    said = torch.zeros(len(logits), logits.shape[-1] + 1, dtype=torch.bool, device=logits.device)
    said = said.scatter(1, told.clamp_max(logits.shape[-1]), True)[:, :-1]
    return torch.where(said, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def unrepeated(logits: Tensor, told: Tensor, size: int) -> Tensor:
    """``logits [B, V]`` without the tokens that would end a run of ``size`` tokens which ``told [B, T]`` holds already."""
    if told.shape[1] < size:
        return logits
    runs = told.unfold(1, size, 1)  # [B, T - size + 1, size]
    again = (runs[..., :-1] == told[:, None, told.shape[1] - size + 1 :]).all(-1) & (runs[..., -1] < logits.shape[-1])
    row, at = again.nonzero(as_tuple=True)
    return logits.index_put((row, runs[row, at, -1]), logits.new_tensor(-torch.inf))
