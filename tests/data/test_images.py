"""Picture files: the same pixels as the published processor, and one sentence for every file that is none."""

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from transformers import CLIPImageProcessorPil

from mmfast.data import images
from mmfast.spec import Fixed


def picture(width, height, mode="RGB"):
    noise = np.random.default_rng(width * height).integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    return Pillow.fromarray(noise).resize((width, height), Pillow.Resampling.BILINEAR).convert(mode)


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (224, 224), (97, 41), (1000, 230)])
def test_pixels_equal_the_published_processor(size, tmp_path):
    """Shorter edge bicubic, centre crop, CLIP statistics: at most one grey level off, where the processor rounds between its steps."""
    source = picture(*size)
    source.save(tmp_path / "a.png")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    want = processor(source, return_tensors="pt")["pixel_values"]
    got = images.normalise(torch.from_numpy(images.load(tmp_path / "a.png", 224))[None], Fixed())
    level = 1 / 255 / min(Fixed().std)
    assert (got - want).abs().max() <= 1.01 * level
    assert (got - want).abs().mean() <= 0.02 * level


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_colour_mode_becomes_rgb(mode, tmp_path):
    suffix = "tiff" if mode == "CMYK" else "png"
    picture(50, 40).convert(mode).save(tmp_path / f"a.{suffix}")
    array = images.load(tmp_path / f"a.{suffix}", 16)
    assert (array.shape, array.dtype) == ((16, 16, 3), np.uint8)


def test_an_extreme_shape_still_fills_the_square(tmp_path):
    picture(3, 700).save(tmp_path / "a.png")
    assert images.load(tmp_path / "a.png", 64).shape == (64, 64, 3)


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    good = tmp_path / "good.png"
    picture(64, 64).save(good)
    cases = {
        "missing.png": (None, "does not exist"),
        "empty.png": (b"", "cannot be read"),
        "text.png": (b"not a picture", "cannot be read"),
        "torn.png": (good.read_bytes()[:200], "cannot be read"),
    }
    for name, (content, words) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"image .*{name} {words}"):
            images.load(tmp_path / name, 64)
    with pytest.raises(ValueError, match="cannot be read"):
        images.load(tmp_path, 64)  # a folder
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(ValueError, match=r"64 x 64 pixels, more than 4,095"):
        images.load(good, 64)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    """A PNG header that promises 60,000 x 60,000 pixels, past Pillow's own limit too."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match=r"bomb\.png"):
        images.load(tmp_path / "bomb.png", 64)


def test_normalise():
    pixels = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    plan = Fixed(mean=(0.0, 0.5, 0.25), std=(1.0, 0.25, 0.5))
    assert images.normalise(pixels, plan).flatten().tolist() == pytest.approx([0, (128 / 255 - 0.5) / 0.25, 1.5], abs=1e-6)


def test_every_fit_makes_a_square_of_the_whole_picture_or_its_middle():
    """A 40 x 20 picture: left half red, right half blue."""
    source = Pillow.new("RGB", (40, 20), (0, 0, 255))
    source.paste((255, 0, 0), (0, 0, 20, 20))
    mean = (0.5, 0.25, 0.75)
    made = {fit: np.array(images._square(source, Fixed(size=8, fit=fit, mean=mean))) for fit in ("crop", "squash", "pad", "pad_mean")}
    assert all(a.shape == (8, 8, 3) for a in made.values())
    assert made["crop"][4, 0].tolist() == made["squash"][0, 0].tolist() == made["pad"][4, 0].tolist() == [255, 0, 0]
    assert made["crop"][4, 7].tolist() == made["squash"][7, 7].tolist() == made["pad"][4, 7].tolist() == [0, 0, 255]
    assert made["pad"][0].max() == made["pad"][7].max() == 0
    unscaled = np.array(images._square(source, Fixed(size=40, fit="pad_mean", mean=mean)))
    assert np.array_equal(unscaled[10:30], np.array(source))
    assert (unscaled[:10] == [127, 63, 191]).all()
    assert (unscaled[30:] == [127, 63, 191]).all()
    clip = np.array(images._square(source, Fixed(size=40, fit="pad_mean")))
    assert clip[0, 0].tolist() == [122, 116, 104]  # LLaVA's
    square = picture(64, 64)
    same = [np.array(images._square(square, Fixed(size=16, fit=fit))) for fit in ("crop", "squash", "pad", "pad_mean")]
    assert all(np.array_equal(same[0], other) for other in same[1:])


def test_squashed_pixels_equal_the_published_processor(tmp_path):
    """Kosmos-2 and BLIP-2 resize both sides and cut nothing."""
    source = picture(301, 200)
    source.save(tmp_path / "a.png")
    processor = CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False)
    want = processor(source, return_tensors="pt")["pixel_values"]
    got = images.normalise(torch.from_numpy(images.load(tmp_path / "a.png", Fixed(fit="squash")))[None], Fixed())
    assert (got - want).abs().max() <= 1.01 / 255 / min(Fixed().std)


def test_a_strip_is_padded_without_a_huge_square(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 32 * 32)
    made = np.array(images._square(Pillow.new("RGB", (320, 3), (255, 255, 255)), Fixed(size=32, fit="pad")))
    assert made.shape == (32, 32, 3)
    assert made[15].min() == 255
    assert made[0].max() == 0


def test_augmentation_shows_a_part_of_the_square_and_repeats_with_the_generator():
    """On a picture whose values are its coordinates a part is a rectangle that can be read off; bicubic reproduces a ramp, borders aside."""
    ramp = (torch.arange(64) + 0.5) / 32 - 1
    pixels = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)]).expand(500, 3, 64, 64)
    torch.manual_seed(0)
    seen = images.augmented(pixels)
    torch.manual_seed(0)
    assert torch.equal(images.augmented(pixels), seen)
    assert not torch.equal(images.augmented(pixels), seen)
    x, y = seen[:, 0, 32], seen[:, 1, :, 32]
    assert (x.std(1) > 0).all()
    mirrored = x[:, 40] < x[:, 24]
    assert 0.4 < mirrored.float().mean() < 0.6
    assert (y[:, 40] > y[:, 24]).all(), "never upside down"
    # Sides of the part, as shares of the square, from the slope in its middle.
    wide, high = ((v[:, 40] - v[:, 24]).abs() / (ramp[40] - ramp[24]) for v in (x, y))
    assert wide.max() <= 1 + 1e-4
    assert high.max() <= 1 + 1e-4
    area = wide * high
    assert 0.48 < area.min() < 0.53
    assert area.max() > 0.97
    inside = area < 0.7  # nothing was cut to the square there
    assert ((wide / high)[inside] < 4 / 3 + 0.01).all()
    assert ((wide / high)[inside] > 3 / 4 - 0.01).all()
    middle = x[:, 31:33].mean(1)
    assert (middle.abs() <= 1 - wide + 0.01).all()
