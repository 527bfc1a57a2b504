"""Raven's matrices and a rationale before an answer, against the same prompts written out one by one."""

from dataclasses import replace

import pytest
import torch
from mmfast.trainers.config import load_recipe

from mmfast.models import build, tiny
from mmfast.models.interleaved import encode, write
from mmfast.models.reasoning import explained, raven
from mmfast.models.tokenizer import word_tokenizer

WORDS = (
    "<pad>", "<bos>", "<eos>", "<unk>", "<image>", "Here", "are", "2", "images", ":", "The", "following", "image", "is", "Is", "it", "correct", "?",
    "Yes", "Introduce", "this", "picture", "in", "detail", "what",
)  # fmt: skip


@pytest.fixture(scope="module", params=["kosmos_1", "blip2", "flamingo"])
def made(request):
    system = tiny(load_recipe(request.param))
    system = replace(system, language=replace(system.language, init=0.4))
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, system.added_tokens)
    model = build(system, tokenizer=tokenizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):  # closed at the start
                parameter.fill_(0.5)
    return model, tokenizer


def pictures(count):
    return list(torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(3)))


def test_each_candidate_of_a_matrix_is_asked_about_by_itself(made):
    model, tokenizer = made
    *matrix, a, b, c = pictures(5)
    logps = raven(model, tokenizer, matrix, [a, b, c])
    yes = tokenizer.convert_tokens_to_ids("Yes")
    for candidate, logp in zip((a, b, c), logps, strict=True):
        ids, given = encode(model, tokenizer, ["Here are 2 images:", *matrix, "The following image is:", candidate, "Is it correct?"])
        with torch.no_grad():
            want = model(ids, **given).logits[0, -1].log_softmax(-1)[yes]
        torch.testing.assert_close(logp, want, rtol=1e-4, atol=1e-5)
    assert len(set(logps.tolist())) == 3
    two = raven(model, tokenizer, matrix, [a], answer="Yes Yes")
    assert two < logps[:1], "an answer of two tokens is less likely than its first"


def test_what_cannot_be_asked(made):
    for candidates, answer in (([], " Yes"), (pictures(1), "")):
        with pytest.raises(ValueError, match="raven: expected at least one candidate and an answer of a token or more"):
            raven(*made, pictures(2), candidates, answer=answer)


def test_a_rationale_stands_before_the_question(made):
    model, tokenizer = made
    (picture,), options = pictures(1), dict(max_new_tokens=4, end=-1)
    why, answer = explained(model, tokenizer, [picture], "what is it?", **options)
    first = "Introduce this picture in detail:"
    assert why == write(model, tokenizer, [picture, first], **options)
    assert why
    assert answer == write(model, tokenizer, [picture, f"{first} {why}", "what is it?"], **options)
