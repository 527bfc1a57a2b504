"""Whole training steps of published models at their sizes, random weights, before and after mmfast; forward and backward, no optimiser.

``python -m pytest bench/steps.py -s -o python_files=steps.py`` (``scripts/gpu.sh model`` on a GPU; ``-k flamingo`` for one) prints tables and writes
``bench/results/<device>/steps_<model>.csv``: time, items a second, peak memory beyond what stood before the step (gradients included). The clock
starts only after a provider's loss and gradients were compared with the stock code's in the next wider type: ours may err twice as much as it does. What lacks a library is left out and says so. A CPU takes small batches and fewer
layers of the same models (the rows say which), ``MMFAST_GPU_DRY=1``
tiny models.

Models: BLIP-2's Q-Former, stage 1 (arXiv:2301.12597, section 3.2: contrast, matching, captioning; transformers' module, which has no causal mask of
its own and is given one); Flamingo-9B's resampler and one gated block (arXiv:2204.14198; OpenFlamingo's arithmetic); Chameleon's image tokeniser
(arXiv:2405.09818; transformers' VQGAN); DPO from hidden states to gradients at LLaVA-1.5-7B's head, policy and reference.
"""

import copy
import time
from collections.abc import Callable

import pytest
import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfast
from mmfast.nn.gated import MaskedCrossAttention
from mmfast.nn.resampler import PerceiverAttention

DEVICE = timing.DEVICE
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a relative error of loss or gradients
ROWS: dict[str, list[dict]] = {}


def measure(
    file: str, op: str, shape: str, dtype: torch.dtype, steps: dict[str, Callable[[], object]], items: int, unit: str, errors: dict, **more
) -> None:
    """Times the steps, the first of which is the stock code, and notes them."""
    print(f"\n{op}: {shape}, {str(dtype).removeprefix('torch.')}")
    start = time.perf_counter()
    for step in steps.values():
        step()
    repeats = 30 if DEVICE == "cuda" else max(3, min(9, int(25 / (time.perf_counter() - start))))
    times = timing.interleaved(steps, repeats=repeats, warmup=5 if DEVICE == "cuda" else 0, device=DEVICE)
    stock = times[next(iter(times))][0]
    for name, (median, p20, p80) in times.items():
        peak = timing.peak_memory_mb(steps[name], DEVICE)
        rate = items / median * 1e3
        print(f"  {name:28s} {median:10.2f} ms  [{p20:.2f}, {p80:.2f}]  {stock / median:5.2f}x  {rate:9.1f} {unit}/s  {peak:8.1f} MB")
        ROWS.setdefault(file, []).append(dict(op=op, provider=name, mode="step", shape=shape, dtype=str(dtype).removeprefix("torch."), median_ms=f"{median:.3f}",
                         p20_ms=f"{p20:.3f}", p80_ms=f"{p80:.3f}", peak_mb=f"{peak:.1f}", ratio_vs_eager=f"{stock / median:.3f}",
                         max_err=f"{errors[name]:.1e}" if name in errors else "", per_s=f"{rate:.1f}", unit=unit,
                         version=mmfast.__version__ if "mmfast" in name else torch.__version__, **more))  # fmt: skip
    timing.write_rows(f"steps_{file}", ROWS[file], columns=[*timing.COLUMNS, "per_s", "unit", "valid_fraction"])


