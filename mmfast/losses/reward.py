"""What stands around a policy's update: the loss a reward model learns by, and sequences' scores and advantages made from its rewards.

Letters: P pairs, B sequences, G answers to one prompt. ``mmfast.gae`` and ``mmfast.masked_whiten`` have the advantages of tokens.
"""

import torch
from torch import Tensor

from mmfast.ops.preference import preference_loss


def reward_model_loss(first: Tensor, second: Tensor, choice: Tensor, *, center_coef: float = 1e-3) -> Tensor:
    """``mean BCE(sigmoid(second - first), choice) + center_coef |mean(first + second)|``: LLaVA-RLHF's reward model (arXiv:2309.14525).

    The first term is Bradley and Terry's, as in InstructGPT (arXiv:2203.02155, eq. 1). The second holds rewards, of which the first sees
    differences alone, near 0: the absolute value of the batch's mean, one number, as the released code has it. Other code squares every
    pair's sum (TRL's ``center_rewards_coefficient``); here, a batch whose sums cancel pays nothing. It is not additive over micro-batches.

    Args:
        first, second: rewards of a pair's outputs ``[P]``. choice: ``[P]``, 0 where the first is preferred, 1 where the second is
            (the records' ``preference`` less 1).

    Returns:
        A scalar; fp64 for fp64 rewards.
    """
    second_won = choice.bool()
    better, worse = torch.where(second_won, second, first), torch.where(second_won, first, second)
    return preference_loss(better, worse, beta=1.0)[0] + center_coef * (first + second).mean().abs()


def penalised_score(
    reward: Tensor,
    lens: Tensor,
    ended: Tensor,
    *,
    response_length: int,
    length_bonus: Tensor | float = 1.0,
    correct: Tensor | float = 0.0,
    no_end: float = -8.0,
    length_coef: float = -10.0,
    correct_coef: float = 2.0,
) -> Tensor:
    """LLaVA-RLHF's score of a sequence: ``reward + no_end [not ended] + length_coef length_bonus lens / response_length + correct_coef correct``.

    From the released code (arXiv:2309.14525); its appendix speaks of a length penalty of 10, and of 40 where the prompt asks for detail,
    which the code reaches by a record's ``length_bonus`` of 4. Goes to ``mmfast.token_rewards``.

    Args:
        reward: the reward model's ``[B]``. lens: tokens that are not padding ``[B]``. ended: bool ``[B]``, whether an end token stands in
            them. correct: ``[B]``, what comparing with a known answer gave: 1 for the right letter, +-.5 for a "No", 0 where there is none.
        response_length: columns of a response, 896 in the paper's run.
    """
    unfinished, lens = no_end * (~ended.bool()).to(reward.dtype), lens.to(reward.dtype)
    return reward + unfinished + length_coef * length_bonus * lens / response_length + correct_coef * correct


def rloo_advantages(scores: Tensor) -> Tensor:
    """``r_i - mean of the other answers' r``: REINFORCE leave-one-out (arXiv:2402.14740), a constant.

    The policy's ratio is then one for a whole answer: give ``mmfast.ppo_policy_loss`` sums of log-probabilities, ``[B, 1]``. TRL's code also
    accepts answers that no reward scored and leaves them out; drop them first.

    Args:
        scores: ``[.., G]``, the G answers of a prompt side by side, the KL penalty already taken off (``token_rewards(..).sum(-1)``).

    Returns:
        scores' shape and type.

    Raises:
        ValueError: fewer than two answers; there is nothing to leave one out of.
    """
    count = scores.shape[-1] if scores.dim() else 0
    if count < 2:
        raise ValueError(f"rloo_advantages: expected scores [.., G] with at least 2 answers to a prompt, got {list(scores.shape)}")
    scores = scores.detach()
    return scores - (scores.sum(-1, keepdim=True) - scores) / (count - 1)
