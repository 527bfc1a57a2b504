"""The Q-Former: learned queries that read an image, with or without text beside them.

Sources: BLIP-2 (arXiv:2301.12597, section 3.1, figure 2), InstructBLIP (arXiv:2305.06500, section 2.3). State-dict keys of transformers'
``Blip2QFormerModel`` and ``InstructBlipQFormerModel``. Letters: B batch, n queries, S text tokens, N image tokens, D width, E width of the image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmfast.ops import cross_attention, qformer_attention


class QFormerCache(NamedTuple):
    """Keys and values of every layer's self-attention, ``[B, n + text so far, H, D / H]`` each, queries first."""

    num_queries: int
    layers: tuple[tuple[Tensor, Tensor], ...]


class QFormerOutput(NamedTuple):
    """queries ``[B, n, D]`` and text ``[B, S, D]`` (None if there was none); cache None if the queries saw text."""

    queries: Tensor | None
    text: Tensor | None
    cache: QFormerCache | None


class QFormer(nn.Module):
    """A BERT whose first positions are learned queries; in every ``cross_attention_frequency``-th layer the queries read the image.

    A layer, post-norm: self-attention of ``[queries; text]`` under ``mask_mode``; the queries' cross-attention (layers 0, 2, ..); one
    feed-forward for the queries and another for the text. Biases everywhere, exact GELU, LayerNorm eps 1e-12, dropout on the embeddings, on
    the attention weights and on every sub-layer's output. Queries get no positions; text positions start at 0.

    The passes of BLIP-2's pre-training:

    - contrastive: ``qformer(queries, image)`` and ``qformer(text=text)``, or both at once with ``mask_mode="unimodal"``;
    - matching, and InstructBLIP: ``qformer(queries, image, text=text)``;
    - captioning: ``out = qformer(queries, image)``, then ``qformer(text=text, cache=out.cache, mask_mode="multimodal_causal")``, all text
      at once in training or piece by piece in generation, each call with the cache of the last; or both at once.

    Differences: the masks are computed, not read, so there is no ``attention_mask`` of arbitrary shape and no returned attention weights;
    transformers has the bidirectional mask alone and no cache. The language-model head, the projections and the query tokens are the caller's.

    Args:
        hidden_size: D. Named as in transformers' configs, like the other arguments.
        encoder_hidden_size: E.
        use_qformer_text_input: text may be given; adds the text's feed-forward.
        vocab_size: None: text comes as embeddings (word + position), as with ``Blip2QFormerModel`` (key ``layernorm``). A number: text
            comes as ids, as with ``InstructBlipQFormerModel`` (keys ``embeddings.*``).

    forward:
        query_embeds: ``[B, n, D]`` or ``[1, n, D]``; None: text alone, or after a cache.
        image: ``[B, N, E]``; needed with query_embeds.
        text: ids ``[B, S]``, or embeddings ``[B, S, D]`` if there is no vocabulary.
        text_mask: ``[B, S]`` nonzero where real, any padding side; or text_lens ``[B]``: leading positions that are real. With a cache they
            cover the cached text too.
        image_lens: ``[B]``, leading image tokens that are real.
        mask_mode: "bidirectional", "unimodal" or "multimodal_causal", see ``mmfast.qformer_attention``.

    Returns:
        ``QFormerOutput``.

    Raises:
        ValueError: inputs that do not belong together; one sentence says which.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        encoder_hidden_size: int = 1408,
        cross_attention_frequency: int = 2,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-12,
        use_qformer_text_input: bool = True,
        vocab_size: int | None = None,
        max_position_embeddings: int = 512,
        pad_token_id: int = 0,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(f"QFormer: hidden_size {hidden_size} is no multiple of num_attention_heads {num_attention_heads}")
        if vocab_size is not None and not use_qformer_text_input:
            raise ValueError("QFormer: a vocabulary without text input; set use_qformer_text_input=True or vocab_size=None")
        self.use_qformer_text_input = use_qformer_text_input
        self.embeddings, self.layernorm = None, None
        if vocab_size is None:
            self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        else:
            self.embeddings = nn.ModuleDict(
                {
                    "word_embeddings": nn.Embedding(vocab_size, hidden_size, padding_idx=pad_token_id),
                    "position_embeddings": nn.Embedding(max_position_embeddings, hidden_size),
                    "layernorm": nn.LayerNorm(hidden_size, eps=layer_norm_eps),
                }
            )
        self.dropout = nn.Dropout(hidden_dropout_prob)
        layers = [
            QFormerLayer(
                hidden_size, num_attention_heads, intermediate_size, encoder_hidden_size if i % cross_attention_frequency == 0 else None,
                use_qformer_text_input, hidden_dropout_prob, attention_probs_dropout_prob, layer_norm_eps,
            )
            for i in range(num_hidden_layers)
        ]  # fmt: skip
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])

    def forward(
        self,
        query_embeds: Tensor | None = None,
        image: Tensor | None = None,
        *,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        text_lens: Tensor | None = None,
        image_lens: Tensor | None = None,
        mask_mode: str = "bidirectional",
        cache: QFormerCache | None = None,
    ) -> QFormerOutput:
        self._check(query_embeds, image, text, mask_mode, cache)
        new_queries = query_embeds.shape[1] if query_embeds is not None else 0
        num_queries = cache.num_queries if cache is not None else new_queries
        if query_embeds is not None:  # one set of queries serves a batch of images
            query_embeds = query_embeds.expand(len(image), -1, -1)
        hidden = self._embed(query_embeds, text, cache.layers[0][0].shape[1] - num_queries if cache is not None else 0)
        attend = {"num_queries": num_queries, "mask_mode": mask_mode, "text_mask": text_mask, "text_lens": text_lens}
        kept = []
        for i, layer in enumerate(self.encoder["layer"]):
            hidden, keys_values = layer(hidden, new_queries, image, image_lens, attend, cache.layers[i] if cache is not None else None)
            kept.append(keys_values)
        alone = text is None or mask_mode == "multimodal_causal"  # the queries saw no text, so more text may follow
        return QFormerOutput(
            hidden[:, :new_queries] if query_embeds is not None else None,
            hidden[:, new_queries:] if text is not None else None,
            QFormerCache(num_queries, tuple(kept)) if alone and num_queries else None,
        )

    def _check(self, query_embeds, image, text, mask_mode, cache) -> None:
        if query_embeds is None and text is None:
            raise ValueError("QFormer: give query_embeds, text, or both")
        if query_embeds is not None:
            if image is None:
                raise ValueError("QFormer: queries read an image; give image with query_embeds")
            if len(query_embeds) not in (1, len(image)):
                raise ValueError(f"QFormer: {len(query_embeds)} sets of queries for {len(image)} images; give 1 or as many")
            if text is not None and len(text) != len(image):
                raise ValueError(f"QFormer: {len(text)} texts for {len(image)} images")
        if text is not None and not self.use_qformer_text_input:
            raise ValueError("QFormer: this one was built without text input (use_qformer_text_input=False)")
        expected = ("ids [B, S]", 2) if self.embeddings is not None else ("embeddings [B, S, D]; this one has no vocabulary", 3)
        if text is not None and text.dim() != expected[1]:
            raise ValueError(f"QFormer: expected text as {expected[0]}, got {list(text.shape)}")
        if cache is not None and (query_embeds is not None or mask_mode != "multimodal_causal"):
            raise ValueError('QFormer: after a cache comes text alone, with mask_mode="multimodal_causal"')

    def _embed(self, query_embeds: Tensor | None, text: Tensor | None, position: int) -> Tensor:
        parts = []
        if query_embeds is not None:
            parts.append(query_embeds)
        norm = self.layernorm
        if self.embeddings is not None:
            norm = self.embeddings["layernorm"]
            if text is not None:
                table = self.embeddings["position_embeddings"].weight
                if position + text.shape[1] > len(table):
                    raise ValueError(f"QFormer: {position + text.shape[1]} text positions, there are embeddings for {len(table)}")
                text = self.embeddings["word_embeddings"](text) + table[position : position + text.shape[1]]
        if text is not None:
            parts.append(text)
        hidden = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return self.dropout(norm(hidden.to(norm.weight.dtype)))


class QFormerLayer(nn.Module):
    """One layer of the Q-Former; ``cross_width`` None: without cross-attention."""

    def __init__(
        self, width: int, heads: int, inner: int, cross_width: int | None, text: bool, dropout: float, attention_dropout: float, eps: float
    ):
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.attention = _attention(width, width, dropout, eps)
        self.crossattention = _attention(width, cross_width, dropout, eps) if cross_width is not None else None
        self.intermediate_query, self.output_query = nn.ModuleDict({"dense": nn.Linear(width, inner)}), _Output(inner, width, dropout, eps)
        if text:
            self.intermediate, self.output = nn.ModuleDict({"dense": nn.Linear(width, inner)}), _Output(inner, width, dropout, eps)

    def forward(self, hidden: Tensor, new_queries: int, image: Tensor | None, image_lens: Tensor | None, attend: dict, past):
        """hidden ``[B, new_queries + S, D]`` -> the same, and the self-attention's keys and values with the past's before them."""
        dropout_p = self.attention_dropout if self.training else 0.0
        q, k, v = self._project(self.attention, hidden, hidden)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        hidden = self.attention["output"](qformer_attention(q, k, v, dropout_p=dropout_p, **attend).flatten(-2), hidden)
        parts = []
        if new_queries:
            queries = hidden[:, :new_queries]
            if self.crossattention is not None:
                context = cross_attention(
                    *self._project(self.crossattention, queries, image.to(hidden.dtype)), key_lens=image_lens, dropout_p=dropout_p
                )
                queries = self.crossattention["output"](context.flatten(-2), queries)
            parts.append(self.output_query(nn.functional.gelu(self.intermediate_query["dense"](queries)), queries))
        if hidden.shape[1] > new_queries:
            text = hidden[:, new_queries:]
            parts.append(self.output(nn.functional.gelu(self.intermediate["dense"](text)), text))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0], (k, v)

    def _project(self, attention: nn.ModuleDict, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = attention["attention"]
        return tuple(maps[name](x).unflatten(-1, (self.heads, -1)) for name, x in (("query", rows), ("key", keys), ("value", keys)))


class _Output(nn.Module):
    """``LayerNorm(residual + dropout(dense(x)))``. Keys: ``dense``, ``LayerNorm``."""

    def __init__(self, width_in: int, width: int, dropout: float, eps: float):
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


def _attention(width: int, key_width: int, dropout: float, eps: float) -> nn.ModuleDict:
    """Keys: ``attention.{query,key,value}``, ``output.{dense,LayerNorm}``."""
    maps = {"query": nn.Linear(width, width), "key": nn.Linear(key_width, width), "value": nn.Linear(key_width, width)}
    return nn.ModuleDict({"attention": nn.ModuleDict(maps), "output": _Output(width, width, dropout, eps)})
