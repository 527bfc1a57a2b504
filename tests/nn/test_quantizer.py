"""The codebook modules against vector-quantize-pytorch and transformers' Chameleon quantiser, and their own promises."""

import pytest
import torch
import torch.nn.functional as F

from mmfast.nn import VectorQuantize, VectorQuantizer2

upstream = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")


def pair(train: bool = True, **options):
    """The upstream module and ours with the same weights."""
    theirs = upstream.VectorQuantize(dim=12, codebook_size=32, **options)
    ours = VectorQuantize(dim=12, codebook_size=32, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(train), ours.train(train)


OPTIONS = [
    {},
    {"rotation_trick": False},
    {"commitment_weight": 0.25, "decay": 0.99},
    {"use_cosine_sim": True},
    {"codebook_dim": 5},
    {"channel_last": False},
    {"accept_image_fmap": True},
    {"learnable_codebook": True, "ema_update": False},
]


def make_input(options):
    if options.get("accept_image_fmap"):
        return torch.randn(2, 12, 5, 7)
    return torch.randn(2, 12, 9) if options.get("channel_last") is False else torch.randn(2, 9, 12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_three_training_steps_like_upstream(options):
    theirs, ours = pair(**options)
    assert set(theirs.state_dict()) == set(ours.state_dict())
    for _ in range(3):
        x = make_input(options)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, got = theirs(a), ours(b)
        assert torch.equal(got[1], expected[1])
        torch.testing.assert_close(got[0], expected[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got[2], expected[2].reshape(()), atol=1e-6, rtol=1e-5)
        weight = torch.randn_like(x)
        ((expected[0] * weight).sum() + expected[2]).backward()
        ((got[0] * weight).sum() + got[2]).backward()
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_cosine_codes_stay_unit():
    ours = VectorQuantize(dim=6, codebook_size=10, use_cosine_sim=True).train()
    for _ in range(3):
        quantized, indices, _ = ours(torch.randn(40, 6))
        torch.testing.assert_close(quantized.norm(dim=-1), torch.ones(40))
    torch.testing.assert_close(ours.codebook.norm(dim=-1), torch.ones(10))
    x = torch.randn(25, 6)
    ours.eval()
    assert torch.equal(ours(x)[1], (F.normalize(x, dim=-1) @ ours.codebook.T).argmax(-1))
    assert indices.shape == (40,)


def test_evaluation_changes_nothing():
    theirs, ours = pair(train=False)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    x = torch.randn(2, 9, 12)
    expected, got = theirs(x), ours(x)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[2] == 0
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())
    ours.train()(x, freeze_codebook=True)
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def test_mask():
    theirs, ours = pair()
    x, mask = torch.randn(2, 9, 12), torch.rand(2, 9) > 0.4
    expected, got = theirs(x, mask=mask), ours(x, mask=mask)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(ours._codebook.cluster_size, theirs._codebook.cluster_size)
    torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], atol=1e-5, rtol=1e-4)
    assert (got[0][~mask] == 0).all()


def test_dead_codes_restart_with_all_three_states():
    ours = VectorQuantize(dim=4, codebook_size=64, threshold_ema_dead_code=0.9, decay=0.5).train()
    x = torch.randn(500, 4) * 0.01 + 3.0
    ours(x)
    sizes = ours._codebook.cluster_size[0]
    assert (sizes >= 0.9 - 1e-6).all()
    replaced = (ours.codebook.unsqueeze(1) == x.unsqueeze(0)).all(-1).any(-1)
    assert replaced.sum() > 40, "codes that nobody chose were not replaced by rows of the batch"
    torch.testing.assert_close(ours._codebook.embed_avg[0][replaced], ours.codebook[replaced] * 0.9)
    before = len(ours(x)[1].unique())
    for _ in range(5):
        indices = ours(x)[1]
    assert len(indices.unique()) >= before > 1


