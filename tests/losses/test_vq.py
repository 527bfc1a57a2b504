"""The terms of an image tokenizer, by hand."""

import math

import pytest
import torch
from worked import near, row

from mmfast.losses import adaptive_weight, code_counts, code_perplexity, code_usage, critic_loss, generator_loss, reconstruction
from mmfast.nn import VectorQuantizer2
from mmfast.ops import vq_ema_step_, vq_quantize

PIXELS = torch.tensor([0.0, 0.5, -1.0, 1.0] * 3).view(1, 3, 2, 2).repeat(2, 1, 1, 1)
DRAWN = torch.cat([PIXELS[:1] + 0.5, PIXELS[1:]])
DRAWN[1, 0, 0, 0] = 1.2


def test_reconstruction_is_a_mean_by_picture():
    """Picture 0 is .5 off everywhere, picture 1 at one value of twelve by 1.2."""
    assert reconstruction(DRAWN, PIXELS).tolist() == pytest.approx([0.5, 0.1])
    assert reconstruction(DRAWN, PIXELS, error="l2").tolist() == pytest.approx([0.25, 0.12])


def test_perceptual_term_is_added_with_its_weight():
    def seen(drawn, pixels):
        return (drawn - pixels).flatten(1).amax(1).view(-1, 1, 1, 1)  # as LPIPS gives it

    assert reconstruction(DRAWN, PIXELS, perceptual=seen, perceptual_weight=0.5).tolist() == pytest.approx([0.75, 0.7])
    with pytest.raises(ValueError, match=r"\[B=2\], got \[\]"):
        reconstruction(DRAWN, PIXELS, perceptual=lambda a, b: a.mean())
    with pytest.raises(ValueError, match="'huber'"):
        reconstruction(DRAWN, PIXELS, error="huber")


def test_hinges():
    """Real 2 and .5: 0 and .5; drawn -3 and .25: 0 and 1.25; half of .25 + .625. The generator wants +1.375."""
    real, drawn = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert critic_loss(real, drawn).item() == pytest.approx(0.4375)
    assert generator_loss(drawn).item() == pytest.approx(1.375)


def test_adaptive_weight():
    """rec = 3 W0 + 4 W1 pulls with 5, gan = 2 W0 with 2: 5 / 2.0001 of .8. No pull of the critic is 1e4 at most, and no gradient passes."""
    w = row(1.0, 1.0, grad=True)
    rec, gan = 3 * w[0] + 4 * w[1], 2 * w[0]
    got = adaptive_weight(rec, gan, w)
    assert got.item() == pytest.approx(0.8 * 5 / 2.0001, rel=1e-6)
    assert not got.requires_grad
    assert adaptive_weight(rec, gan, w, scale=1.0).item() == pytest.approx(5 / 2.0001, rel=1e-6)
    assert adaptive_weight(rec, 0 * gan, w).item() == pytest.approx(8000)
    (rec + got * gan).backward()  # the graphs are alive
    assert w.grad.tolist() == pytest.approx([3 + 2 * got.item(), 4])


@pytest.mark.parametrize("legacy", [True, False])
def test_worked_codebook(legacy, dtype):
    """Four rows and three codes worked by hand: the same number on both sides of beta, and other gradients."""
    book = VectorQuantizer2(3, 2, legacy=legacy).to(dtype)
    book.embedding.weight.data = torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=dtype)
    z = torch.tensor([[0.9, 0.1], [0.8, 0], [0.1, 0.2], [0.5, 0.5]], dtype=dtype).T.reshape(1, 2, 2, 2).requires_grad_()
    _, loss, (perplexity, _, indices) = book(z)
    assert indices.tolist() == [1, 1, 0, 0]
    assert loss.item() == near(0.0953125, dtype)
    assert perplexity.item() == pytest.approx(2.0, rel=1e-6)
    loss.backward()
    commit, code = (1.0, 0.25) if legacy else (0.25, 1.0)
    want = [2 * commit * d / 8 for d in (-0.1, -0.2, 0.1, 0.5, 0.1, 0.0, 0.2, 0.5)]
    assert z.grad.flatten().tolist() == near(want, dtype)
    # e0 gets rows (.1, .2) and (.5, .5), e1 (.9, .1) and (.8, 0), e2 none.
    assert book.embedding.weight.grad.flatten().tolist() == near([2 * code * d / 8 for d in (-0.6, -0.7, 0.3, -0.1, 0, 0)], dtype)


def test_worked_moving_average(dtype):
    """The same rows: decay .9, counts (2, 2, 0)."""
    codes = torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=dtype)
    size, average = torch.ones(3, dtype=dtype), codes.clone()
    sums = torch.tensor([[0.6, 0.7], [1.7, 0.1], [0, 0]], dtype=dtype)
    vq_ema_step_(size, average, codes, torch.tensor([2, 2, 0], dtype=dtype), sums, decay=0.9, eps=1e-5)
    assert size.tolist() == near([1.1, 1.1, 0.9], dtype)
    assert average.flatten().tolist() == near([0.06, 0.07, 1.07, 0.01, 0, 0.9], dtype)
    assert codes.flatten().tolist() == pytest.approx([0.054545, 0.063636, 0.972728, 0.009091, 0, 0.999999], abs=1e-6)


def test_worked_rotation():
    """The row (3, 4) becomes the code (0, 2) exactly."""
    out, _, _ = vq_quantize(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0], [9.0, 9.0]]), gradient="rotation")
    assert out.tolist() == [[0.0, 2.0]]


def test_usage_and_perplexity():
    """Shares 1/2, 1/4, 1/4 of four codes: exp(1.5 log 2) = 2.828; three of four are used. Masked places count for none."""
    counts = code_counts(torch.tensor([[0, 0, -1], [1, 3, -1]]), 4)
    assert counts.tolist() == [2, 1, 0, 1]
    assert code_perplexity(counts).item() == pytest.approx(2 * math.sqrt(2))
    assert code_usage(counts).item() == 0.75
    assert code_perplexity(torch.full((8192,), 7)).item() == pytest.approx(8192)
    assert code_perplexity(torch.tensor([0, 9, 0])).item() == 1
    assert code_usage(torch.zeros(3, dtype=torch.long)).item() == 0


def test_counts_of_pieces_add_up():
    ids = torch.randint(0, 16, (6, 5))
    assert torch.equal(code_counts(ids[:2], 16) + code_counts(ids[2:], 16), code_counts(ids, 16))
