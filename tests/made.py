"""A tiny session on weights written by transformers, for what is done with a trained model."""

from functools import partial

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmfast import spec
from mmfast.data import chat, images
from mmfast.models import build, tokenizer_for
from mmfast.models.tokenizer import word_tokenizer

TEXT = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to "
    "the user's questions. USER: What is this? ASSISTANT: Yes, it is red.",
    "What colour is the circle? It's red. Really? Yes no. And then? A naive cafe, no. 3. Hello Hi USER: ASSISTANT: user assistant",
]
VISION = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
TOWERS = {
    spec.Clip: lambda: CLIPVisionModel(CLIPVisionConfig(intermediate_size=48, initializer_factor=3.0, **VISION)),
    spec.Siglip: lambda: SiglipVisionModel(SiglipVisionConfig(intermediate_size=48, **VISION)),
    spec.Dino: lambda: Dinov2Model(Dinov2Config(mlp_ratio=2, **VISION)),
}


def tokenizer(kind: str):
    """The ways in which tokenizers treat the beginning of a text: GPT-2's bytes, SentencePiece's mark before a word (old form and new), words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    if kind == "words":
        import re

        words = dict.fromkeys(w for line in TEXT for w in re.findall(r"\w+|[^\w\s]+", line))
        return word_tokenizer(("<pad>", "<bos>", "<eos>", "<unk>", "<image>", *words))
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind != "bytes"))
    if kind in ("bytes", "bytes_no_bos"):
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind in ("prepend", "metaspace"):
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
        )
        specials = [*specials, *(f"<0x{i:02X}>" for i in range(256))]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind.startswith("bytes") else []
    inner.train_from_iterator(
        TEXT * 4, trainers.BpeTrainer(vocab_size=620, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens([AddedToken(s, special=True) for s in specials[:3]])
    names = dict(eos_token="</s>", unk_token="<unk>")
    if kind != "bytes_no_bos":
        names["bos_token"] = "<s>"
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


class Session:
    """What `mmfast.trainers.supervised.Session` offers."""

    def __init__(
        self,
        folder,
        kind="bytes",
        tower=spec.Clip,
        family="llama",
        connector=None,
        fusion=None,
        image=None,
        kv_heads=2,
        dtype=None,
        **options,
    ):
        torch.manual_seed(0)
        tok = tokenizer(kind)
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads, intermediate_size=40)
        config = AutoConfig.for_model(family, vocab_size=len(tok), max_position_embeddings=256, tie_word_embeddings=False, **sizes)
        language = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in language.parameters():
                if p.ndim > 1:
                    p.normal_(std=0.2)
        language.save_pretrained(folder / "lm")
        tok.save_pretrained(folder / "lm")
        TOWERS[tower]().save_pretrained(folder / "tower")
        given = spec.System(
            "made",
            paper="arXiv:2304.08485",
            encoder=tower(weights=str(folder / "tower"), **options),
            connector=connector or spec.Mlp(2),
            fusion=fusion or spec.Prefix(),
            image=image or spec.Fixed(),
            language=spec.LanguageModel(weights=str(folder / "lm")),
            stages=(spec.Stage("instruct", train=("connector",), data=spec.Data("mine"), optim=spec.Optim(lr=1e-3, steps=1)),),
        )
        self.tokenizer = tokenizer_for(given)
        self.model = build(given, tokenizer=self.tokenizer, dtype=dtype).eval()
        self.system = self.model.system

    def encoder(self, template, max_length=2048):
        return partial(
            lambda turns, **k: chat.encode(self.tokenizer, template, turns, **k),
            image_tokens=self.system.image_places, image_token=self.model.image_token, max_length=max_length,
            borders=tuple(self.tokenizer.convert_tokens_to_ids(list(self.system.borders))),
        )  # fmt: skip

    def beside(self, ids, labels=None):
        return {}

    def pixels(self, pictures):
        return images.normalise(pictures, self.system.image)


def photograph(path, width=61, height=47, seed=0):
    """Smooth colours with noise, as a JPEG whose sides are no multiples of anything."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([127 + 120 * np.sin(x / 7 + i) * np.cos(y / (5 + i)) for i in range(3)], -1)
    Image.fromarray((base + rng.normal(0, 9, base.shape)).clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return str(path)


# ---------------------------------------------------------------------------------------- parity with a stock class


def lively(model: torch.nn.Module, std: float = 0.15, seed: int = 0) -> torch.nn.Module:
    """Weights at which every part speaks, and at which fp32 rounds well within 1e-5: matrices from ``std``, norms, biases and gates about where
    they start, but not there."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            drawn = torch.randn(p.shape, generator=g)
            p.copy_(drawn * std if p.squeeze().ndim > 1 else p + drawn * 0.3)
    return model.eval()


def saved(model, path):
    model.save_pretrained(path)
    return path


def words_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the next token, for stock classes that do not compute it, or not rightly."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def same_logits(ours, theirs, batch: dict, *, loss: bool = True) -> None:
    """Logits of real tokens and the loss equal those of the stock class, which says more than nothing.

    Args:
        loss: the stock class's own; without it its logits' (``words_loss``).
    """
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"], dtype=torch.bool)
    with torch.no_grad():
        want = theirs(**(batch if loss else {k: v for k, v in batch.items() if k != "labels"}))
        got = ours(**batch)
    assert want.logits[real].std() > 0.3, "a checkpoint that says nothing proves nothing"
    torch.testing.assert_close(got.logits[real], want.logits[real], atol=1e-5, rtol=0)
    if "labels" in batch:
        torch.testing.assert_close(got.loss, want.loss if loss else words_loss(want.logits, batch["labels"]), atol=1e-5, rtol=0)


def same_tokens(ours, theirs, batch: dict, *, end: int, steps: int = 12) -> torch.Tensor:
    """Greedy tokens and those of beams equal those of the stock class, until the end token or the limit; prompts are padded on the left. Returns the
    greedy ones."""
    width = batch["input_ids"].shape[1]
    for beams in (3, 1):
        options = dict(max_new_tokens=steps, do_sample=False, num_beams=beams, pad_token_id=end, eos_token_id=end)
        want = theirs.generate(**batch, **options)[:, width:]
        got = ours.generate(**batch, end=end, max_new_tokens=steps, beams=beams)
        assert got.tolist() == want.tolist(), beams
    assert len(set(got.flatten().tolist())) > 4, "a model that repeats itself proves nothing"
    return got


def moves_logits(ours, batch: dict, names) -> None:
    """The parity test can fail: a change of each named weight is seen."""
    with torch.no_grad():
        want = ours(**batch).logits
        for name in names:
            weight = ours.get_parameter(name)
            before = weight.clone()
            weight.mul_(1.05).add_(0.01)
            moved = (ours(**batch).logits - want).abs().max()
            weight.copy_(before)
            assert moved > 1e-4, name
