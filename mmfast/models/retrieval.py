"""Texts in which pictures are read and found: interleaved generation, an index of pictures, the likelihood of a prompt (FROMAGe,
arXiv:2301.13823, section 3.3). Letters: M pictures, T tokens, S dimensions of the shared space.

A prompt is a list of texts and pictures, as ``mmfast.models.interleaved`` has them. A picture's places are tokens like any other, so a token's
number is its place in the sequence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast.data.chat import behind_a_word
from mmfast.models.build import MultimodalModel
from mmfast.models.generate import Reading
from mmfast.models.generate import generate as say
from mmfast.models.interleaved import Part, encode
from mmfast.models.tokenizer import plain_text

__all__ = ["Index", "answer_losses", "encode", "generate", "log_likelihood"]

Prompt = Sequence[Part]


@dataclass
class Index:
    """Pictures by name, and what ``visual_fc`` makes of each: ``embeddings`` [M, S], not of length 1."""

    names: list[str]
    embeddings: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: MultimodalModel, pictures: Iterable[tuple[Sequence[str], Tensor]]) -> Index:
        """From batches of names and pixels [B, 3, H, W]."""
        names, made = [], []
        for some, pixels in pictures:
            pooled = model.connector.pooled(model.encode(pixels))
            made.append(model.fusion.visual_fc(pooled.to(model.fusion.visual_fc.weight.dtype)).float().cpu())
            names += some
        return cls(names, torch.cat(made) if made else torch.empty(0, model.fusion.visual_fc.out_features))

    def save(self, path: str | Path) -> None:
        """Safetensors: ``embeddings``, and the names as JSON in its metadata."""
        from safetensors.torch import save_file

        save_file({"embeddings": self.embeddings.contiguous()}, path, metadata={"names": json.dumps(self.names)})

    @classmethod
    def load(cls, path: str | Path) -> Index:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                index = cls(json.loads((file.metadata() or {}).get("names", "[]")), file.get_tensor("embeddings"))
        except SafetensorError as error:
            raise ValueError(f"{path} is no index of pictures in safetensors (a pickle is not read, it can run code): {error}") from None
        if len(index.names) != len(index.embeddings):
            raise ValueError(f"{path}: {len(index.names)} names for {len(index.embeddings)} pictures")
        return index

    def scores(self, model: MultimodalModel, states: Tensor) -> Tensor:
        """Scaled cosines [.., M] of [RET]'s states [.., D], as ``model.fusion.read`` gives them, with all pictures."""
        pictures = torch.nn.functional.normalize(self.embeddings.to(states.device), dim=-1)
        return model.fusion.logit_scale.exp() * model.fusion.texts(states) @ pictures.T


