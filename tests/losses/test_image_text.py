"""BLIP-2's three terms: values worked by hand, torch's cross-entropy where it has the same meaning, and what negatives may not be."""

import pytest
import torch
import torch.nn.functional as F

from mmfast.losses import hard_negatives, image_text_contrast, smoothed_cross_entropy

SIMILARITY = torch.tensor([[0.5, 0.1], [0.2, 0.4]], dtype=torch.float64) / 0.07  # rows are pictures
KEYS = torch.arange(2)


def test_the_contrast_worked_by_hand():
    assert float(image_text_contrast(SIMILARITY, SIMILARITY, KEYS, KEYS)) == pytest.approx(0.243854, abs=1e-6)
    assert float(image_text_contrast(SIMILARITY.T, SIMILARITY.T, KEYS, KEYS)) == pytest.approx(0.227956, abs=1e-6)
    assert float(image_text_contrast(SIMILARITY, SIMILARITY.T, KEYS, KEYS)) == pytest.approx(0.235905, abs=1e-6)


def test_distinct_keys_are_label_smoothing_at_the_own_place():
    """Rank 1 of two with three rows each: its row r stands at 3 + r among all."""
    torch.manual_seed(0)
    i2t, t2i = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
    at = torch.arange(3, 6)
    want = (F.cross_entropy(i2t, at, label_smoothing=0.1) + F.cross_entropy(t2i, at, label_smoothing=0.1)) / 2
    assert float(image_text_contrast(i2t, t2i, at, torch.arange(6))) == pytest.approx(float(want), abs=1e-12)
    assert float(image_text_contrast(i2t, t2i, at, torch.arange(6), total=12)) == pytest.approx(float(want) / 4, abs=1e-12)


def test_captions_of_one_picture_share_the_target():
    keys = torch.tensor([7, 7, 3])
    logits = torch.randn(3, 3, dtype=torch.float64)
    targets = torch.tensor([[0.45, 0.45, 0], [0.45, 0.45, 0], [0, 0, 0.9]], dtype=torch.float64) + 0.1 / 3
    assert float(image_text_contrast(logits, logits, keys, keys)) == pytest.approx(float(F.cross_entropy(logits, targets)), abs=1e-12)


def test_negatives_are_other_pictures_and_the_similar_ones_more_often():
    keys = torch.tensor([0, 0, 1, 2])
    logits = torch.tensor([[9.0, 9.0, 1.0, 0.0]] * 4)
    drawn = torch.stack([hard_negatives(logits, keys, keys, torch.Generator().manual_seed(s)) for s in range(2000)])
    assert set(drawn[:, 0].tolist()) == set(drawn[:, 1].tolist()) == {2, 3}
    share = (drawn[:, 0] == 2).double().mean()  # e / (e + 1) = .731
    assert abs(share - 0.7311) < 0.03
    assert not (drawn[:, 2] == 2).any()
    assert not (drawn[:, 3] == 3).any()


def test_a_row_beside_which_no_other_picture_stands_has_no_negative():
    assert hard_negatives(torch.zeros(1, 1), torch.tensor([0]), torch.tensor([0])).tolist() == [-1]
    assert hard_negatives(torch.zeros(2, 2), torch.tensor([7, 7]), torch.tensor([7, 7])).tolist() == [-1, -1]
    drawn = hard_negatives(torch.zeros(2, 3), torch.tensor([7, 5]), torch.tensor([7, 7, 5]))
    assert drawn[0] == 2
    assert drawn[1] in (0, 1)


def test_smoothed_cross_entropy_is_torch_s_mean_over_scored_tokens():
    logits, labels = torch.randn(2, 4, 9), torch.randint(9, (2, 4))
    labels[1, 2:] = -100
    want = F.cross_entropy(logits.view(8, 9), labels.view(8), label_smoothing=0.1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels), want)
    parts = smoothed_cross_entropy(logits[:1], labels[:1], total=6) + smoothed_cross_entropy(logits[1:], labels[1:], total=6)
    torch.testing.assert_close(parts, want)


@pytest.mark.parametrize(
    ("scale", "by_picture", "by_text", "want"), [(1, 0.442058, 0.455700, 0.448879), (1 / 0.07, 0.001652, 0.027922, 0.014787)]
)
def test_fromage_s_worked_values(scale, by_picture, by_text, want):
    """Without smoothing: two pairs, pictures (1, 0) and (0, 1), texts (1, 0) and (.6, .8), whose directions are written out."""
    pictures, texts = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    s, own = scale * pictures @ texts.T, torch.arange(2)
    rows, columns = (-(s.diagonal() - torch.log(s.exp().sum(dim))).mean() for dim in (1, 0))
    assert (rows.item(), columns.item()) == pytest.approx((by_picture, by_text), abs=1e-6)
    assert image_text_contrast(s, s.T, own, own, smoothing=0.0).item() == pytest.approx(want, abs=1e-6)
