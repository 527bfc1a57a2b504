"""Pictures in: files to arrays, arrays to what a tower expects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfast.spec import Fixed

# Pillow refuses larger pictures (a decompression bomb); ours is a fair limit for photographs.
MAX_PIXELS = 100_000_000


def load(path: str | Path, size: int) -> np.ndarray:
    """A picture file as uint8 ``[size, size, 3]``: RGB, shorter side resized (bicubic), centre cropped.

    Raises:
        ValueError: missing, unreadable, truncated or larger than ``MAX_PIXELS``; the sentence names the file.
    """
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with Pillow.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"image {path} has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
            picture = picture.convert("RGB")
            # Rounded down, as the published processors do.
            picture = picture.resize([side * size // min(picture.size) for side in picture.size], Pillow.Resampling.BICUBIC)
            left, top = ((side - size) // 2 for side in picture.size)
            return np.array(picture.crop((left, top, left + size, top + size)))
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except (UnidentifiedImageError, Pillow.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from None


def normalise(pixels: Tensor, spec: Fixed) -> Tensor:
    """uint8 ``[M, H, W, 3]`` -> float ``[M, 3, H, W]``, less the mean, over the deviation (both of values 0 .. 1)."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) * 255 for v in (spec.mean, spec.std))
    return (pixels.permute(0, 3, 1, 2).float() - mean) / std
