"""Codebook modules on the vq ops: an EMA-trained quantiser and the learned-embedding quantiser of VQGAN.

``VectorQuantize`` takes the arguments and gives the returns and state-dict keys of vector-quantize-pytorch's module of that name;
``VectorQuantizer2`` those of taming-transformers' (and the weights of transformers' ``ChameleonVQVAEVectorQuantizer``).
Sources: VQ-VAE (arXiv:1711.00937), VQGAN (arXiv:2012.09841), cosine codes and dead-code restart (arXiv:2110.04627), SoundStream's k-means
start (arXiv:2107.03312), the rotation trick (arXiv:2410.06424).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.ops import vq_code_stats, vq_ema_step_, vq_ema_update_, vq_nearest, vq_quantize


class EMACodebook(nn.Module):
    """K codes of width D with their running statistics. Buffers carry a leading axis of 1, as upstream checkpoints do."""

    def __init__(self, dim: int, codebook_size: int, *, unit: bool, initted: bool, learnable: bool):
        super().__init__()
        embed = torch.empty(1, codebook_size, dim)
        nn.init.kaiming_uniform_(embed)
        if unit:
            embed = F.normalize(embed, dim=-1)
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.register_buffer("initted", torch.tensor(initted))
        self.register_buffer("cluster_size", torch.ones(1, codebook_size))
        self.register_buffer("embed_avg", embed.clone())


class VectorQuantize(nn.Module):
    """Vector quantisation whose codes follow a moving average of the rows that chose them.

    In training mode each call searches with the present codes, returns them, and then updates: moving averages with Laplace smoothing,
    then dead codes are replaced. ``eval()`` or ``freeze_codebook=True`` leaves the codebook alone. In distributed training the
    statistics are all-reduced first and replacements broadcast, so that all ranks keep one codebook.

    Args:
        dim: width of the input.
        codebook_size: K.
        codebook_dim: width of the codes; another width than ``dim`` adds a linear layer before and after.
        decay: of the moving averages; 1 - decay is the share of the batch.
        eps: Laplace smoothing of the cluster sizes.
        kmeans_init, kmeans_iters: start from k-means of the first training batch.
        use_cosine_sim: rows and codes of unit length.
        threshold_ema_dead_code: codes with a smaller running cluster size are replaced by random rows of the batch; 0 never.
        channel_last: input ``[B, N, dim]`` (or any ``[.., dim]``); False: ``[B, dim, N]``.
        accept_image_fmap: input ``[B, dim, H, W]``, indices ``[B, H, W]``.
        commitment_weight: of ``mean((x - sg e)^2)`` in the loss.
        rotation_trick: gradient by the rotation trick (upstream's default); False: straight-through.
        learnable_codebook: codes are a parameter trained by the loss as well.
        ema_update: moving-average updates; default: unless the codes are learnable.
        sync_codebook: all-reduce statistics; default: when torch.distributed runs with more than one rank.
        return_zeros_for_masked_padding: masked rows of the output are 0 (upstream's default) rather than the input.

    Returns:
        ``(quantized, indices, loss)``: quantized like the input, indices int64 (-1 where masked), loss a scalar (0 in eval mode).
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool = True,
        learnable_codebook: bool = False,
        ema_update: bool | None = None,
        sync_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
    ):
        super().__init__()
        codebook_dim = codebook_dim or dim
        self.project_in = nn.Linear(dim, codebook_dim) if codebook_dim != dim else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if codebook_dim != dim else nn.Identity()
        self.ema_update = not learnable_codebook if ema_update is None else ema_update
        if self.ema_update and learnable_codebook:
            raise ValueError("VectorQuantize: a learnable codebook cannot also follow the moving average; set ema_update=False")
        self._codebook = EMACodebook(
            codebook_dim, codebook_size, unit=use_cosine_sim, initted=not kmeans_init, learnable=learnable_codebook
        )
        self.dim, self.codebook_size = dim, codebook_size
        self.decay, self.eps = decay, eps
        self.freeze_codebook = freeze_codebook
        self.kmeans_init, self.kmeans_iters = kmeans_init, kmeans_iters
        self.use_cosine_sim = use_cosine_sim
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.channel_dim = 1 if accept_image_fmap or not channel_last else -1
        self.commitment_weight = commitment_weight
        self.rotation_trick = rotation_trick
        self.learnable_codebook = learnable_codebook
        self.sync_codebook = sync_codebook
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

    @property
    def codebook(self) -> Tensor:
        """The codes, ``[K, D]``."""
        return self._codebook.embed[0]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes ``[.., D]`` of indices; zeros where the index is -1."""
        return torch.where((indices >= 0).unsqueeze(-1), self.codebook[indices.clamp_min(0)], 0.0)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the module returned for these indices, in the input's layout."""
        return self.project_out(self.get_codes_from_indices(indices)).movedim(-1, self.channel_dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, decay={self.decay}"

    def forward(self, x: Tensor, mask: Tensor | None = None, freeze_codebook: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[self.channel_dim] != self.dim:
            raise ValueError(
                f"VectorQuantize: expected {self.dim} values along dim {self.channel_dim} of x, got shape {tuple(x.shape)}; "
                "see channel_last and accept_image_fmap"
            )
        channel = self.channel_dim
        if not isinstance(self.project_in, nn.Identity) or self.use_cosine_sim:
            x, channel = self.project_in(x.movedim(channel, -1)), -1
            if self.use_cosine_sim:
                x = F.normalize(x, dim=-1)
        learning = self.training and not (self.freeze_codebook or freeze_codebook)
        # Without k-means the buffer is not asked: reading it would end torch.compile's graph and wait for the device.
        if learning and self.kmeans_init and not self._codebook.initted:
            self._kmeans(x, mask, channel)
        codes = self.codebook
        if self.learnable_codebook and self.use_cosine_sim:
            codes = F.normalize(codes, dim=-1)
        if learning and self.ema_update and x.dtype != codes.dtype:
            codes = codes.clone()  # the backward pass reads the codes, the update below changes them
        quantized, indices, loss = vq_quantize(
            x,
            codes if learning else codes.detach(),
            beta=1.0 if self.learnable_codebook else 0.0,
            gradient="rotation" if self.rotation_trick and self.training else "ste",
            channel_dim=channel,
            mask=mask,
        )
        if self.learnable_codebook:  # upstream's value is one squared error whose gradient reaches rows and codes alike
            loss = loss - 0.5 * loss.detach()
        loss = loss * self.commitment_weight
        if learning and self.ema_update:
            self._update(x.detach(), indices, channel)
        if mask is not None and self.return_zeros_for_masked_padding:
            quantized = torch.where(mask.unsqueeze(channel), quantized, 0.0)
        quantized = self.project_out(quantized.movedim(channel, -1)).movedim(-1, self.channel_dim) if channel == -1 else quantized
        return quantized, indices, loss if self.training else loss.new_zeros(())

    # ------------------------------------------------------------------------------------------------ codebook updates

    def _distributed(self) -> bool:
        if self.sync_codebook is False or not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size() > 1

    def _all_reduced(self, counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        if self._distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        return counts, sums

    @torch.no_grad()
    def _update(self, x: Tensor, indices: Tensor, channel: int) -> None:
        book = self._codebook
        state = (book.cluster_size[0], book.embed_avg[0], book.embed[0])
        options = dict(decay=self.decay, eps=self.eps, normalize=self.use_cosine_sim)
        if self._distributed():
            counts, sums = self._all_reduced(*vq_code_stats(x, indices, self.codebook_size, channel_dim=channel))
            vq_ema_step_(*state, counts.to(book.embed), sums.to(book.embed), **options)
        else:
            vq_ema_update_(*state, x, indices, channel_dim=channel, **options)
        if self.threshold_ema_dead_code > 0:
            self._restart_dead_codes(x, indices, channel)

    def _restart_dead_codes(self, x: Tensor, indices: Tensor, channel: int) -> None:
        """Code, average and size are reset together: the next average would undo a new code alone."""
        book = self._codebook
        dead = book.cluster_size[0] < self.threshold_ema_dead_code
        if not dead.any():
            return
        rows = self._sample(x, indices, int(dead.sum()), channel).to(book.embed)
        book.embed[0, dead] = rows
        book.cluster_size[0, dead] = float(self.threshold_ema_dead_code)
        book.embed_avg[0, dead] = rows * self.threshold_ema_dead_code

    def _sample(self, x: Tensor, indices: Tensor, count: int, channel: int) -> Tensor:
        """Random valid rows, without repetition if there are enough; the same on every rank (rank 0's)."""
        rows = x.movedim(channel, -1).reshape(-1, x.shape[channel])[indices.reshape(-1) >= 0]
        if len(rows) == 0:
            picked = self.codebook.detach()[torch.randint(self.codebook_size, (count,), device=x.device)]
        elif len(rows) >= count:
            picked = rows[torch.randperm(len(rows), device=x.device)[:count]]
        else:
            picked = rows[torch.randint(len(rows), (count,), device=x.device)]
        picked = picked.contiguous()
        if self._distributed():
            dist.broadcast(picked, 0)
        return picked

    @torch.no_grad()
    def _kmeans(self, x: Tensor, mask: Tensor | None, channel: int) -> None:
        """Lloyd's iterations from random rows. A cluster that empties keeps its centre."""
        book, k = self._codebook, self.codebook_size
        valid = torch.zeros(x.movedim(channel, -1).shape[:-1], dtype=torch.long, device=x.device)
        if mask is not None:
            valid = torch.where(mask, valid, -1)
        means = self._sample(x.detach(), valid, k, channel).to(book.embed)
        for _ in range(self.kmeans_iters):
            indices = torch.where(valid >= 0, vq_nearest(x.detach(), means, channel_dim=channel), -1)
            counts, sums = self._all_reduced(*vq_code_stats(x.detach(), indices, k, channel_dim=channel))
            new = sums / counts.clamp_min(1).unsqueeze(-1)
            if self.use_cosine_sim:
                new = F.normalize(new, dim=-1)
            means = torch.where(counts.unsqueeze(-1) > 0, new.to(means), means)
        indices = torch.where(valid >= 0, vq_nearest(x.detach(), means, channel_dim=channel), -1)
        counts, _ = self._all_reduced(*vq_code_stats(x.detach(), indices, k, channel_dim=channel))
        book.embed[0].copy_(means)
        book.cluster_size[0].copy_(counts)
        book.embed_avg[0].copy_(means * counts.unsqueeze(-1))
        book.initted.fill_(True)


class VectorQuantizer2(nn.Module):
    """VQGAN's quantiser: learned codes, straight-through output, both placements of beta. Key: ``embedding.weight``.

    Args:
        n_e: K.
        e_dim: D.
        beta: weight of one of the two loss terms; ``legacy=True`` (upstream's default) puts it on the codebook term,
            False on the commitment term as the paper has it.
        sane_index_shape: indices ``[B, H, W]`` instead of flat.
        gradient: how it passes from output to input, as for ``mmfast.vq_quantize``: straight through, or ``"rotation"``.

    Returns for ``z [B, D, H, W]``:
        ``(z_q [B, D, H, W], loss, (perplexity, min_encodings, indices))``. Perplexity ``exp(-sum p log p)`` of code usage in this
        batch (upstream returns None); min_encodings, the N x K one-hot, is not made and is None as upstream.
    """

    def __init__(
        self, n_e: int, e_dim: int, beta: float = 0.25, sane_index_shape: bool = False, legacy: bool = True, *, gradient: str = "ste"
    ):
        super().__init__()
        self.gradient = gradient
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.sane_index_shape, self.legacy = sane_index_shape, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        z_q, indices, loss = vq_quantize(
            z, self.embedding.weight, beta=self.beta, legacy=self.legacy, gradient=self.gradient, channel_dim=1
        )
        counts = indices.new_zeros(self.n_e).scatter_add_(0, indices.reshape(-1), torch.ones_like(indices).reshape(-1))
        p = counts / max(indices.numel(), 1)
        perplexity = torch.exp(torch.special.entr(p).sum())
        return z_q, loss, (perplexity, None, indices if self.sane_index_shape else indices.reshape(-1))

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Codes of indices; with ``shape = (B, H, W, D)`` as ``[B, D, H, W]``, the decoder's input."""
        codes = self.embedding(indices)
        return codes if shape is None else codes.view(shape).permute(0, 3, 1, 2).contiguous()
