"""Grounding scores against counted pixels and values worked by hand."""

import math
import random

import numpy as np
import pytest

from mmfast.eval import grounding


def counted(a, b, pixels):
    """Intersection over union of boxes with whole corners, by painting them."""
    masks = []
    for x1, y1, x2, y2 in (a, b):
        mask = np.zeros((40, 40), bool)
        mask[y1 : y2 + pixels, x1 : x2 + pixels] = True
        masks.append(mask)
    either = (masks[0] | masks[1]).sum()
    return (masks[0] & masks[1]).sum() / either if either else 0.0


@pytest.mark.parametrize("pixels", [False, True])
def test_iou_equals_counted_pixels(pixels):
    draw = random.Random(0)
    for _ in range(500):
        a, b = (
            (*(min(p) for p in sides), *(max(p) for p in sides))
            for sides in ([(draw.randrange(30), draw.randrange(30)) for _ in "xy"] for _ in "ab")
        )
        assert grounding.iou(a, b, pixels=pixels) == pytest.approx(counted(a, b, int(pixels)), abs=1e-12)


def test_conventions_by_hand():
    assert grounding.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert grounding.iou((0, 0, 9, 9), (5, 0, 14, 9), pixels=True) == pytest.approx(50 / 150)
    assert grounding.iou((0, 0, 0, 0), (0, 0, 9, 9), pixels=True) == pytest.approx(1 / 100)
    assert grounding.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert grounding.iou((5, 5, 1, 1), (0, 0, 9, 9)) == 0  # no box
    assert grounding.iou((0.1, 0.1, 0.2, 0.2), (0.1, 0.1, 0.2, 0.2)) == pytest.approx(1)  # small areas lose nothing


def test_score_by_hand():
    """IoU 1, .5 (a hit for half of the papers), 1 / 3, nothing read, and the better of two targets."""
    ten = (0, 0, 10, 10)
    predicted = [ten, (0, 0, 10, 5), (5, 0, 15, 10), None, ten]
    targets = [ten, ten, ten, ten, [(20, 20, 30, 30), (0, 0, 10, 9)]]
    got = grounding.score(predicted, targets)
    assert got == pytest.approx({"grounding_accuracy": 2 / 5, "grounding_mean_iou": (1 + 0.5 + 1 / 3 + 0.9) / 5, "grounding_unread": 1 / 5})
    assert grounding.score(predicted, targets, strict=False)["grounding_accuracy"] == pytest.approx(3 / 5)
    assert grounding.score(predicted, targets, threshold=0.3)["grounding_accuracy"] == pytest.approx(4 / 5)
    assert math.isnan(grounding.score([], [])["grounding_accuracy"])
    with pytest.raises(ValueError, match="1 predictions but 0 targets"):
        grounding.score([None], [])


def test_the_centre_box_by_hand():
    boxes, sizes = [(0, 0, 20, 10), (10, 10, 20, 70)], [(100, 100), (100, 200)]  # shares .2 x .1 and .1 x .3
    assert grounding.centre_box(boxes, sizes, (200, 100)) == pytest.approx((85, 40, 115, 60))
    with pytest.raises(ValueError, match="expected boxes"):
        grounding.centre_box([], [], (1, 1))


def test_the_best_constant_box_by_hand():
    """Two boxes share a place and a third is elsewhere; small boxes all over are best met by the whole picture."""
    boxes, sizes = [(10, 10, 30, 30), (10, 10, 30, 32), (60, 60, 90, 90)], [(100, 100)] * 3
    assert grounding.constant_box(boxes, sizes, (200, 100)) == pytest.approx((20, 10, 60, 30))
    corners = [(x, y, x + 50, y + 50) for x in (0, 50) for y in (0, 50)]
    assert grounding.constant_box(corners, [(100, 100)] * 4, (1, 1)) in [(0, 0, 0.5, 0.5), (0, 0, 1, 1)]  # a mean of 1 / 4 for both
    with pytest.raises(ValueError, match="constant_box: expected boxes"):
        grounding.constant_box([(0, 0, 1, 1)], [], (1, 1))
