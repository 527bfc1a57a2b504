"""Kosmos' language model, transformers' class behind the interface that other causal language models have."""

import math

import torch
from torch import nn
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextForCausalLM


class KosmosLanguage(Kosmos2TextForCausalLM):
    """A sub-LN decoder (Magneto, arXiv:2210.06423) with sinusoidal positions and embeddings times the root of the width, image vectors too.

    The stock class is its own decoder and counts positions from behind the padding token's; nothing else differs, keys included.
    """

    base_model_prefix = "model"

    def get_decoder(self) -> nn.Module:
        return self.model

    @property
    def first_position(self) -> int:
        """The number that the decoder gives a text's first token."""
        return self.config.pad_token_id + 1

    def drop(self, rate: float) -> None:
        """Dropout of embeddings, of attention weights and of what each attention and each feed-forward layer adds, as in the released training.
        The stock class drops embeddings twice: each time so much that together it is once."""
        for module in self.model.modules():
            if isinstance(getattr(module, "dropout", None), int | float):
                module.dropout = rate
        self.model.dropout = 1 - math.sqrt(1 - rate)

    @torch.no_grad()
    def start_anew(self, std: float) -> None:
        """Magneto's initialisation (arXiv:2210.06423) of a decoder of N layers: Xavier, and gain sqrt(ln 2N) for values, outputs and the
        feed-forward; biases 0. Embeddings are drawn with ``std``; the padding token's is 0. (The stock class draws all from N(0, 0.02).)"""
        gain = math.sqrt(math.log(2 * self.config.layers))
        for layer in self.model.layers:
            attention, ffn = layer.self_attn, layer.ffn
            for linear in (attention.q_proj, attention.k_proj):
                nn.init.xavier_normal_(linear.weight)
            for linear in (attention.v_proj, attention.out_proj, ffn.fc1, ffn.fc2):
                nn.init.xavier_normal_(linear.weight, gain=gain)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, ffn.fc1, ffn.fc2):
                nn.init.zeros_(linear.bias)
        table = self.model.embed_tokens.weight
        nn.init.normal_(table, std=std)
        table[self.config.pad_token_id] = 0
