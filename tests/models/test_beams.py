"""Beam search: the texts of transformers' own, for every kind of fusion, and by hand."""

from itertools import product

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mmfast import spec
from mmfast.models import build, from_pretrained
from tests.models.test_generate import SYSTEM, inputs, model


def stock_llava(tmp_path, seed):
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
        ),
        text_config=dict(
            model_type="llama", vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        ),
        image_token_index=39,
    )  # fmt: skip
    stock = LlavaForConditionalGeneration(config).eval()
    stock.save_pretrained(tmp_path)
    return stock, from_pretrained(str(tmp_path)).eval()


@pytest.mark.parametrize("seed", range(4))
def test_texts_are_those_of_transformers(tmp_path, seed):
    """Llava with prompts padded on the left: every number of beams, penalty and end; also where tokens may not, or
    had better not, come again, with beams and without."""
    stock, ours = stock_llava(tmp_path, seed)
    picture = [39] * 4
    ids = torch.tensor([[0, 0, 1, *picture, 5, 6], [1, 7, 8, *picture, 9, 3]])
    mask = (ids != 0).long()
    pixels = torch.randn(2, 3, 16, 16)
    differs = 0
    likely = ours.generate(ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=8).unique().tolist()
    asked = [(beams, penalty, end, 0, 1.0) for end in likely for beams, penalty in ((2, 1.0), (3, 3.0), (5, -1.0))]
    asked += [(5, -1.0, 4, 2, 1.0), (4, 0.0, None, 3, 1.0), *((beams, 1.0, 4, again, 1.5) for beams in (1, 3) for again in (0, 2))]
    for beams, penalty, end, again, rarer in asked:
        told = stock.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, num_beams=beams, length_penalty=penalty, do_sample=False, max_new_tokens=8,
            eos_token_id=end, pad_token_id=end if end is not None else 0, no_repeat_ngram_size=again, repetition_penalty=rarer,
        )[:, ids.shape[1] :]  # fmt: skip
        options = dict(attention_mask=mask, pixel_values=pixels, end=end, max_new_tokens=8, no_repeat=again, repetition_penalty=rarer)
        said = ours.generate(ids, beams=beams, length_penalty=penalty, **options)
        assert torch.equal(said, told)
        greedy = ours.generate(ids, **options)
        differs += greedy.shape != said.shape or not torch.equal(greedy, said)
    assert differs  # or it would not show that anything was searched


KINDS = {
    "prefix": dict(connector=spec.Mlp()),
    "adapter": dict(connector=spec.Pooled(hidden=8, pool="mean"), fusion=spec.AdapterPrompts(length=3, layers=2)),
    "gated": dict(
        connector=spec.Resampler(tokens=4, depth=1, heads=2, head_width=8), fusion=spec.GatedCrossAttention(every=1, heads=2, head_width=8)
    ),
}


@pytest.mark.parametrize(("kind", "seed"), list(zip(KINDS, (0, 0, 8), strict=True)))
def test_with_beams_for_all_it_finds_the_likeliest_text(kind, seed):
    """As many beams as there are texts lose none: the winner is the likeliest of all, scored by whole forward passes. Weights are so large that
    the pictures decide."""
    torch.manual_seed(seed)
    language = spec.LanguageModel(weights=None, vocab=6, width=24, depth=2, heads=2, kv_heads=2, ffn=40, init=0.3)
    ours = build(spec.System("test", encoder=SYSTEM.encoder, language=language, image=SYSTEM.image, **KINDS[kind])).eval()
    for name, p in ours.named_parameters():
        if "gate" in name:
            p.data.fill_(2.0)
        elif name.startswith(("connector", "fusion")) and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5)
    picture = [ours.image_token] * ours.system.image_places
    ids, pixels = torch.tensor([[1, *picture, 2], [3, *picture, 1]]), torch.randn(2, 3, 16, 16)
    said, swapped = (ours.generate(ids, pixel_values=x, beams=6**2, max_new_tokens=3) for x in (pixels, pixels.flip(0)))
    assert not (said == swapped).all(1).any()
    texts = torch.tensor(list(product(set(range(6)) - {ours.image_token}, repeat=3)))  # all but those with a placeholder
    for row in range(2):
        whole = torch.cat([ids[row].expand(len(texts), -1), texts], 1)
        logits = ours(whole, pixel_values=pixels[row].expand(len(texts), -1, -1, -1)).logits[:, ids.shape[1] - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, texts[..., None]).sum((1, 2))
        assert torch.equal(said[row], texts[logp.argmax()])


def test_what_it_asks_for():
    ours, x = model(), inputs()
    assert torch.equal(ours.generate(**x, beams=1, max_new_tokens=5), ours.generate(**x, max_new_tokens=5))
    assert ours.generate(**x, beams=3, max_new_tokens=0).shape == (2, 0)
    with pytest.raises(ValueError, match="expected beams >= 1, got 0"):
        ours.generate(**x, beams=0)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="expected a finite repetition_penalty > 0, got 0"):
            ours.generate(**x, beams=beams, repetition_penalty=0)
    with pytest.raises(TypeError, match="temperature"):
        ours.generate(**x, beams=2, temperature=1.0)