def test_kmeans_start_finds_the_clusters():
    centres = torch.randn(8, 6) * 10
    x = (centres.repeat(50, 1) + 0.05 * torch.randn(400, 6))[torch.randperm(400)]
    ours = VectorQuantize(dim=6, codebook_size=32, kmeans_init=True).train()
    assert not ours._codebook.initted
    _, _, loss = ours(x)
    assert ours._codebook.initted
    assert loss < 0.05
    assert ours._codebook.cluster_size.sum() == pytest.approx(400, rel=1e-3)


def test_checkpointed_call_matches():
    """Recomputing in the backward pass must not learn from the batch twice: callers freeze the recomputation by eval statistics."""
    ours = VectorQuantize(dim=6, codebook_size=16).train()
    x = torch.randn(20, 6, requires_grad=True)
    quantized, _, loss = torch.utils.checkpoint.checkpoint(lambda v: ours(v, freeze_codebook=True), x, use_reentrant=False)
    (quantized.sum() + loss).backward()
    assert x.grad is not None
    assert (ours._codebook.cluster_size == 1).all()


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False, "accept_image_fmap": True}, {"use_cosine_sim": True}], ids=str)
def test_training_compiles_to_one_graph(options):
    """With neither k-means start nor dead-code restart, which look at values and so break the graph."""
    plain, x = VectorQuantize(dim=12, codebook_size=32, **options).train(), make_input(options)
    fused = VectorQuantize(dim=12, codebook_size=32, **options).train()
    fused.load_state_dict(plain.state_dict())
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, got = plain(a), compiled(b)
        (expected[0].square().sum() + expected[2]).backward()
        (got[0].square().sum() + got[2]).backward()
        assert torch.equal(got[1], expected[1])
        torch.testing.assert_close(b.grad, a.grad)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value)


def test_indices_to_output():
    for options in ({}, {"channel_last": False}, {"accept_image_fmap": True}, {"codebook_dim": 5}):
        ours = VectorQuantize(dim=12, codebook_size=32, **options).eval()
        quantized, indices, _ = ours(make_input(options))
        torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)
    assert (ours.get_codes_from_indices(torch.tensor([-1])) == 0).all()


def test_wrong_width_names_the_layout():
    with pytest.raises(ValueError, match=r"expected 12 values along dim -1 of x, got shape \(2, 12, 9\); see channel_last"):
        VectorQuantize(dim=12, codebook_size=32)(torch.randn(2, 12, 9))
    with pytest.raises(ValueError, match="learnable codebook cannot also follow"):
        VectorQuantize(dim=12, codebook_size=32, learnable_codebook=True, ema_update=True)


def test_chameleon_quantiser():
    modeling = pytest.importorskip("transformers.models.chameleon.modeling_chameleon", reason="transformers is not installed")
    from transformers import ChameleonVQVAEConfig

    theirs = modeling.ChameleonVQVAEVectorQuantizer(ChameleonVQVAEConfig(num_embeddings=50, embed_dim=16))
    ours = VectorQuantizer2(50, 16, beta=theirs.beta)
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(2, 16, 6, 5)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected, expected_loss, expected_indices = theirs(a)
    got, loss, (perplexity, encodings, indices) = ours(b)
    assert torch.equal(indices, expected_indices)
    assert encodings is None
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(loss, expected_loss)
    (expected.square().sum() + expected_loss).backward()
    (got.square().sum() + loss).backward()
    torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.embedding.weight.grad)
    p = torch.bincount(indices, minlength=50) / indices.numel()
    assert perplexity.item() == pytest.approx(torch.exp(-(p[p > 0] * p[p > 0].log()).sum()).item(), rel=1e-5)
    sane = VectorQuantizer2(50, 16, sane_index_shape=True)
    assert sane(z)[2][2].shape == (2, 6, 5)
    assert sane.get_codebook_entry(indices, (2, 6, 5, 16)).shape == z.shape


def test_uniform_usage_has_perplexity_k():
    ours = VectorQuantizer2(7, 3)
    z = ours.embedding.weight.detach().T.reshape(1, 3, 7, 1)
    assert ours(z)[2][0].item() == pytest.approx(7, rel=1e-5)
