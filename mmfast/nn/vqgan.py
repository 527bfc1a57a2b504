"""VQGAN (arXiv:2012.09841): pictures to a grid of code numbers and back. Chameleon's image tokenizer (arXiv:2405.09818) is one.

State-dict keys are those of the published checkpoints (``encoder``, ``quantize``, ``quant_conv``, ``post_quant_conv``, ``decoder``), of which
transformers' ``ChameleonVQVAE`` has all but the decoder; the critic's are those below their ``loss.discriminator``.

Letters: B pictures, H, W pixels, h, w the grid (h = H / 2^(levels - 1)), N = h w, C channels, D width of a code, K codes.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.nn.quantizer import VectorQuantize, VectorQuantizer2
from mmfast.ops import cross_attention


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    if channels % groups:
        raise ValueError(
            f"VQGAN: {channels} channels cannot be normalised in {groups} groups; give channels that are a multiple of {groups}"
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """``x + conv(drop(silu(norm(conv(silu(norm(x)))))))``, with a 1x1 convolution in the residual where the channels change."""

    def __init__(self, width_in: int, width_out: int, *, groups: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = _norm(width_in, groups), nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(width_out, groups), nn.Conv2d(width_out, width_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(self.dropout(F.silu(self.norm2(inner))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + inner


class AttnBlock(nn.Module):
    """All places of the grid attend to each other by one head as wide as the channels; residual."""

    def __init__(self, channels: int, *, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # The op wants [B, N, heads, C] with the channels contiguous; convolutions leave [B, C, h, w].
        q, k, v = (part(normed).flatten(2).transpose(1, 2).contiguous().unsqueeze(2) for part in (self.q, self.k, self.v))
        seen = cross_attention(q, k, v).squeeze(2).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(seen)


class Downsample(nn.Module):
    """Half the sides. The published weights were trained with the padding at the right and the bottom alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the sides: every value four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, *, groups: int, dropout: float) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResBlock(channels, channels, groups=groups, dropout=dropout)
    mid.attn_1 = AttnBlock(channels, groups=groups)
    mid.block_2 = ResBlock(channels, channels, groups=groups, dropout=dropout)
    return mid


def _level(widths: Sequence[int], *, attend: bool, groups: int, dropout: float) -> nn.Module:
    """Residual blocks from each width to the next, an attention after each where asked for."""
    level = nn.Module()
    level.block = nn.ModuleList(ResBlock(a, b, groups=groups, dropout=dropout) for a, b in pairwise(widths))
    level.attn = nn.ModuleList(AttnBlock(b, groups=groups) for b in widths[1:] if attend)
    return level


def _through(level: nn.Module, x: Tensor) -> Tensor:
    for i, block in enumerate(level.block):
        x = block(x)
        if len(level.attn):
            x = level.attn[i](x)
    return x


