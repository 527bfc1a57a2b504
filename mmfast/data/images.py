"""Pictures in: files to arrays, arrays to what a tower expects."""

from __future__ import annotations

import hashlib
import io
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmfast.spec import Fixed

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow refuses larger pictures (a decompression bomb); ours is a fair limit for photographs.
MAX_PIXELS = 100_000_000
# Of a picture longer than this many times its shorter side, the ends are cut before resizing; the square in its middle is far from them.
LONGEST = 16
# What a folder of frames is searched for.
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Picture:
    """Where a picture comes from; pixels exist only when they are asked for, in a loader's worker."""

    source: str | bytes  # a file, or encoded bytes
    frame: int | None = None  # of an animated picture or a video
    name: str = ""  # what error sentences call it; a file is called by its path
    black: bool = False  # whatever it shows, all that is seen of it is black (``Data.blind``)

    @cached_property
    def key(self) -> str:
        """What is the same for two records that show one picture: the file's path or the hash of the bytes, the frame, and whether it is black."""
        if isinstance(self.source, bytes):
            where = "sha256:" + hashlib.sha256(self.source).hexdigest()
        else:
            where = os.path.abspath(self.source)
        where = f"black:{where}" if self.black else where
        return where if self.frame is None else f"{where}#{self.frame}"

    @property
    def frames(self) -> tuple[Picture, ...]:
        """Itself: what it has in common with a ``Clip``."""
        return (self,)

    def dark(self) -> Picture:
        return replace(self, black=True)

    def load(self, plan: Fixed | int) -> np.ndarray:
        """uint8 ``[size, size, 3]``; raises ValueError as ``images.load`` does."""
        if self.black:
            return np.zeros((fixed(plan).size, fixed(plan).size, 3), np.uint8)
        return load(self.source, plan, self.frame, self.name)

    def size(self) -> tuple[int, int]:
        """(width, height) upright, from the file's head; raises ValueError as ``load`` does."""
        from PIL import Image as Pillow

        if self.frame is not None:
            return _decode(self.source, self.frame, self.name).size
        name = _called(self.source, self.name)
        try:
            with Pillow.open(_readable(self.source, name)) as picture:
                turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                return picture.size[::-1] if turned else picture.size
        except _Refused:
            raise
        except Exception as error:  # decoders meet hostile bytes, and each raises what it likes
            raise ValueError(f"image {name} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from None

    def check(self) -> None:
        """Decodes the picture and forgets it: ValueError if ``load`` would raise one."""
        _decode(self.source, self.frame, self.name, draft=True)


@dataclass(frozen=True)
class Clip:
    """A video as one picture of several frames, for a system that reads it so (``System.clips``)."""

    frames: tuple[Picture, ...]

    @property
    def key(self) -> str:
        return " ".join(frame.key for frame in self.frames)

    def dark(self) -> Clip:
        return Clip(tuple(frame.dark() for frame in self.frames))

    def size(self) -> tuple[int, int]:
        return self.frames[0].size()

    def check(self) -> None:
        for frame in self.frames:
            frame.check()


def load(source: str | Path | bytes, plan: Fixed | int, frame: int | None = None, name: str = "") -> np.ndarray:
    """A picture as uint8 ``[size, size, 3]``: upright (EXIF), RGB, made a square as the plan's ``fit`` says, resized (bicubic).

    ``source`` is a file or a file's bytes, ``frame`` one picture of an animated file or a video (which needs the package ``av``). A number
    is a plan that crops.

    Raises:
        ValueError: missing, unreadable, truncated or larger than ``MAX_PIXELS``; the sentence names the file.
    """
    return np.array(_square(_decode(source, frame, name), fixed(plan)))


def fixed(plan: Fixed | int) -> Fixed:
    """A plan, or that of squares of so many pixels, cropped."""
    return Fixed(size=plan) if isinstance(plan, int) else plan


def asked(plan: Fixed) -> Fixed:
    """What a plan makes of a picture in a question."""
    return replace(plan, fit=plan.fit_asked or plan.fit)


def _square(picture: Image, plan: Fixed) -> Image:
    from PIL import Image as Pillow

    if plan.fit == "crop":
        cut, resized, (left, top) = crop_plan(picture.size, plan.size)
        if cut != (0, 0, *picture.size):
            picture = picture.crop(cut)
        picture = picture.resize(resized, Pillow.Resampling.BICUBIC)
        return picture.crop((left, top, left + plan.size, top + plan.size))
    if plan.fit != "squash":
        # The square of a strip of 1 x 100,000 pixels would take 30 GB: what is longer than the largest square shrinks first.
        picture.thumbnail((isqrt(MAX_PIXELS),) * 2, Pillow.Resampling.BICUBIC)
        fill = tuple(int(255 * value) for value in plan.mean) if plan.fit == "pad_mean" else (0, 0, 0)  # as LLaVA-1.5 rounds
        side = max(picture.size)
        padded = Pillow.new("RGB", (side, side), fill)
        padded.paste(picture, tuple((side - s) // 2 for s in picture.size))
        picture = padded
    return picture.resize((plan.size, plan.size), Pillow.Resampling.BICUBIC)


def crop_plan(size: tuple[int, int], side: int) -> tuple[tuple[int, int, int, int], tuple[int, int], tuple[int, int]]:
    """What ``load`` does to a picture of ``size`` (width, height) that it crops: the part that is cut out, what that is resized to, and the upper left
    corner of the square ``side`` that is kept of it."""
    # A strip of 1 x 100,000 pixels must not become one of 336 x 33,600,000: only its middle is resized.
    short = min(size)
    left, top = (max(s - LONGEST * short, 0) // 2 for s in size)
    cut = (left, top, size[0] - left, size[1] - top)
    # Rounded down, as the published processors do.
    width, height = ((end - start) * side // short for start, end in zip(cut[:2], cut[2:], strict=True))
    return cut, (width, height), ((width - side) // 2, (height - side) // 2)


def _decode(source: str | Path | bytes, frame: int | None, name: str, draft: bool = False) -> Image:
    """The whole picture, upright and RGB. ``draft`` may decode a smaller one, faster, that is broken where the picture is."""
    from PIL import Image as Pillow
    from PIL import ImageOps, UnidentifiedImageError

    name = _called(source, name)
    try:
        with Pillow.open(_readable(source, name)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise _Refused(f"image {name} has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
            if frame is not None:
                if frame >= getattr(picture, "n_frames", 1):
                    raise _Refused(f"image {name} has no frame {frame}")
                picture.seek(frame)
            elif draft:
                picture.draft("RGB", (1, 1))
            return _rgb(ImageOps.exif_transpose(picture), name)
    except _Refused:
        raise
    except UnidentifiedImageError:
        if frame is not None:
            return _decode_video(source, frame, name)
        what = "no bytes" if _empty(source) else "no picture format that Pillow knows"
        raise ValueError(f"image {name} cannot be read: it holds {what}") from None
    except Exception as error:  # decoders meet hostile bytes, and each raises what it likes
        raise ValueError(f"image {name} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from None


class _Refused(ValueError):
    """A sentence that is finished."""


def _readable(source: str | Path | bytes, name: str) -> Any:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if os.path.isdir(source):
        raise _Refused(f"image {name} cannot be read: it is a folder")
    if not os.path.exists(source):
        raise _Refused(f"image {name} does not exist")
    return source


def _called(source: str | Path | bytes, name: str) -> str:
    """What a sentence calls a source, on one line."""
    name = name or (str(source) if not isinstance(source, bytes) else f"of {len(source)} bytes")
    return name if name.isprintable() else repr(name)


def _empty(source: str | Path | bytes) -> bool:
    return not (len(source) if isinstance(source, bytes) else os.path.getsize(source))


def _rgb(picture: Image, name: str) -> Image:
    """RGB of any mode. Sixteen bits keep their upper eight, where Pillow's own conversion would cut everything above 255 to white; of 32 bits, whose
    white is unknown, those of the picture's brightest place count: 8 or 16."""
    from PIL import Image as Pillow

    if picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.int64)
        upper = picture.mode.startswith("I;16") or deep.max() > 255
        return Pillow.fromarray((deep >> 8 if upper else deep).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise _Refused(f"image {name} has floating-point pixels, whose white is unknown; save it with 8 or 16 bits a channel")
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------- frames


def frame_indices(total: int, count: int) -> list[int]:
    """``count`` of ``total`` frames, first and last among them, evenly spaced and rounded down: LLaVA-Hound (arXiv:2404.01258), Video-LLaVA. A
    short video repeats some.

    >>> frame_indices(10, 4)
    [0, 3, 6, 9]
    """
    return [at * (total - 1) // max(count - 1, 1) for at in range(count)]


def video(source: str | Path | bytes, count: int, name: str = "") -> tuple[Picture, ...]:
    """``count`` evenly spaced pictures of an animated GIF, WebP or PNG, a folder of frames, or a video file.

    Raises:
        ValueError: missing, unreadable, without frames, or a video file where the package ``av`` is not installed.
    """
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    name = _called(source, name)
    if not isinstance(source, bytes) and os.path.isdir(source):
        files = sorted((p for p in Path(source).iterdir() if p.suffix.lower() in SUFFIXES), key=lambda p: _natural(p.name))
        if not files:
            raise ValueError(f"video {name} is a folder without pictures; frames are files ending in {', '.join(sorted(SUFFIXES))}")
        return tuple(Picture(str(files[at])) for at in frame_indices(len(files), count))
    try:
        with Pillow.open(_readable(source, name)) as picture:
            total = getattr(picture, "n_frames", 1)
    except _Refused as error:
        raise ValueError(f"video{str(error).removeprefix('image')}") from None
    except UnidentifiedImageError:
        total = _video_length(source, name)
    except Exception as error:  # as in _decode
        raise ValueError(f"video {name} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from None
    source = source if isinstance(source, bytes) else str(source)
    return tuple(Picture(source, at, name) for at in frame_indices(total, count))


def _natural(name: str) -> list[Any]:
    """frame2 before frame10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _video_length(source: str | Path | bytes, name: str) -> int:
    if _empty(source):
        raise ValueError(f"video {name} cannot be read: it holds no bytes")
    av = _av(name)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            # Headers guess; packets are counted without decoding them.
            total = sum(1 for packet in container.demux(video=0) if packet.size)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"video {name} cannot be read: {error}") from None
    if not total:
        raise ValueError(f"video {name} cannot be read: it has no frames")
    return total


def _decode_video(source: str | Path | bytes, frame: int, name: str) -> Image:
    """Frame ``frame``, counted from the start: seeking by time would be quicker and, where frame rates vary, wrong."""
    av = _av(name)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            for at, picture in enumerate(container.decode(video=0)):
                if picture.width * picture.height > MAX_PIXELS:
                    raise _Refused(f"video {name} has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
                if at == frame:
                    return picture.to_image()
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"video {name} cannot be read: {error}") from None
    raise ValueError(f"video {name} cannot be read: it ends before frame {frame}")


def _av(name: str) -> Any:
    try:
        import av
    except ImportError:
        raise ValueError(
            f"video {name} is not an animated picture, and reading video files needs the package av: pip install av, or give a folder of frames"
        ) from None
    return av


def normalise(pixels: Tensor, spec: Fixed) -> Tensor:
    """uint8 ``[M, H, W, 3]`` -> float ``[M, 3, H, W]``, less the mean, over the deviation (both of values 0 .. 1)."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) * 255 for v in (spec.mean, spec.std))
    return (pixels.permute(0, 3, 1, 2).float() - mean) / std


def augmented(pixels: Tensor) -> Tensor:
    """A random part of each square ``[M, 3, H, H]``, resized to the whole (bicubic), and mirrored or not: area 0.5 .. 1, proportions 3:4 .. 4:3,
    a side that would be longer than the square as long as it.

    Drawn from torch's generator, which a training step starts anew from seed, step and process: a resumed run sees the same.
    """
    u = torch.rand(5, len(pixels), device=pixels.device)
    area, proportion = 0.5 + 0.5 * u[0], (4 / 3) ** (2 * u[1] - 1)
    wide, high = ((area * p).sqrt().clamp(max=1) for p in (proportion, 1 / proportion))
    mirror = torch.where(u[4] < 0.5, -1.0, 1.0)
    # Of coordinates -1 .. 1: half of the part's sides, and its middle.
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    theta[:, 0, 0], theta[:, 1, 1] = wide * mirror, high
    theta[:, 0, 2], theta[:, 1, 2] = (2 * u[2] - 1) * (1 - wide), (2 * u[3] - 1) * (1 - high)
    grid = torch.nn.functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)