def wide(t: Tensor) -> Tensor:
    """Losses of half types are formed in float32, as trainers do."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(t) if g is None else g for g, t in zip(torch.autograd.grad(loss, leaves, allow_unused=True), leaves, strict=True)
    ]


def compare(
    models: dict[str, nn.Module], inputs: tuple[Tensor, ...], leaves: dict[str, list[Tensor]], dtype: torch.dtype
) -> dict[str, float]:
    """Relative errors of loss and gradients, dropout off; the first model, widened, is the truth. Leaves lie in the same order everywhere."""

    def run(model, leaves, inputs):
        value = model.eval()(*inputs)
        return value.detach(), *gradients(value, leaves)

    stock = next(iter(models))
    wide_stock = copy.deepcopy(models[stock]).to(WIDER[dtype])
    order = {id(p): n for n, p in models[stock].named_parameters()}
    parameters = dict(wide_stock.named_parameters())
    widened = tuple(t.to(WIDER[dtype]) if t.is_floating_point() else t for t in inputs)
    value, *truth = run(wide_stock, [parameters[order[id(p)]] for p in leaves[stock]], widened)
    norm = sum(t.square().sum().item() for t in truth)
    errors = {}
    for name, model in models.items():
        loss, *found = run(model, leaves[name], inputs)
        apart = sum((a - b).square().sum().item() for a, b in zip(found, truth, strict=True))
        errors[name] = max(((loss - value) / value).abs().item(), (apart / norm) ** 0.5)
        allowed = 2 * errors[stock] + FLOOR[dtype]
        assert errors[name] <= allowed, f"{name}: loss or gradients are off by {errors[name]:.1e}, allowed are {allowed:.1e}"
    return errors


def need_transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: there is no stock model to compare with")


# -------------------------------------------------------------------------------------------------------------- BLIP-2, stage 1


class StageOne(nn.Module):
    """The three losses around a Q-Former; ``ours``: mmfast.nn.QFormer, which knows the masks, else transformers' module."""

    def __init__(self, qformer: nn.Module, width: int, vocabulary: int, ours: bool):
        super().__init__()
        self.ours = ours
        self.qformer = qformer
        self.queries = nn.Parameter(0.02 * torch.randn(1, 32, width))
        self.words = nn.Embedding(vocabulary, width)
        self.image_projection, self.text_projection, self.match = nn.Linear(width, 256), nn.Linear(width, 256), nn.Linear(width, 2)

    def both(self, text: Tensor, image: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Queries and text beside each other: their states."""
        n = self.queries.shape[1]
        if self.ours:
            out = self.qformer(self.queries, image, text=text, mask_mode=mode)
            return out.queries, out.text
        both = torch.cat([self.queries.expand(len(image), -1, -1), text], 1)
        mask = None
        if mode == "multimodal_causal":  # transformers takes a finished mask as it is
            seen = torch.ones(both.shape[1], both.shape[1], dtype=torch.bool, device=text.device).tril()
            seen[:n, :n] = True
            mask = torch.zeros(seen.shape, dtype=text.dtype, device=text.device).masked_fill(~seen, torch.finfo(text.dtype).min)
            mask = mask.expand(len(image), 1, -1, -1)
        hidden = self.qformer(both, query_length=n, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        return hidden[:, :n], hidden[:, n:]

    def alone(self, text: Tensor) -> Tensor:
        return self.qformer(text=text).text if self.ours else self.qformer(text, query_length=0).last_hidden_state

    def queries_alone(self, image: Tensor) -> Tensor:
        if self.ours:
            return self.qformer(self.queries, image).queries
        return self.qformer(self.queries.expand(len(image), -1, -1), encoder_hidden_states=image).last_hidden_state

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        text = self.words(ids)
        seen = F.normalize(self.image_projection(self.queries_alone(image)), dim=-1)
        read = F.normalize(self.text_projection(self.alone(text)[:, 0]), dim=-1)
        scores = torch.einsum("iqd,td->itq", seen, read).amax(-1) / 0.07
        here = torch.arange(len(ids), device=ids.device)
        loss = (F.cross_entropy(wide(scores), here) + F.cross_entropy(wide(scores.t()), here)) / 2
        # Matching: the pairs, then another image, then another text.
        images, texts = torch.cat([image, image.roll(1, 0), image]), torch.cat([text, text, text.roll(1, 0)])
        matched = self.match(self.both(texts, images, "bidirectional")[0]).mean(1)
        loss = loss + F.cross_entropy(wide(matched), (torch.arange(len(texts), device=ids.device) < len(ids)).long())
        states, labels = self.both(text, image, "multimodal_causal")[1][:, :-1], ids[:, 1:]
        if self.ours:
            return loss + mmfast.linear_cross_entropy(states, self.words.weight, labels)
        return loss + F.cross_entropy(wide((states @ self.words.weight.t()).flatten(0, 1)), labels.flatten())


def test_qformer_stage_1():
    transformers = need_transformers()
    batch = timing.sizes(2, 64, 2)
    sizes = dict(
        hidden_size=768, num_hidden_layers=timing.sizes(2, 12, 2), num_attention_heads=12, intermediate_size=3072, encoder_hidden_size=1408
    )
    vocabulary, tokens, words = 30523, 257, 32
    if timing.DRY:
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, encoder_hidden_size=24)
        vocabulary, tokens, words = 50, 17, 6
    torch.manual_seed(0)
    config = transformers.Blip2QFormerConfig(use_qformer_text_input=True, attn_implementation="eager", **sizes)
    stock = StageOne(transformers.Blip2QFormerModel(config), sizes["hidden_size"], vocabulary, ours=False).to(DEVICE, DTYPE)
    applied = mmfast.apply(copy.deepcopy(stock))
    ours = StageOne(mmfast.nn.QFormer(**sizes), sizes["hidden_size"], vocabulary, ours=True).to(DEVICE, DTYPE)
    ours.load_state_dict(stock.state_dict())
    image = torch.randn(batch, tokens, sizes["encoder_hidden_size"], device=DEVICE, dtype=DTYPE)
    ids = torch.randint(0, vocabulary, (batch, words), device=DEVICE)
    models = {"transformers": stock, "transformers, mmfast.apply": applied, "mmfast.nn.QFormer": ours}
    leaves = {n: [p for _, p in sorted(m.named_parameters())] for n, m in models.items()}
    errors = compare(models, (image, ids), leaves, DTYPE)
    steps = {n: lambda m=m, n=n: gradients(m(image, ids), leaves[n]) for n, m in models.items()}
    for model in models.values():
        model.train()  # with its dropout of 0.1
    shape = f"{sizes['num_hidden_layers']} layers, {batch} images of {tokens} tokens, 32 queries, {words} words"
    measure("blip2", "BLIP-2 Q-Former, stage 1", shape, DTYPE, steps, batch, "images", errors)


# --------------------------------------------------------------------------------------------------------------------- Flamingo


def eager_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """OpenFlamingo's arithmetic on ``[B, N, H, D]``; hidden ``[B, rows, keys]`` true where a row does not see a key."""
    scores = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None], -torch.finfo(scores.dtype).max)
    weights = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1)
    if hidden is not None:
        weights = weights.masked_fill(hidden.all(-1)[:, None, :, None], 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    mask = None if hidden is None else ~hidden[:, None]
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2)