class Encoder(nn.Module):
    """pixels ``[B, 3, H, W]`` -> ``[B, latent, h, w]``."""

    def __init__(
        self, *, size: int, channels: int, multipliers: Sequence[int], blocks: int, attention: Sequence[int], latent: int, groups: int, dropout: float
    ):  # fmt: skip
        super().__init__()
        widths, common = [channels * m for m in multipliers], dict(groups=groups, dropout=dropout)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise([channels, *widths])):
            level = _level([before] + [width] * blocks, attend=size >> i in attention, **common)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = _middle(widths[-1], **common)
        self.norm_out, self.conv_out = _norm(widths[-1], groups), nn.Conv2d(widths[-1], latent, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level in self.down:
            x = _through(level, x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """``[B, latent, h, w]`` -> pixels ``[B, 3, H, W]``: the encoder in a mirror, with one residual block more at every level."""

    def __init__(
        self, *, size: int, channels: int, multipliers: Sequence[int], blocks: int, attention: Sequence[int], latent: int, groups: int, dropout: float
    ):  # fmt: skip
        super().__init__()
        widths, common = [channels * m for m in multipliers], dict(groups=groups, dropout=dropout)
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], **common)
        levels = []  # numbered by resolution as the encoder's, but run from the last to the first
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = _level([before] + [width] * (blocks + 1), attend=size >> i in attention, **common)
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = _norm(widths[0], groups), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(self.up):
            x = _through(level, x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Pixels are -1 .. 1. The default sizes are Chameleon's.

    From pixels to codes it computes in the type of its weights, whatever autocast says: in half precision other codes are the nearest, and a
    picture must have the same wherever it is read. What is drawn follows autocast.

    Args:
        size: side of the pictures it is meant for; it decides only at which levels ``attention`` falls.
        channels, multipliers: channels of each level; every level but the last halves the sides.
        blocks: residual blocks a level (one more in the decoder).
        attention: sides of the grids that attend to themselves beside the middle (16 in VQGAN's ImageNet model).
        latent: channels between encoder and ``quant_conv``.
        quantize: the codebook, a ``VectorQuantizer2`` (learned codes) or a ``VectorQuantize(accept_image_fmap=True)`` (codes that follow a
            moving average, with restart of dead ones). Default: Chameleon's 8192 learned codes of width 256.
        groups: of the normalisations.
        decoder: False leaves it out, as transformers' ``ChameleonVQVAE`` does; ``decode`` and ``draw`` then raise ``ValueError``.
    """

    def __init__(
        self,
        *,
        size: int = 512,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        attention: Sequence[int] = (),
        latent: int = 256,
        quantize: VectorQuantizer2 | VectorQuantize | None = None,
        groups: int = 32,
        dropout: float = 0.0,
        decoder: bool = True,
    ):
        super().__init__()
        sizes = dict(
            size=size, channels=channels, multipliers=tuple(multipliers), blocks=blocks, attention=tuple(attention), latent=latent,
            groups=groups, dropout=dropout,
        )  # fmt: skip
        self.quantize = VectorQuantizer2(8192, 256) if quantize is None else quantize
        learned = isinstance(self.quantize, VectorQuantizer2)
        if not learned and self.quantize.channel_dim != 1:
            raise ValueError("VQGAN: its grid has the channels in dim 1; make the codebook with VectorQuantize(accept_image_fmap=True)")
        self.width = self.quantize.e_dim if learned else self.quantize.dim
        self.codes = self.quantize.n_e if learned else self.quantize.codebook_size
        self.patch = 2 ** (len(multipliers) - 1)  # pixels a side that one code stands for
        self.encoder = Encoder(**sizes)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latent, self.width, 1), nn.Conv2d(self.width, latent, 1)
        self.decoder = Decoder(**sizes) if decoder else None

    @property
    def codebook(self) -> Tensor:
        """The vectors of the codes, ``[K, D]``."""
        return self.quantize.embedding.weight if isinstance(self.quantize, VectorQuantizer2) else self.quantize.codebook

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels ``[B, 3, H, W]`` -> what the codebook is asked for, ``[B, D, h, w]``."""
        if pixels.dim() != 4 or pixels.shape[2] % self.patch or pixels.shape[3] % self.patch:
            raise ValueError(f"VQGAN: expected pixels [B, 3, H, W] with sides that are multiples of {self.patch}, got {list(pixels.shape)}")
        pixels = pixels.to(self.quant_conv.weight.dtype, memory_format=torch.channels_last)  # convolutions are quicker so
        with torch.autocast(pixels.device.type, enabled=False):
            return self.quant_conv(self.encoder(pixels))

    def nearest(self, z: Tensor, *, freeze: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """z ``[B, D, h, w]`` -> codes in its place (with their gradient to z), indices ``[B, h, w]``, the codebook's loss (a mean over all
        values). A codebook with moving averages moves in training mode, unless ``freeze``."""
        with torch.autocast(z.device.type, enabled=False):
            if isinstance(self.quantize, VectorQuantizer2):
                codes, loss, (_, _, indices) = self.quantize(z)
                return codes, indices.view(z.shape[0], *z.shape[2:]), loss
            return self.quantize(z, freeze_codebook=freeze)

    def decode(self, codes: Tensor) -> Tensor:
        """codes ``[B, D, h, w]`` -> pixels ``[B, 3, H, W]``, not yet clamped to -1 .. 1."""
        if self.decoder is None:
            raise ValueError(
                "VQGAN: this one has no decoder (the Chameleon of transformers has none); read the original tokenizer checkpoint"
            )
        return self.decoder(self.post_quant_conv(codes.contiguous(memory_format=torch.channels_last)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pixels ``[B, 3, H, W]`` -> drawn ``[B, 3, H, W]``, indices ``[B, h, w]``, the codebook's loss."""
        codes, indices, loss = self.nearest(self.encode(pixels))
        return self.decode(codes), indices, loss

    @torch.no_grad()
    def tokenise(self, pixels: Tensor) -> Tensor:
        """pixels ``[B, 3, H, W]`` -> code numbers ``[B, N]``, row after row of the grid."""
        return self.nearest(self.encode(pixels), freeze=True)[1].flatten(1)

    @torch.no_grad()
    def draw(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Code numbers ``[B, n]`` -> pixels ``[B, 3, H, W]`` within -1 .. 1.

        Args:
            grid: (h, w); default the square that ``ids`` fill. Rows shorter than the grid are filled up with their first code.

        Raises:
            ValueError: no square and no grid, more ids than the grid has places, none at all, or numbers that no code has.
        """
        side = round(ids.shape[-1] ** 0.5)
        h, w = grid or (side, side)
        if ids.dim() != 2 or not 0 < ids.shape[1] <= h * w or (grid is None and side * side != ids.shape[1]):
            raise ValueError(
                f"VQGAN.draw: expected ids [B, h * w] of a square grid, or up to h * w with grid=(h, w), got {list(ids.shape)} for {h} x {w}"
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.codes:
            raise ValueError(
                f"VQGAN.draw: expected code numbers 0 .. {self.codes - 1}, got {int(ids.min())} .. {int(ids.max())}; see data.codes"
            )
        full = torch.cat([ids, ids[:, :1].expand(-1, h * w - ids.shape[1])], 1).view(-1, h, w)
        if isinstance(self.quantize, VectorQuantizer2):
            codes = self.quantize.get_codebook_entry(full).movedim(-1, 1).contiguous()
        else:
            codes = self.quantize.get_output_from_indices(full)
        return self.decode(codes).clamp(-1, 1)


def start_plain(vq: VQGAN) -> VQGAN:
    """Weights to train from, in place of PyTorch's: convolutions keep the variance of what they read, without biases; what residual branches
    add starts at 0; and where the codes' grid is read or written, a code sees its own place alone.

    So encoder and decoder start as chains of plain convolutions. With PyTorch's start (which VQGAN's code has) what a place holds is lost on
    the way: a short training first learns the mean picture and only then to see.
    """
    own_place = (vq.encoder.conv_out, *(() if vq.decoder is None else (vq.decoder.conv_in,)))
    for module in vq.modules():
        if isinstance(module, nn.Conv2d):
            taps = 1 if module in own_place else module.weight[0, 0].numel()
            bound = (3 / (module.in_channels * taps)) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        for module in own_place:
            side = torch.arange(3)
            module.weight[:, :, (side[:, None] != 1) | (side != 1)] = 0
    for module in vq.modules():
        if isinstance(module, ResBlock | AttnBlock):
            nn.init.zeros_((module.conv2 if isinstance(module, ResBlock) else module.proj_out).weight)
    return vq


def published_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published checkpoint that a ``VQGAN`` loads: of the file's ``state_dict``, without the losses' networks; of a whole
    Chameleon of transformers the part called ``vqmodel``."""
    state = state.get("state_dict", state)
    inside = [k for k in state if "vqmodel." in k]
    if inside:
        return {k.split("vqmodel.", 1)[1]: state[k] for k in inside}
    return {k: v for k, v in state.items() if not k.startswith("loss.")}


class PatchCritic(nn.Module):
    """PatchGAN (arXiv:1611.07004): pixels ``[B, 3, H, W]`` -> a judgement of every patch, ``[B, 1, h, w]``, high where it looks real.

    4x4 convolutions, ``layers`` of them halving the sides, LeakyReLU .2 and BatchNorm between; weights start as N(0, .02). Keys: ``main.*``.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        main: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(pairwise(widths), start=1):
            main += [nn.Conv2d(a, b, 4, 2 if i < layers else 1, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.main(pixels)