@torch.no_grad()
def generate(
    model: MultimodalModel, tokenizer: Any, prompts: Prompt, index: Index | None = None, *, num_words: int = 32, ret_scale_factor: float = 1.0,
    ret_bias: float = 0.0, min_word_tokens: int = 0, temperature: float = 0.0, top_p: float = 1.0, max_num_rets: int = 1,
    max_img_per_ret: int = 1, generator: torch.Generator | None = None,
) -> list[str | list[tuple[str, float]]]:  # fmt: skip
    """What follows a prompt: texts, and after each that ends with `` [RET]`` the pictures found for it, (name, score) best first.

    As ``generate_for_images_and_texts`` of the released code, and with it: no end token stops it, words behind a line break are dropped, a
    picture is found once. Other than there: words behind the last [RET] are kept, and a [RET] that is the last token has its hidden state.

    Args:
        num_words: tokens to generate; 0: pictures for each [RET] that stands in the prompt.
        ret_scale_factor: multiplies the logit of [RET], which makes a negative one rarer; ``ret_bias`` is added to it, which never does.
        min_word_tokens: so many tokens come before the first [RET].
        max_num_rets, max_img_per_ret: how many [RET] are answered, and with how many pictures.

    Raises:
        ValueError: temperature 0 with ``top_p`` other than 1, or fewer tokens or pictures than none.
    """
    if temperature == 0 and top_p != 1:
        raise ValueError(f"generate: temperature 0 takes the likeliest token, so top_p must be 1, got {top_p}")
    if min(num_words, min_word_tokens, max_num_rets, max_img_per_ret) < 0:
        raise ValueError("generate: expected num_words, min_word_tokens, max_num_rets and max_img_per_ret of at least 0")
    ids, images = encode(model, tokenizer, prompts)
    images = {"image_embeds": model.embed_images(**images)} if images else {}
    ret, start = model.new_tokens[0], ids.shape[1] if num_words else 0

    def rule(step: int, logits: Tensor) -> Tensor:
        logits[:, ret] = logits[:, ret] * ret_scale_factor + ret_bias if step >= min_word_tokens else -torch.inf
        return logits

    new = say(
        model, ids, max_new_tokens=num_words, temperature=temperature, top_p=top_p, generator=generator, rule=rule, **images
    )  # fmt: skip
    ids = torch.cat([ids, _up_to_line_break(tokenizer, new)], 1)
    said = ids[0, start:].tolist()
    found = [start + i for i, token in enumerate(said) if token == ret][:max_num_rets]
    # The whole once more: the hidden state of the last token is not among those that generated it.
    scores = index.scores(model, model.fusion.read(model, ids, (0, found), **images)[1]) if index is not None and found else None
    out, seen, before = [], [], start
    for number, place in enumerate(found):
        out.append(_text(model, tokenizer, ids[0, before:place]) + f" {model.system.fusion.token}")
        before = place + 1
        if scores is not None:
            scores[:, seen] = -torch.inf
            count = min(max_img_per_ret, len(index.names) - len(seen))
            best = scores[number].topk(count)
            seen += best.indices.tolist()
            out.append([(index.names[i], score) for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)])
    rest = _text(model, tokenizer, ids[0, before:])
    return out if out and not rest else [*out, rest]


def _up_to_line_break(tokenizer: Any, ids: Tensor) -> Tensor:
    line_break = behind_a_word(tokenizer, "\n")
    at = (ids[0] == line_break[0]).nonzero() if line_break else ids.new_empty(0)
    return ids[:, : int(at[0])] if len(at) else ids


def _text(model: MultimodalModel, tokenizer: Any, ids: Tensor) -> str:
    # The beginning token of OPT is its end token, at which a text would stop.
    kept = [i for i in ids.tolist() if i not in (tokenizer.bos_token_id, model.image_token)]
    return plain_text(tokenizer, kept).strip()


@torch.no_grad()
def log_likelihood(model: MultimodalModel, tokenizer: Any, prompts: Prompt, *, begin_each: bool = False) -> float:
    """Mean log-probability of a prompt's text tokens; the first token of all has none."""
    ids, images = encode(model, tokenizer, prompts, begin_each=begin_each)
    return -model(ids, labels=ids.masked_fill(ids == model.image_token, -100), **images).loss.item()


@torch.no_grad()
def answer_losses(
    model: MultimodalModel, prompt: Tensor, answers: Sequence[Sequence[int]], *, batch: int = 20, **images: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, summed over its tokens, of each of C answers behind a prompt ``[1, T]``, which is read once: two tensors ``[C]``.

    The first scores each token by what stands before it. The second as FROMAGe's released script for VisDial does, which does not shift its
    labels: each token by the logits at its own place, where it has just been read. Its published figures are those of the second.

    Args:
        answers: token ids; theirs begin with a beginning token, which is scored too.
        batch: answers that are read together. images: as for ``model.hidden``.
    """
    if not answers or not all(answers):
        raise ValueError("answer_losses: expected at least one answer, each of at least one token")
    read, losses = Reading(model, prompt, **images), []
    for first in range(0, len(answers), batch):
        some, reading = answers[first : first + batch], copy(read)
        reading.spread(len(some))
        longest = max(map(len, some))
        ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in some], device=prompt.device)
        scored = torch.arange(longest, device=ids.device) < torch.tensor([len(ids) for ids in some], device=ids.device)[:, None]
        logps = torch.cat([reading.any_logits[:, None], reading.logits_of(ids)], 1).log_softmax(-1)
        told = torch.stack([by.gather(-1, ids[..., None])[..., 0] for by in (logps[:, :-1], logps[:, 1:])])
        losses.append(-(told * scored).sum(-1))
    return tuple(torch.cat(losses, 1))
