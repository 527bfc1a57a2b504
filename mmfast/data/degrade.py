"""Pictures made worse, so that an answer can be had without them: noise, small size, wrong colours, a small part.

Pictures are float ``[3, H, W]``, values 0 .. 1 unless said otherwise. Whatever is random comes from a
``torch.Generator``: draw it once for a sample, and policy, reference and a resumed run see the same picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def noise_schedule(steps: int = 1000, dtype: torch.dtype = torch.float64) -> Tensor:
    """What is left of a picture's variance after each step of diffusion, ``[steps]`` falling: visual contrastive decoding's schedule.

    ``b_i = sigmoid(linspace(-6, 6))_i (.005 - 1e-5) + 1e-5``, ``prod_{j <= i} (1 - b_j)`` (VCD, arXiv:2311.16922, released code; also
    POVID, arXiv:2402.11411, at step 500, and BPO, arXiv:2403.08730, at step 900). Published code forms it in float32, where one less the
    early products loses digits: at step 100 its square root is .058408, in float64 .058406.
    """
    rates = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=dtype)) * (0.005 - 1e-5) + 1e-5
    return (1 - rates).cumprod(0)


def diffuse(image: Tensor, step: int, *, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """``sqrt(a) image + sqrt(1 - a) noise`` with a = ``noise_schedule()[step]``.

    Works on values of any range. POVID (arXiv:2402.11411) noises the file's own pixels at step 500, so that a large picture, scaled down
    afterwards, keeps little of it; BPO (arXiv:2403.08730) the tower's normalised input at step 900. Do the latter, or resize first.

    Args:
        image: any shape. noise: image's shape, default standard normal from ``generator``.

    Raises:
        ValueError: a step outside the schedule.
    """
    schedule = noise_schedule()
    if not 0 <= step < len(schedule):
        raise ValueError(f"diffuse: expected a step of 0 .. {len(schedule) - 1}, got {step}")
    if noise is None:
        noise = torch.randn(image.shape, dtype=image.dtype, device=image.device, generator=generator)
    left = schedule[step].item()
    return math.sqrt(left) * image + math.sqrt(1 - left) * noise


def to_bytes(image: Tensor, *, wrap: bool = False) -> Tensor:
    """Values 0 .. 1 as uint8, rounded down; what lies outside is clamped.

    ``wrap``: modulo 256 instead, as POVID's code (arXiv:2402.11411) does after noising, where white and a little more becomes dark.
    """
    values = (image * 255).floor() if wrap else (image.clamp(0, 1) * 255).floor()
    return values.remainder(256).to(torch.uint8)


def shrunk_size(width: int, height: int, short: int = 20) -> tuple[int, int]:
    """``(width, height)`` with the shorter side ``short`` and the longer in proportion, rounded down: STIC's low resolution
    (arXiv:2405.19716), 640 x 480 to 26 x 20. For small pictures see ``short_side``."""
    scale = min(width, height)
    return width * short // scale, height * short // scale


def short_side(height: int) -> int:
    """STIC's 20 of 480 pixels, for pictures of another height, at least 2."""
    return max(2, round(height / 24))


def blur(image: Tensor, short: int = 20) -> Tensor:
    """A picture ``[3, H, W]`` at low resolution, brought back to its size, bilinear both ways: STIC's bad image (arXiv:2405.19716).

    The released code leaves the enlarging to the tower's own preprocessing, and its generator, asked for such a picture, never makes it.
    """
    height, width = image.shape[-2:]
    small_width, small_height = shrunk_size(width, height, short)
    small = torch.nn.functional.interpolate(image[None], (small_height, small_width), mode="bilinear", antialias=True)
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear", align_corners=False)[0]


def jitter_draw(generator: torch.Generator, brightness: float = 0.5, hue: float = 0.3) -> tuple[float, float]:
    """STIC's other bad image (arXiv:2405.19716): a brightness factor, uniform in 1 -+ .5, and a turn of the hue, uniform in -+ .3."""
    a, b = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
    return 1 + brightness * (2 * a - 1), hue * (2 * b - 1)


def colour_jitter(image: Tensor, brightness: float, hue: float) -> Tensor:
    """A picture ``[3, H, W]`` with its values times ``brightness``, clamped to 0 .. 1, then its hue turned by ``hue`` (1 is a full turn)."""
    image = (image * brightness).clamp(0, 1)
    high, low = image.amax(0), image.amin(0)
    chroma = high - low
    red, green, blue = image
    sixth = torch.where(
        high == red, (green - blue) / chroma, torch.where(high == green, 2 + (blue - red) / chroma, 4 + (red - green) / chroma)
    )
    sixth = torch.where(chroma == 0, 0.0, sixth) + 6 * hue
    # A channel of full chroma for one third of the wheel, falling to none over a sixth on either side; 5, 3, 1 are where each is lowest.
    k = (sixth.unsqueeze(0) + torch.tensor([5.0, 3.0, 1.0], dtype=image.dtype, device=image.device).view(3, 1, 1)).remainder(6)
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def crop_box(
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    area: tuple[float, float] = (0.01, 0.2),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """``(top, left, height, width)`` of a random small part: mDPO's degraded image (arXiv:2406.11839), with ``crop``.

    Its share of the area is uniform in ``area``, its width over height log-uniform in ``aspect``. mDPO's code draws anew in every forward,
    so that policy and reference see different parts; draw once for a sample instead.
    """
    share, ratio, y, x = torch.rand(4, dtype=torch.float64, generator=generator).tolist()
    pixels = height * width * (area[0] + (area[1] - area[0]) * share)
    ratio = aspect[0] * (aspect[1] / aspect[0]) ** ratio
    h = min(height, max(1, round(math.sqrt(pixels / ratio))))
    w = min(width, max(1, round(math.sqrt(pixels * ratio))))
    return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w


def crop(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """The part ``(top, left, height, width)`` of a picture ``[3, H, W]``, enlarged to its size, bilinear. Values of any range."""
    top, left, height, width = box
    part = image[:, top : top + height, left : left + width]
    return torch.nn.functional.interpolate(part[None], tuple(image.shape[-2:]), mode="bilinear", align_corners=False)[0]