def stock_classes(attend: Callable[..., Tensor]) -> dict[type, type]:
    """mmfast's two Flamingo attentions as upstream computes them: media and latents concatenated, every image looked at and masked."""

    class Perceiver(PerceiverAttention):
        def forward(self, media, latents):
            latents = self.norm_latents(latents)
            q = self.to_q(latents).unflatten(-1, (self.heads, -1))
            both = torch.cat([self.norm_media(media), latents], 1)
            k, v = self.to_kv(both).unflatten(-1, (2, self.heads, -1)).unbind(-3)
            return self.to_out(attend(q, k, v).flatten(-2))

    class Masked(MaskedCrossAttention):
        def forward(self, x, media, text_time):
            q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1))
            k, v = self.to_kv(media.flatten(1, 2)).unflatten(-1, (2, self.heads, -1)).unbind(-3)
            image = torch.arange(1, media.shape[1] + 1, device=x.device).repeat_interleave(media.shape[2])
            return self.to_out(attend(q, k, v, text_time[..., None] != image).flatten(-2))

    return {PerceiverAttention: Perceiver, MaskedCrossAttention: Masked}


class FlamingoBlock(nn.Module):
    """Image features to latents, and text that reads them once."""

    def __init__(self, width: int, text_width: int, depth: int, latents: int):
        super().__init__()
        self.resampler = mmfast.nn.PerceiverResampler(dim=width, depth=depth, num_latents=latents)
        self.gated = mmfast.nn.GatedCrossAttention(dim=text_width, dim_visual=width)
        with torch.no_grad():
            self.gated.attn_gate.fill_(0.5)
            self.gated.ff_gate.fill_(0.5)

    def forward(self, image: Tensor, text: Tensor, places: Tensor) -> Tensor:
        return wide(self.gated(text, self.resampler(image), places)).square().mean()


