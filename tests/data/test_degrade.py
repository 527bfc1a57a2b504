"""Degraded pictures: the noise schedule's worked values, sizes, and colours against the standard library."""

import colorsys
import math

import pytest
import torch

from mmfast.data import degrade


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


# step, square root of what is left, square root of the noise's share, their ratio squared
NOISE = [
    (0, 0.999989, 0.004726, 44765), (100, 0.998293, 0.058406, 292.1), (200, 0.993879, 0.110475, 80.94), (300, 0.980984, 0.194089, 25.55),
    (400, 0.944860, 0.327476, 8.325), (500, 0.863017, 0.505175, 2.918), (600, 0.734246, 0.678883, 1.170), (700, 0.592677, 0.805440, 0.5415),
    (800, 0.467014, 0.884250, 0.2789), (900, 0.364888, 0.931051, 0.1536), (999, 0.285042, 0.958515, 0.0884),
]  # fmt: skip


def test_noise_schedule():
    schedule = degrade.noise_schedule()
    assert schedule.shape == (1000,)
    for step, signal, noise, ratio in NOISE:
        left = schedule[step].item()
        assert math.sqrt(left) == pytest.approx(signal, abs=5.1e-7)
        assert math.sqrt(1 - left) == pytest.approx(noise, abs=5.1e-7)
        assert left / (1 - left) == pytest.approx(ratio, rel=6e-4)
    # Independently, with sums of logarithms.
    total = 0.0
    for i in range(1000):
        total += math.log1p(-((0.005 - 1e-5) / (1 + math.exp(6 - 12 * i / 999)) + 1e-5))
        assert schedule[i].item() == pytest.approx(math.exp(total), rel=1e-11)


def test_noise_schedule_as_published_is_float32():
    """.058408 where float64 has .058406."""
    assert math.sqrt(1 - degrade.noise_schedule(dtype=torch.float32)[100]) == pytest.approx(0.058408, abs=1.5e-6)


def test_noised_values(dtype):
    one = torch.ones(1, dtype=dtype)
    schedule = degrade.noise_schedule()[500].item()
    want = 0.5 * math.sqrt(schedule) + math.sqrt(1 - schedule)
    got = degrade.diffuse(0.5 * one, 500, noise=one)
    assert got.dtype == dtype
    assert got.item() == pytest.approx(want, rel=1e-9 if dtype == torch.float64 else 1e-5)
    assert got.item() == pytest.approx(0.936683, abs=5e-7)  # 0.936684 when formed from the table's six digits
    bright = degrade.diffuse(0.9 * one, 500, noise=one)
    assert bright.item() == pytest.approx(1.28189, abs=5e-6)
    assert degrade.to_bytes(bright).item() == 255
    assert degrade.to_bytes(bright, wrap=True).item() == 70
    assert degrade.to_bytes(-one / 100).item() == 0
    assert degrade.to_bytes(-one / 100, wrap=True).item() == 253
    assert degrade.to_bytes(torch.tensor([0.0, 0.5, 1.0], dtype=dtype)).tolist() == [0, 127, 255]
    with pytest.raises(ValueError, match=r"expected a step of 0 \.\. 999, got 1000"):
        degrade.diffuse(one, 1000)


def test_noise_leaves_the_range(dtype):
    """At step 500 uniform pixels fall below 0 in 22 % of places and above 1 in 16 %."""
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(400_000, dtype=dtype, generator=draw)
    noised = degrade.diffuse(image, 500, generator=draw)
    assert (noised < 0).double().mean().item() == pytest.approx(0.223, abs=0.003)
    assert (noised > 1).double().mean().item() == pytest.approx(0.157, abs=0.003)
    again = degrade.diffuse(image, 500, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again, degrade.diffuse(image, 500, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(again, noised)


def test_sizes_of_stic():
    assert degrade.shrunk_size(640, 480) == (26, 20)
    assert degrade.shrunk_size(480, 640) == (20, 26)
    assert degrade.shrunk_size(300, 300, 4) == (4, 4)
    assert [degrade.short_side(h) for h in (480, 96, 48, 20)] == [20, 4, 2, 2]


def test_blur(dtype):
    """Constant pictures stay; of a fine chequerboard only its mean is left; size and type stay."""
    flat = torch.full((3, 48, 64), 0.25, dtype=dtype)
    torch.testing.assert_close(degrade.blur(flat), flat)
    board = ((torch.arange(48)[:, None] + torch.arange(64)) % 2).to(dtype).expand(3, 48, 64)
    got = degrade.blur(board, 4)
    assert got.shape == board.shape
    assert got.dtype == dtype
    assert (got - 0.5).abs().max() < 0.02


@pytest.mark.parametrize(("brightness", "hue"), [(1.0, 0.0), (0.6, 0.3), (1.5, -0.3), (1.0, 0.5), (1.2, 1 / 3)])
def test_colour_jitter(brightness, hue, dtype):
    image = torch.rand(3, 5, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    image[:, 0, :3] = torch.tensor([[0.5, 1.0, 0.0]] * 3, dtype=dtype)  # grey, white, black have no hue
    image[:, 1, :2] = torch.tensor([[1.0, 0.2], [0.0, 0.9], [0.0, 0.9]], dtype=dtype)  # ties of two channels
    got = degrade.colour_jitter(image, brightness, hue)
    for pixel, seen in zip(image.flatten(1).T.tolist(), got.flatten(1).T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(min(1.0, c * brightness) for c in pixel))
        assert seen == pytest.approx(colorsys.hsv_to_rgb((h + hue) % 1, s, v), abs=1e-9 if dtype == torch.float64 else 1e-5)


def test_jitter_draws():
    draw = torch.Generator().manual_seed(0)
    draws = torch.tensor([degrade.jitter_draw(draw) for _ in range(4000)])
    assert draws.amin(0).tolist() == pytest.approx([0.5, -0.3], abs=0.01)
    assert draws.amax(0).tolist() == pytest.approx([1.5, 0.3], abs=0.01)
    assert draws.mean(0).tolist() == pytest.approx([1.0, 0.0], abs=0.03)


def test_crop_boxes():
    draw = torch.Generator().manual_seed(0)
    boxes = torch.tensor([degrade.crop_box(300, 400, draw) for _ in range(4000)], dtype=torch.float64)
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    share, aspect = height * width / 120_000, width / height
    assert (share.min().item(), share.max().item()) == pytest.approx((0.01, 0.2), abs=0.004)
    assert share.mean().item() == pytest.approx(0.105, abs=0.003)
    assert (aspect.min().item(), aspect.max().item()) == pytest.approx((3 / 4, 4 / 3), abs=0.05)
    assert aspect.log().mean().item() == pytest.approx(0, abs=0.01)
    assert degrade.crop_box(1, 1, draw) == (0, 0, 1, 1)
    assert degrade.crop_box(8, 2000, draw)[2] <= 8


def test_crop(dtype):
    """A part of a ramp, enlarged: the ramp again, at a smaller slope."""
    image = torch.arange(40, dtype=dtype).expand(3, 30, 40)
    got = degrade.crop(image, (5, 10, 15, 20))
    assert got.shape == image.shape
    torch.testing.assert_close(got[:, :, 1:-1], (10 + (torch.arange(40, dtype=dtype) + 0.5) / 2 - 0.5)[1:-1].expand(3, 30, 38))
    torch.testing.assert_close(degrade.crop(image, (0, 0, 30, 40)), image)
