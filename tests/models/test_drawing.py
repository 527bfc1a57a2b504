"""Pictures written by a language model: exactly N codes between begin and end, the guidance's formula, pixels as the decoder has them."""

from dataclasses import replace

import pytest
import torch
from mmfast.trainers.config import load_recipe

from mmfast.models import build, interleaved, tiny
from mmfast.models.drawing import Guidance, draw, draw_codes, may_follow, pixels, write
from mmfast.models.tokenizer import word_tokenizer

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a", "red", "circle", "blue")
N = 16


@pytest.fixture(scope="module")
def model():
    system = tiny(load_recipe("chameleon"))
    system = replace(
        system,
        encoder=replace(system.encoder, codes=12, multipliers=(1, 1, 2, 4, 4)),
        language=replace(system.language, context=64, init=0.4),
    )
    torch.manual_seed(0)
    made = build(system, tokenizer=word_tokenizer(WORDS, system.added_tokens)).eval()
    with torch.no_grad():
        for block in made.blocks:  # sharp enough for prompts to matter
            block.self_attn.q_norm.weight.fill_(2.0)
    return made


def ids_of(model, *names):
    words = {**{w: i for i, w in enumerate(WORDS)}, "begin": model.new_tokens[0], "end": model.new_tokens[1]}
    return [words[n] for n in names]


def test_which_tokens_may_follow(model):
    begin, end, *codes = model.new_tokens
    vocab = model.language.lm_head.weight.shape[0]

    def named(ids, **options):
        return set(may_follow(model, torch.tensor(ids), **{"room": 40, **options}).nonzero().flatten().tolist())

    text = set(range(vocab)) - {end, *codes, model.image_token}
    assert named([1, 5]) == text
    assert named([1, 5], room=N + 1) == named([1, 5], pictures=False) == text - {begin}
    assert named([1, 5], room=N + 2) == text
    for drawn in (0, 1, N - 1):
        assert named([1, begin, *codes[:1] * drawn]) == set(codes)
    assert named([1, begin, *codes[:1] * N]) == {end}
    assert named([1, begin, *codes[:1] * N, end]) == text
    assert named([1, begin, *codes[:1] * N, end, 5, begin]) == set(codes)


def logits_of(model, rows):
    """Of the next code, for prompts alone, without cache and padding."""
    with torch.no_grad():
        hidden = torch.cat([model.hidden(torch.tensor([row]))[:, -1] for row in rows])
        return model.language.lm_head(hidden)[:, model.encoder.words]


def test_guidance_is_its_formula(model):
    """Greedy drawing against a loop over whole sequences: u nothing but <bos> and begin, i the prompt's picture as well."""
    begin, end, *codes = model.new_tokens
    picture = [begin, *[codes[k % 12] for k in range(3, 3 + N)], end]
    prompts = [[1, 6, *picture, 8, 7], [1, 8, *picture, 5, 5, 6]]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    guidance = Guidance(image=1.2, text=3.0)
    got = draw_codes(model, padded, attention_mask=mask, guidance=guidance, temperature=0.0)
    assert got.shape == (2, N)
    for row, prompt in zip(got.tolist(), prompts, strict=True):
        whole, seen, free = [*prompt, begin], [1, *picture, begin], [1, begin]
        drawn = []
        for _ in range(N):
            f, i, u = logits_of(model, [[*rows, *drawn] for rows in (whole, seen, free)])
            k = int((u + 1.2 * (i - u) + 3.0 * (f - i)).argmax())
            assert k == row[len(drawn)]
            drawn.append(codes[k])
    assert len(set(got.flatten().tolist())) > 3, "one code everywhere proves nothing"
    alone = draw_codes(model, padded, attention_mask=mask, guidance=None, temperature=0.0)
    assert torch.equal(alone, draw_codes(model, padded, attention_mask=mask, guidance=Guidance(1.0, 1.0), temperature=0.0))
    assert not torch.equal(alone, got)


