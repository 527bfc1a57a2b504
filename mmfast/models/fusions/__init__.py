"""How images reach the language model.

A fusion turns token ids and image vectors into the language model's last hidden states: ``fusion(language, input_ids, image_embeds,
image_token, **kwargs) -> (hidden, cache)``, and ``carry`` says what later steps of a generation need of the images. What it has to learn are
its parameters, the part ``adapter``.
"""

from mmfast.models.fusions.adapter import AdapterFusion, ByRow
from mmfast.models.fusions.gated import GatedFusion, MediaByRow
from mmfast.models.fusions.prefix import PrefixFusion, blocks, run_decoder
from mmfast.models.fusions.retrieval import RetrievalFusion
from mmfast.models.fusions.shared import SharedTokensFusion

__all__ = [
    "AdapterFusion", "ByRow", "GatedFusion", "MediaByRow", "PrefixFusion", "RetrievalFusion", "SharedTokensFusion", "blocks", "run_decoder",
]  # fmt: skip
