"""``FusedLinearDPOLoss``: from hidden states to a preference loss and its gradients, without the logits of the batch.

Letters: P pairs, T tokens, H hidden width, V vocabulary; a batch is ``[2P, ..]``, all chosen answers before all rejected ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmfast.ops.linear_logp import linear_logp, linear_objective, mean_row, objective_options
from mmfast.ops.preference import loss_facts, preference_loss, segment_logp


def _on_host(t: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy on the CPU, and what waits until it is there; the device goes on meanwhile."""
    if not t.is_cuda:
        return t, lambda: None
    copy, there = t.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record(torch.cuda.current_stream(t.device))
    return copy, there.synchronize


class FusedLinearDPOLoss(nn.Module):
    """DPO and its relatives from hidden states: the arguments and results of Liger's ``LigerFusedLinearDPOLoss``, and what it refuses.

    Pairs go through in chunks whose logits fit the workspace, a single pair whatever its size. A chunk's log-probabilities, its loss and the gradients of that loss are made
    while its logits exist, so head products cost three times the valid rows, whatever the batch; prompt, image and padding rows cost
    nothing. Gradients of several chunks add up in float32. A frozen head gets no gradient.

    Args:
        ignore_index: label of the tokens that are not scored.
        beta: how far the policy may move from the reference.
        loss_type: any one name of :func:`mmfast.preference_loss`; those that sort or average over the batch form the logits a second time.
        average_log_prob: divide sums by the number of tokens, or by the sum of ``token_weights`` (RLHF-V, arXiv:2312.00849). Losses that
            divide by the answers' lengths themselves (``ipo``, ``simpo``, ``orpo``, ``sigmoid_norm``, ``sft``) refuse it.
        compute_nll_loss, alpha: add alpha times the cross-entropy of the chosen answers.
        use_ref_model: whether there is a reference at all; losses without one (``simpo``, ``cpo``, ``orpo``) do not look for it.
        label_smoothing, loss_options: passed on to :func:`mmfast.preference_loss`.
        temperature, softcap, logits_dtype, workspace_mb: as in :func:`mmfast.linear_logp`.
        chunk_size: the most pairs in a chunk; None: what the workspace holds. compiled: accepted for Liger's sake; there is nothing to compile.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int | None = None,
        loss_type: str = "sigmoid",
        *,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        softcap: float | None = None,
        logits_dtype: str = "input",
        workspace_mb: float | None = None,
        **loss_options,
    ):
        super().__init__()
        self.refuses_reference = not use_ref_model
        facts = loss_facts("FusedLinearDPOLoss", loss_type)
        if average_log_prob and facts.lens:
            raise ValueError(f"FusedLinearDPOLoss: {loss_type} divides by the answers' lengths itself; leave average_log_prob out")
        self.ignore_index, self.beta, self.facts, self.use_ref_model = (
            ignore_index,
            beta,
            facts,
            use_ref_model and facts.reference,
        )
        self.average_log_prob, self.alpha, self.chunk_size = average_log_prob, alpha if compute_nll_loss else 0.0, chunk_size
        self.loss_options = dict(loss_type=loss_type, label_smoothing=label_smoothing, **loss_options)
        self.head = dict(
            ignore_index=ignore_index, temperature=temperature, softcap=softcap, logits_dtype=logits_dtype, workspace_mb=workspace_mb
        )

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and what trainers log.

        Args:
            lin_weight: ``[V, H]``. _input: ``[2P, T, H]``. target: int64 ``[2P, T]``, already shifted. bias: ``[V]``.
            ref_input, ref_weight, ref_bias: the reference's, without gradient; or
            ref_chosen_logps, ref_rejected_logps: ``[P]`` computed before, from the same sums or means.
            token_weights: ``[2P, T]`` factors of the token log-probabilities (RLHF-V, arXiv:2312.00849), constants.

        Returns:
            ``loss, (chosen_logps [P], rejected_logps [P], chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards [P],
            rejected_rewards [P])``. Only the loss has a gradient. The logits' means are over all positions and the vocabulary, before softcap
            and temperature.

        Raises:
            ValueError: shapes that do not fit, or no reference where one is needed.
        """
        pairs, odd = divmod(len(target), 2)
        unlike = _input.shape[:2] != target.shape or lin_weight.shape[1:] != _input.shape[2:]
        if odd or unlike or (token_weights is not None and token_weights.shape != target.shape):
            raise ValueError(
                f"FusedLinearDPOLoss: expected _input [2P, T, H], lin_weight [V, H], target and token_weights [2P, T], got "
                f"{list(_input.shape)}, {list(lin_weight.shape)}, {list(target.shape)} and "
                f"{None if token_weights is None else list(token_weights.shape)}"
            )
        weights = None if token_weights is None else token_weights.reshape(-1).detach()
        wide = torch.float64 if _input.dtype == torch.float64 else torch.float32
        labels, wait = _on_host(target)  # the one synchronisation: rows are dropped before the first product
        with torch.no_grad():  # mean_v (h W^T + b) = h . mean_v W + mean b; here, so that the device has it to do meanwhile
            row, shift = mean_row(lin_weight, wide), 0.0 if bias is None else bias.mean(dtype=wide)
            means = (_input.mean(1, dtype=wide) @ row + shift).view(2, -1).mean(1)
        counts = (target != self.ignore_index).sum(1)
        wait()
        sizes = (labels != self.ignore_index).sum(1).tolist()
        scored = (labels.reshape(-1) != self.ignore_index).nonzero()[:, 0]
        rows = scored.split(sizes)  # of each sequence
        reference = self._reference(target, counts, weights, ref_input, ref_weight, ref_bias, ref_chosen_logps, ref_rejected_logps)
        loss_lens = dict(chosen_lens=counts[:pairs], rejected_lens=counts[pairs:]) if self.facts.lens else {}
        chosen_tokens = max(sum(sizes[:pairs]), 1)

        def values(logp: Tensor, first: int, last: int, which: Tensor) -> tuple[Tensor, Tensor]:
            """Sequence values of pairs [first, last) and the chosen answers' summed log-probability, from their rows' log-probabilities."""
            parts = torch.cat([counts[first:last], counts[pairs + first : pairs + last]])
            ids = torch.arange(len(parts), device=logp.device).repeat_interleave(parts, output_size=len(logp))
            per_token = None if weights is None else weights[which]
            norm = "none" if not self.average_log_prob else "count" if weights is None else "weight"
            sums = segment_logp(logp, ids, token_weights=per_token, norm=norm, num_segments=len(parts))
            return sums, logp[: sum(sizes[first:last])].sum()

        def pair_loss(sums: Tensor, first: int, last: int):
            def part(t):
                return t[first:last] if isinstance(t, Tensor) and t.shape[:1] == (pairs,) else t

            options = {k: part(v) for k, v in {**self.loss_options, **loss_lens, "beta": self.beta}.items()}
            return preference_loss(*sums.chunk(2), *(part(t) for t in reference), **options, reduction="none")

        logps, rewards = (_input.new_zeros(2 * pairs, dtype=wide) for _ in range(2))
        nll = _input.new_zeros((), dtype=wide)

        def objective(logp: Tensor, first: int, last: int, which: Tensor) -> Tensor:
            sums, chosen_sum = values(logp, first, last, which)
            loss, won, lost = pair_loss(sums, first, last)
            for whole, part in ((logps, sums.detach()), (rewards, torch.cat([won, lost]))):
                for half, side in zip(whole.view(2, pairs), part.view(2, -1), strict=True):
                    half[first:last] = side
            nll.sub_(chosen_sum.detach() / chosen_tokens)
            return loss.sum() / max(pairs, 1) - self.alpha * chosen_sum / chosen_tokens if self.alpha else loss.sum() / max(pairs, 1)

        if self.facts.whole:
            which = scored.to(target.device)
            loss = self._whole(lin_weight, _input, target, bias, which, values, reference, loss_lens, chosen_tokens, logps, rewards, nll)
        else:
            options = objective_options(_input, **self.head)
            spans = self._chunks(sizes, pairs, options.rows(lin_weight))
            chunks = [torch.cat([rows[i] for i in (*range(a, b), *range(pairs + a, pairs + b))]).to(target.device) for a, b in spans]
            loss = linear_objective(
                _input, lin_weight, target, bias, chunks, lambda logp, i: objective(logp, *spans[i], chunks[i]), options
            )
        return loss, (logps[:pairs], logps[pairs:], means[0], means[1], nll, rewards[:pairs], rewards[pairs:])

    def _reference(self, target, counts, weights, ref_input, ref_weight, ref_bias, chosen, rejected) -> tuple[Tensor | None, Tensor | None]:
        if not self.use_ref_model:
            given = dict(ref_input=ref_input, ref_chosen_logps=chosen)
            if self.refuses_reference and any(t is not None for t in given.values()):
                raise ValueError("FusedLinearDPOLoss: a reference was given, but use_ref_model is False; leave one of them out")
            return None, None
        if (chosen is None) != (rejected is None) or (chosen is None and (ref_input is None or ref_weight is None)):
            raise ValueError(
                "FusedLinearDPOLoss: expected ref_input and ref_weight, or ref_chosen_logps and ref_rejected_logps, or use_ref_model=False"
            )
        if chosen is not None:
            return chosen.detach(), rejected.detach()
        with torch.no_grad():
            logp = linear_logp(ref_input, ref_weight, target, ref_bias, **self.head)
            sums = (logp if weights is None else logp * weights.view(target.shape).to(logp.dtype)).sum(1)
        if self.average_log_prob:
            scored = target != self.ignore_index
            norms = counts if weights is None else (weights.view(target.shape) * scored).sum(1)
            sums = torch.where(norms == 0, 0.0, sums / torch.where(norms == 0, 1, norms))
        return sums.chunk(2)

    def _chunks(self, sizes: list[int], pairs: int, most_rows: int) -> list[tuple[int, int]]:
        """Runs of pairs whose rows fit the workspace, at least one pair each."""
        spans, first, held = [], 0, 0
        for i in range(pairs):
            more = sizes[i] + sizes[pairs + i]
            if i > first and (held + more > most_rows or i - first == self.chunk_size):
                spans.append((first, i))
                first, held = i, 0
            held += more
        return [*spans, (first, pairs)] if pairs else []

    def _whole(self, weight, hidden, target, bias, which, values, reference, lens, chosen_tokens, logps, rewards, nll) -> Tensor:
        """The losses that need all pairs at once."""
        pairs = len(target) // 2
        logp = linear_logp(hidden, weight, target, bias, **self.head)
        sums, chosen_sum = values(logp.view(-1)[which], 0, pairs, which)
        loss, won, lost = preference_loss(*sums.chunk(2), *reference, beta=self.beta, **self.loss_options, **lens)
        logps.copy_(sums.detach())
        rewards.copy_(torch.cat([won, lost]))
        nll.sub_(chosen_sum.detach() / chosen_tokens)
        return loss - self.alpha * chosen_sum / chosen_tokens if self.alpha else loss
