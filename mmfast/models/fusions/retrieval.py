"""A prefix whose language model also finds pictures. Letters: B texts, M images, D width, S dimensions of the shared space."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast import spec
from mmfast.models.fusions.prefix import PrefixFusion


class RetrievalFusion(PrefixFusion):
    """FROMAGe (arXiv:2301.13823, section 3.2): the last hidden state of [RET] and a picture's pooled state, each through one affine map into a
    shared space, are compared by their cosine times ``exp(logit_scale)``.

    Keys as released, without their ``model.``: ``visual_fc``, ``text_hidden_fcs.0.0``, ``logit_scale`` (at first ln(1/.07)).
    """

    def __init__(self, choice: spec.Retrieval, language: nn.Module, width: int):
        """``width``: of a picture's pooled state."""
        super().__init__()
        self.visual_fc = nn.Linear(width, choice.shared)
        self.text_hidden_fcs = nn.ModuleList([nn.Sequential(nn.Linear(language.get_input_embeddings().embedding_dim, choice.shared))])
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def pictures(self, pooled: Tensor) -> Tensor:
        """Pooled states [M, width] -> [M, S] of length 1."""
        return F.normalize(self.visual_fc(pooled.to(self.visual_fc.weight.dtype)).float(), dim=-1)

    def texts(self, hidden: Tensor) -> Tensor:
        """Last hidden states of [RET], [B, D] -> [B, S] of length 1."""
        first = self.text_hidden_fcs[0]
        return F.normalize(first(hidden.to(first[0].weight.dtype)).float(), dim=-1)
