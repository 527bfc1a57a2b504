"""A prefix whose language model also finds pictures. Letters: B texts, M images, D width, S dimensions of the shared space."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast import spec
from mmfast.models.fusions.prefix import PrefixFusion, blocks


class RetrievalFusion(PrefixFusion):
    """FROMAGe (arXiv:2301.13823, section 3.2): the last hidden state of [RET] and a picture's pooled state, each through one affine map into a
    shared space, are compared by their cosine times ``exp(logit_scale)``. Of several layers of a text, each has a map, and these are summed.

    Keys as released, without their ``model.``: ``visual_fc``, ``text_hidden_fcs.{i}.0`` of the i-th layer, ``logit_scale`` (at first ln(1/.07)).
    """

    def __init__(self, choice: spec.Retrieval, language: nn.Module, width: int):
        """``width``: of a picture's pooled state."""
        super().__init__()
        self.visual_fc = nn.Linear(width, choice.shared)
        self.places = [layer % (len(blocks(language)) + 1) for layer in choice.layers]
        # The last state has the embeddings' width, to which a small OPT comes back from that of its blocks.
        last = language.get_input_embeddings().embedding_dim
        widths = [last if place == len(blocks(language)) else language.config.hidden_size for place in self.places]
        self.text_hidden_fcs = nn.ModuleList([nn.Sequential(nn.Linear(width, choice.shared)) for width in widths])
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def pictures(self, pooled: Tensor) -> Tensor:
        """Pooled states [M, width] -> [M, S] of length 1."""
        return F.normalize(self.visual_fc(pooled.to(self.visual_fc.weight.dtype)).float(), dim=-1)

    def read(self, model: nn.Module, input_ids: Tensor, at: tuple, **images: Tensor | None) -> tuple[Tensor, Tensor]:
        """``model.hidden`` of these, [B, T, D], and what ``texts`` takes of its places ``at``: the states of all layers there, end to end."""
        inner = {}

        def keep(_: nn.Module, args: tuple, place: int) -> None:
            inner[place] = args[0][at]

        stack = blocks(model.language)
        hooks = [stack[place].register_forward_pre_hook(partial(keep, place=place)) for place in self.places if place < len(stack)]
        try:
            hidden = model.hidden(input_ids, **images)
        finally:
            for hook in hooks:
                hook.remove()
        states = [inner[place] if place in inner else hidden[at] for place in self.places]
        return hidden, states[0] if len(states) == 1 else torch.cat(states, -1)

    def texts(self, states: Tensor) -> Tensor:
        """States of [RET], [B, D] end to end for several layers -> [B, S] of length 1."""
        maps = self.text_hidden_fcs
        parts = states.to(maps[0][0].weight.dtype).split([each[0].in_features for each in maps], -1)
        first, *more = (each(part) for each, part in zip(maps, parts, strict=True))
        return F.normalize(sum(more, first).float(), dim=-1)
