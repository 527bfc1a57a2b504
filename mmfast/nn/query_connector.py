"""BLIP-2's connector: a norm over the tower's states, learned queries that read them, and the projection behind.

Source: BLIP-2 (arXiv:2301.12597, section 3). Letters: M images, N states an image, W the tower's width, n queries, D the Q-Former's width, B
texts, S text tokens, P the width of the space that pictures and texts share, V words.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.nn.qformer import QFormer, QFormerCache


class Read(NamedTuple):
    """A picture as the queries read it: queries ``[M, n, D]``, and the keys and values that text may follow."""

    queries: Tensor
    cache: QFormerCache


class QueryConnector(nn.Module):
    """States ``[M, N, W]`` -> what a language model sees, ``[M, n, width_out]``.

    With ``vocab`` the Q-Former has words. ``instructed``: ``forward`` wants a question beside every picture, in these words. ``compares``: what
    compares pictures with texts stands beside it (pre-training's first stage):

    - contrast: ``similarity(images(read(x)), texts(ids, mask))``, x ``normed(states)``; two passes that do not see each other;
    - matching: ``match(x, ids, mask)``, queries and text in one pass, both ways;
    - captioning: ``continued(read(x).cache, ids, mask)``, text behind the cached queries, which do not see it.

    Keys: ``ln_vision``, ``query_tokens`` [1, n, D], ``qformer`` (``mmfast.nn.QFormer``), ``projection``, and where it compares ``vision_proj``,
    ``text_proj``, ``itm_head``, ``temp``, ``cls.{transform,norm}``, ``cls_bias``: BERT's masked-word head, whose last map is the table of words.

    Args:
        vocab: words of the Q-Former; None: it reads no text.
        norm_eps: of ``ln_vision``: 1e-6 in transformers' classes, 1e-5 in LAVIS.
        init: standard deviation of the queries and of the Q-Former's maps at the start; BERT's 0.02 is made for its width.
    """

    def __init__(
        self, width_in: int, width_out: int, *, tokens: int = 32, width: int = 768, depth: int = 12, heads: int = 12, ffn: int = 3072,
        every: int = 2, vocab: int | None = None, compares: bool = True, instructed: bool = False, positions: int = 512, shared: int = 256,
        dropout: float = 0.1, norm_eps: float = 1e-6, init: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        self.compares, self.instructed = compares and vocab is not None, instructed
        self.ln_vision = nn.LayerNorm(width_in, eps=norm_eps)
        self.query_tokens = nn.Parameter(torch.empty(1, tokens, width).normal_(std=init))
        self.qformer = QFormer(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=ffn, encoder_hidden_size=width_in,
            cross_attention_frequency=every, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            use_qformer_text_input=vocab is not None, vocab_size=vocab, max_position_embeddings=positions, initializer_range=init,
        )  # fmt: skip
        self.projection = nn.Linear(width, width_out)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)
        if self.compares:
            self.vision_proj, self.text_proj = nn.Linear(width, shared), nn.Linear(width, shared)
            self.itm_head = nn.Linear(width, 2)
            self.temp = nn.Parameter(torch.tensor([0.07]))  # FSDP2 knows no scalars
            self.cls = nn.ModuleDict({"transform": nn.Linear(width, width), "norm": nn.LayerNorm(width, eps=1e-12)})
            self.cls_bias = nn.Parameter(torch.zeros(vocab))
        if vocab is not None:
            for layer in self.qformer.encoder["layer"]:  # the queries' feed-forward starts as the text's
                layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
                layer.output_query.load_state_dict(layer.output.state_dict())

    @property
    def reads_text(self) -> bool:
        return self.qformer.embeddings is not None

    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``ids``, ``mask`` [M, S]: a question that the queries read beside each picture, both ways."""
        if self.instructed and ids is None:
            raise ValueError(
                "the Q-Former reads a question beside each picture, and none came: give qformer_input_ids (connector.instructed)"
            )
        return self.projection(self.qformer(self.query_tokens, self.normed(states), text=ids, text_mask=mask).queries)

    def normed(self, states: Tensor) -> Tensor:
        """``ln_vision``, in fp32 whatever the tower was computed in; every pass below reads what it gives."""
        with torch.autocast(states.device.type, enabled=False):
            return self.ln_vision(states.to(self.ln_vision.weight.dtype))

    def read(self, image: Tensor) -> Read:
        """The queries alone over normed states [M, N, W]."""
        queries, _, cache = self.qformer(self.query_tokens, image)
        return Read(queries, cache)

    def unread(self, *, compared: bool) -> Iterator[nn.Parameter]:
        """Parameters out of reach for any gradient: the projection where pictures are ``compared`` with texts; where a language model reads the
        queries, the heads and all that text passes, of a question what its last layer makes of it."""
        if compared:
            yield from self.projection.parameters()
            return
        parts = [self.vision_proj, self.text_proj, self.itm_head, self.cls] if self.compares else []
        if self.reads_text:
            embeddings, layers = self.qformer.embeddings, self.qformer.encoder["layer"]
            parts += [] if self.instructed else [embeddings["word_embeddings"], embeddings["position_embeddings"]]
            for layer in layers[-1:] if self.instructed else layers:
                parts += [layer.intermediate, layer.output]
        for part in parts:
            yield from part.parameters()
        if self.compares:
            yield from (self.temp, self.cls_bias)

    # -- beside text

    def images(self, read: Read) -> Tensor:
        """Unit vectors of every query, [M, n, P]."""
        return F.normalize(self.vision_proj(read.queries), dim=-1)

    def texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors of texts alone, read at their first token: ids and mask [B, S] -> [B, P]."""
        return F.normalize(self.text_proj(self.qformer(text=ids, text_mask=mask).text[:, 0]), dim=-1)

    def match(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, 2], "no" and "yes", of normed states [B, N, W] and texts [B, S] belonging together: the mean over queries."""
        return self.itm_head(self.qformer(self.query_tokens, image, text=ids, text_mask=mask).queries).mean(1)

    def continued(self, cache: QFormerCache, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, QFormerCache]:
        """Logits [B, S, V] of the word after each of ``ids`` [B, S], which follow what the cache holds, and the cache with them; ``mask``
        covers cached text too."""
        out = self.qformer(text=ids, text_mask=mask, cache=cache, mask_mode="multimodal_causal")
        hidden = self.cls["norm"](F.gelu(self.cls["transform"](out.text)))
        return F.linear(hidden, self.qformer.embeddings["word_embeddings"].weight, self.cls_bias), out.cache


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Unit vectors [M, n, P] of pictures and [B, P] of texts -> [M, B]: the cosine of the query that is closest."""
    return torch.einsum("mnp,bp->mbn", images, texts).amax(-1)