def test_a_prompt_may_show_pictures(model):
    shown = torch.rand(1, 3, 64, 64) * 2 - 1
    places = torch.tensor([[1, 5, model.new_tokens[0], *[model.image_token] * N, model.new_tokens[1], 6]])
    spelt = places.clone()
    spelt[places == model.image_token] = model.encode(shown).flatten()
    assert torch.equal(draw_codes(model, places, pixel_values=shown, temperature=0.0), draw_codes(model, spelt, temperature=0.0))


def test_pixels_are_the_decoders(model):
    codes = torch.randint(0, 12, (2, N))
    got = pixels(model, codes)
    values = model.encoder.vision.draw(codes)
    assert (got.dtype, got.shape) == (torch.uint8, (2, 64, 64, 3))
    assert ((got.permute(0, 3, 1, 2) / 127.5 - 1) - values).abs().max() <= 0.5 / 127.5 + 1e-6
    assert torch.equal(pixels(model, codes[:, :5]), pixels(model, torch.cat([codes[:, :5], codes[:, :1].expand(-1, N - 5)], 1)))
    generator = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    one, same, other = (draw(model, torch.tensor([[1, 6]]), generator=g, top_p=1.0, temperature=1.0) for g in generator)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_writing_keeps_to_the_rule(model):
    """Whatever is drawn at random: text, then pictures of N codes, never in the way of the context, never without leave."""
    begin = model.new_tokens[0]
    pictures = 0
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        pieces = list(write(model, torch.tensor([[1, 6]]), end=None, max_new_tokens=60, temperature=2.0, top_p=1.0, generator=g))
        size = 2
        for kind, said in pieces:
            assert kind != "picture" or len(said) == N
            pictures += kind == "picture"
            size += len(said) + 2 * (kind == "picture")
            if kind == "text":
                assert not set(said) & {*model.new_tokens, model.image_token}
        assert size <= 62
        assert size > 62 - N - 2 or pieces[-1][0] == "text"
    assert pictures > 0, "no picture was begun, nothing was tried"
    g = torch.Generator().manual_seed(0)
    alone = list(write(model, torch.tensor([[1, 6]]), pictures=False, max_new_tokens=60, temperature=2.0, top_p=1.0, generator=g))
    assert [kind for kind, _ in alone] == ["text"]
    assert begin not in alone[0][1]


def test_text_alone_ends_where_a_picture_would_begin(model, monkeypatch):
    """Greedy and of beams, with the beginning of a picture told as the text's end; unasked it is a token like any other."""
    begin, ids = model.new_tokens[0], torch.tensor([[1, 5]])
    said = model.generate(ids, end=2, max_new_tokens=6)[0].tolist()
    bias = torch.zeros(model.language.lm_head.weight.shape[0])
    bias[begin] = 50.0
    head = model.language.lm_head
    monkeypatch.setitem(head._parameters, "bias", torch.nn.Parameter(bias))
    assert model.generate(ids, end=2, max_new_tokens=3).tolist() == [[begin] * 3]
    assert model.stops == (begin,)
    for beams in (1, 3):
        assert model.generate(ids, beams=beams, end=2, stops=model.stops, max_new_tokens=3).tolist() == [[2]]
    tokenizer = word_tokenizer(WORDS, model.system.added_tokens)
    assert interleaved.write(model, tokenizer, ["a"], max_new_tokens=3) == ""
    monkeypatch.setitem(head._parameters, "bias", None)
    assert begin not in said
    assert model.generate(ids, end=2, stops=model.stops, max_new_tokens=6)[0].tolist() == said
    with pytest.raises(ValueError, match="stops are told as the token end"):
        model.generate(ids, stops=model.stops)


def test_what_cannot_be_drawn_is_told(model):
    with pytest.raises(ValueError, match="a prompt of 50 tokens leaves no room for 18 within the context of 64"):
        draw(model, torch.ones(1, 50, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected one prompt \[1, T\], got \[2, 3\]"):
        list(write(model, torch.ones(2, 3, dtype=torch.long)))
    other = build(tiny(load_recipe("llava")), tokenizer=word_tokenizer(WORDS))
    with pytest.raises(ValueError, match="llava: only a model of shared tokens draws, and its fusion is Prefix"):
        draw(other, torch.ones(1, 3, dtype=torch.long))
