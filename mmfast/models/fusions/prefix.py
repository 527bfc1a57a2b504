"""Image vectors in the language model's sequence. Letters: B batch, T tokens, M images, N vectors an image, D width."""

import torch
from torch import Tensor, nn

from mmfast.models import encoder_decoder


def blocks(language: nn.Module) -> nn.ModuleList:
    """A language model's layers, whatever its family calls them; an encoder's first."""
    stacks = [language.get_encoder()] if encoder_decoder.is_encoder_decoder(language.config) else []
    found = [next(m for m in stack.modules() if isinstance(m, nn.ModuleList)) for stack in (*stacks, language.get_decoder())]
    return found[0] if len(found) == 1 else nn.ModuleList([layer for stack in found for layer in stack])


def run_decoder(language: nn.Module, embeds: Tensor, **kwargs) -> tuple[Tensor, object]:
    """The language model without its head on input embeddings: last hidden states in the head's type, and the key/value cache. Embeddings (and a
    head that is tied to them) learn in fp32 over layers that may be held in half precision. ``position_ids`` count from 0, whatever the family
    does."""
    if "position_ids" in kwargs and (first := getattr(language, "first_position", 0)):
        kwargs["position_ids"] = kwargs["position_ids"] + first
    for half in {p.dtype for p in blocks(language)[0].parameters()} & {torch.bfloat16, torch.float16}:
        embeds = embeds.to(half)
    if encoder_decoder.is_encoder_decoder(language.config):
        hidden, cache = encoder_decoder.run(language, embeds, **kwargs)
    else:
        out = language.get_decoder()(inputs_embeds=embeds, **kwargs)
        hidden, cache = out.last_hidden_state, out.past_key_values
    head = language.get_output_embeddings().weight
    return hidden.to(head.dtype) if head.is_floating_point() else hidden, cache


def starts(position_ids: Tensor) -> Tensor | None:
    """Where sequences start among all positions ``[B T]``, and their number last; None where rows hold one each."""
    first = position_ids == 0
    first[:, 0] = True
    at = first.flatten().nonzero().flatten()
    return None if len(at) == len(position_ids) else torch.cat([at, at.new_tensor([first.numel()])]).int()


def slots(input_ids: Tensor, images: Tensor, image_token: int) -> Tensor:
    """Which of ``input_ids [B, T]`` are placeholders: as many as ``images [M, N, ..]`` have tokens, or ``ValueError``."""
    slots = input_ids == image_token
    found, given = int(slots.sum()), images.shape[0] * images.shape[1]
    if found != given:
        raise ValueError(
            f"the batch has {found} image placeholders, but its {images.shape[0]} images have {given} tokens ({images.shape[1]} each)"
        )
    return slots


class PrefixFusion(nn.Module):
    """The i-th placeholder of the batch, read row by row, becomes the i-th image vector; then the language model runs as always."""

    def forward(
        self, language: nn.Module, input_ids: Tensor, image_embeds: Tensor | None, image_token: int, **kwargs
    ) -> tuple[Tensor, object]:
        """input_ids [B, T], image_embeds [M, N, D] or None -> (hidden [B, T, D], key/value cache or None).

        ``kwargs`` go to the language model: attention_mask, position_ids, past_key_values, use_cache, an encoder-decoder's cut and most.
        """
        embed = language.get_input_embeddings()
        if image_embeds is None:
            embeds = embed(input_ids)
        else:
            at = slots(input_ids, image_embeds, image_token)
            embeds = embed(input_ids.masked_fill(at, 0))  # the placeholder need not be a token
            embeds = embeds.masked_scatter(at[..., None], image_embeds.to(embeds.dtype))
        return run_decoder(language, embeds, **kwargs)

    def carry(self, input_ids: Tensor, image_embeds: Tensor | None, image_token: int) -> None:
        """What steps after this one need of the images: nothing, they are in the key/value cache."""
