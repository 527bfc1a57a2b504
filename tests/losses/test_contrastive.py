"""The contrast of pictures with texts: the worked values of FROMAGe's two directions, and gradients."""

import pytest
import torch

from mmfast.losses.contrastive import info_nce

PICTURES = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
TEXTS = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("scale", "by_picture", "by_text", "want"), [(1, 0.442058, 0.455700, 0.448879), (1 / 0.07, 0.001652, 0.027922, 0.014787)]
)
def test_worked_values(scale, by_picture, by_text, want):
    """Sums over two pairs written out, and their values to six digits."""
    s = scale * PICTURES @ TEXTS.T
    rows, columns = (-(s.diagonal() - torch.log(s.exp().sum(dim))).mean() for dim in (1, 0))
    assert (rows.item(), columns.item()) == pytest.approx((by_picture, by_text), abs=1e-6)
    assert info_nce(PICTURES, TEXTS, scale).item() == pytest.approx(want, abs=1e-6)


def test_gradients():
    pictures, texts = (torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(info_nce, (pictures, texts, scale))
    assert info_nce(pictures, pictures, 100.0) < info_nce(pictures, texts, 100.0)