def test_flamingo_9b():
    batch, images, words, width, text_width, depth, latents, tokens = timing.sizes(
        (2, 1, 128, 1024, 2048, 2, 64, 256), (16, 3, 512, 1024, 4096, 6, 64, 256), (2, 2, 12, 32, 48, 2, 5, 9)
    )
    torch.manual_seed(0)
    ours = FlamingoBlock(width, text_width, depth, latents).to(DEVICE, DTYPE)
    models = {"OpenFlamingo's arithmetic": copy.deepcopy(ours), ".. with SDPA": copy.deepcopy(ours), "mmfast.nn": ours}
    for name, attend in (("OpenFlamingo's arithmetic", eager_attention), (".. with SDPA", sdpa)):
        classes = stock_classes(attend)
        for module in models[name].modules():
            module.__class__ = classes.get(type(module), type(module))
    image = torch.randn(batch, images, 1, tokens, width, device=DEVICE, dtype=DTYPE)
    text = torch.randn(batch, words, text_width, device=DEVICE, dtype=DTYPE)
    places = torch.zeros(batch, words, dtype=torch.bool, device=DEVICE)
    places[:, torch.arange(images) * (words // images)] = True
    leaves = {n: list(m.parameters()) for n, m in models.items()}
    errors = compare(models, (image, text, places), leaves, DTYPE)
    steps = {n: lambda m=m, n=n: gradients(m(image, text, places), leaves[n]) for n, m in models.items()}
    shape = f"resampler of {depth} layers, text {text_width} wide, {batch} x {words} tokens, {batch * images} images of {tokens} tokens"
    measure("flamingo", "Flamingo-9B resampler and gated block", shape, DTYPE, steps, batch * words, "tokens", errors)


# -------------------------------------------------------------------------------------------------------------------- Chameleon


@pytest.mark.parametrize("what", ["quantiser", "tokeniser"])
def test_chameleon(what):
    """The quantiser alone on the encoder's output, then encoder and quantiser; no gradients."""
    need_transformers()
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    images, side = timing.sizes({"quantiser": (4, 512), "tokeniser": (1, 256)}[what], (64, 512), (2, 32))
    small = (
        dict(base_channels=32, num_embeddings=64, embed_dim=8, latent_channels=8, channel_multiplier=[1, 1, 2, 2, 1]) if timing.DRY else {}
    )
    torch.manual_seed(0)
    stock = ChameleonVQVAE(ChameleonVQVAEConfig(**small)).to(DEVICE).eval()
    with torch.no_grad():
        stock.quantize.embedding.weight.normal_()
    applied = mmfast.apply(copy.deepcopy(stock))
    models = {"transformers": stock, "transformers, mmfast.apply": applied}
    codes = stock.quantize.embedding.weight
    if what == "quantiser":
        x = torch.randn(images, codes.shape[1], side // 16, side // 16, device=DEVICE)
        calls = {n: lambda m=m: m.quantize(x)[2].flatten() for n, m in models.items()}
        truth = torch.cat(
            [torch.cdist(part.double(), codes.double()).argmin(-1) for part in x.permute(0, 2, 3, 1).flatten(0, 2).split(2048)]
        )
    else:
        x = torch.randn(images, 3, side, side, device=DEVICE)
        pieces = x.split(timing.sizes(1, 8, 1))  # a GPU's memory holds a few images' first layers
        calls = {n: lambda m=m: torch.cat([m.encode(p).image_tokens.flatten() for p in pieces]) for n, m in models.items()}
        truth = None
    calls = {n: torch.no_grad()(call) for n, call in calls.items()}
    truth = calls["transformers"]() if truth is None else truth
    errors = {n: (call() != truth).float().mean().item() for n, call in calls.items()}
    for name, wrong in errors.items():
        assert wrong == 0 if "mmfast" in name and what == "quantiser" else wrong < 0.01, f"{name}: {wrong:.2%} of the tokens are wrong"
    measure(
        "chameleon",
        f"Chameleon's {what}",
        f"{images} images of {side} x {side}, {len(codes)} codes",
        torch.float32,
        calls,
        images,
        "images",
        errors,
    )


# ------------------------------------------------------------------------------------------------------------------- DPO's head


@pytest.mark.parametrize("fraction", [0.15, 1.0])
def test_dpo_at_llavas_head(fraction):
    """Policy and reference, from their hidden states to the gradients of the policy's hidden states and head."""
    pairs, positions, width, vocabulary = timing.sizes((1, 320, 4096, 32064), (16, 640, 4096, 32064), (2, 24, 32, 300))
    dtype = torch.bfloat16
    torch.manual_seed(0)
    hidden, ref_hidden = (torch.randn(2 * pairs, positions, width, device=DEVICE).mul(0.5).to(dtype) for _ in range(2))
    weight, ref_weight = (torch.randn(vocabulary, width, device=DEVICE).mul(width**-0.5).to(dtype) for _ in range(2))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    labels = torch.randint(0, vocabulary, (2 * pairs, positions), device=DEVICE)
    labels[:, : positions - round(positions * fraction)] = -100
    keep = labels != -100
    fused = mmfast.nn.FusedLinearDPOLoss()

    def selected(x: Tensor, head: Tensor) -> Tensor:
        logits = F.linear(x, head)
        at = logits.gather(-1, labels.masked_fill(~keep, 0).unsqueeze(-1)).squeeze(-1).float()
        return ((at - torch.stack([row.float().logsumexp(-1) for row in logits])) * keep).sum(-1)

    def eager() -> Tensor:
        with torch.no_grad():
            reference = selected(ref_hidden, ref_weight)
        chosen, rejected = (selected(hidden, weight) - reference).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    losses = {"eager": eager, "mmfast.nn.FusedLinearDPOLoss": lambda: fused(weight, hidden, labels, None, ref_hidden, ref_weight)[0]}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        print(f"\nliger-kernel left out: {error}")
    else:  # takes inputs that are shifted already, as ours are; sums rather than means
        liger = LigerFusedLinearDPOLoss(average_log_prob=False)
        losses["liger"] = lambda: liger(weight, hidden, labels, None, ref_hidden, ref_weight)[0]
    errors = {}
    truth = None
    for name, loss in list(losses.items()):
        try:
            value = loss()
            found = [value.detach(), *gradients(value, leaves)]
        except Exception as refusal:  # whatever a peer says, it does not end the run
            if name != "liger":
                raise
            print(f"  {name} left out: {type(refusal).__name__} {str(refusal)[:120]!r}")
            del losses[name]
            continue
        truth = truth or found
        errors[name] = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, truth, strict=True))
        if errors[name] > 5e-2:  # two roundings of bfloat16 logits and of what follows
            assert "mmfast" not in name, f"{name}: off by {errors[name]:.1e}"
            print(f"  {name} left out: off by {errors[name]:.1e}")
            del losses[name]
    del truth, found, value
    steps = {n: lambda f=f: gradients(f(), leaves) for n, f in losses.items()}
    shape = f"{2 * pairs} x {positions} positions, {fraction:.0%} scored, {width} x {vocabulary}"
    measure("dpo", "DPO at LLaVA-1.5-7B's head", shape, dtype, steps, 2 * pairs * positions, "tokens", errors, valid_fraction=fraction)
