"""An encoder-decoder language model, T5, where a causal one is expected: BLIP-2 and InstructBLIP with FlanT5.

A row is cut before its first label: the encoder reads what stands there, pictures among it, and the decoder says the rest behind its start
token. A state stands at the position before the token that it predicts, as a causal model's does, so that losses, shifted labels, steps and
beams are the same; where the encoder reads, but for its last position, states are 0.

Letters: B rows, T tokens, E of them read, S steps of the decoder, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig

from mmfast.data.chat import IGNORE


def is_encoder_decoder(config: PretrainedConfig) -> bool:
    """Whether this is a language model of two stacks."""
    return bool(getattr(config, "is_encoder_decoder", False))


def cuts(labels: Tensor) -> Tensor:
    """Of rows with these labels [B, T], how many tokens the encoder reads [B]: those before the first label; all, where there is none; one at
    least, as a causal model predicts no first token either."""
    learnt = labels[:, 1:] != IGNORE
    return torch.where(learnt.any(1), learnt.int().argmax(1), learnt.shape[1]) + 1


def steps(labels: Tensor, cut: Tensor) -> int:
    """How many the decoder needs of them: from the start token to what tells the last label. What stands behind that is padding."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return max(int(((labels != IGNORE) * places).amax(1).sub(cut).max()), 1)


def empty_cache() -> EncoderDecoderCache:
    """For a row's first step."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def start_token(config: PretrainedConfig) -> int:
    """What the decoder's text begins with."""
    start = getattr(config, "decoder_start_token_id", None)
    return config.pad_token_id if start is None else start


def run(
    language: nn.Module, embeds: Tensor, *, cut: Tensor | None = None, most: int | None = None, attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None, past_key_values: EncoderDecoderCache | None = None, use_cache: bool = False,
) -> tuple[Tensor, EncoderDecoderCache | None]:  # fmt: skip
    """Input embeddings [B, T, D] -> (states [B, T, D] as the head reads them, cache).

    Args:
        cut: ``cuts`` of the rows; None: all is read, and the last position tells the first token that is said.
        most: ``steps`` of the rows; states behind are 0.
        attention_mask: [B, of all so far]; of what is read, padding may stand on either side.
        position_ids: not read, T5's positions are relative.
        past_key_values: one that has been filled goes on with tokens that the decoder has said.
    """
    rows, length = embeds.shape[:2]
    options = dict(past_key_values=past_key_values, use_cache=use_cache)
    if past_key_values is not None and past_key_values.get_seq_length():
        read = past_key_values.cross_attention_cache.get_seq_length()
        mask = None if attention_mask is None else attention_mask[:, :read]
        # What the encoder made is in the cache, layer by layer: of the states themselves only the number is looked at.
        states = embeds.new_zeros(rows, read, 1)
        out = language.decoder(inputs_embeds=embeds, encoder_hidden_states=states, encoder_attention_mask=mask, **options)
        return _scaled(language, out.last_hidden_state), out.past_key_values

    cut = torch.full((rows,), length, device=embeds.device) if cut is None else cut
    first, last = int(cut.min()), int(cut.max())
    mask = torch.arange(last, device=embeds.device) < cut[:, None]
    if attention_mask is not None:
        mask &= attention_mask[:, :last].bool()
    states = language.encoder(inputs_embeds=embeds[:, :last], attention_mask=mask.long()).last_hidden_state

    # Step s of row b is at position cut[b] - 1 + s; rows that are read further have fewer steps.
    most = length - first + 1 if most is None else most
    at = cut[:, None] - 1 + torch.arange(most, device=embeds.device)  # [B, S]
    real, at = at < length, at.clamp_max(length - 1)
    start = language.get_input_embeddings()(torch.full_like(at[:, :1], start_token(language.config))).to(embeds.dtype)
    said = embeds.gather(1, at[:, 1:, None].expand(-1, -1, embeds.shape[-1]))
    out = language.decoder(
        inputs_embeds=torch.cat([start, said], 1), encoder_hidden_states=states, encoder_attention_mask=mask.long(), **options
    )
    told = _scaled(language, out.last_hidden_state)
    place = torch.arange(rows, device=embeds.device)[:, None].expand_as(at)
    return told.new_zeros(rows, length, told.shape[-1]).index_put((place[real], at[real]), told[real]), out.past_key_values


def _scaled(language: nn.Module, hidden: Tensor) -> Tensor:
    """What T5's first release, whose head is its embeddings, does before it; T5 1.1 and FlanT5 do not."""
    config = language.config
    return hidden * config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", config.tie_word_embeddings) else hidden
