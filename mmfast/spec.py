"""The vocabulary recipes are written in: frozen dataclasses, nothing else.

A ``System`` is six choices (encoder, connector, fusion, language model, image plan, regions) and its training stages. An ``Alignment`` is
views and terms over a system: a view is a text scored under an image, a term a pure function of the views' log-probabilities.
A choice's kind is its class, so what a kind does not have cannot be set. ``weights`` names what a part starts from: a Hugging Face folder, a
hub name, or a GGUF file (``FOLDER/FILE.gguf``, ``package:PACKAGE/FILE.gguf`` inside an installed Python package). The sizes beside it are read
from these weights (``mmfast.models.resolved``); without weights a part is built with them.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

# The parts of a model that a stage may train.
PARTS = ("encoder", "connector", "adapter", "language", "embeddings")
Part = Literal["encoder", "connector", "adapter", "language", "embeddings"]

# ------------------------------------------------------------------------------------------ the six choices, a class a kind


@dataclass(frozen=True)
class Clip:
    """A CLIP vision tower. ``layer`` picks the hidden state that is passed on (-2: the last but one)."""

    weights: str | None = "openai/clip-vit-large-patch14"
    width: int = 1024
    depth: int = 24
    heads: int = 16
    ffn: int = 4096
    patch: int = 14
    size: int = 224
    layer: int = -2
    keep_class_token: bool = False

    @property
    def tokens(self) -> int:
        """Sequence positions that one picture takes."""
        return (self.size // self.patch) ** 2 + self.keep_class_token


@dataclass(frozen=True)
class Siglip:
    """A SigLIP vision tower (arXiv:2303.15343): no class token, every position is a patch."""

    weights: str | None = "google/siglip-base-patch16-224"
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    patch: int = 16
    size: int = 224
    layer: int = -2

    @property
    def tokens(self) -> int:
        """Sequence positions that one picture takes."""
        return (self.size // self.patch) ** 2


@dataclass(frozen=True)
class Dino:
    """A DINOv2 vision tower (arXiv:2304.07193), trained on pictures alone. Its ``ffn`` is a whole multiple of its ``width``."""

    weights: str | None = "facebook/dinov2-base"
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    patch: int = 14
    size: int = 518
    layer: int = -2
    keep_class_token: bool = False

    @property
    def tokens(self) -> int:
        """Sequence positions that one picture takes."""
        return (self.size // self.patch) ** 2 + self.keep_class_token


@dataclass(frozen=True)
class Linear:
    """One affine map from the tower's width to the language model's."""


@dataclass(frozen=True)
class Mlp:
    """``depth`` affine maps with GELU between."""

    depth: int = 2


@dataclass(frozen=True)
class Pooled:
    """One vector a picture: its class token (the tower keeps it) or the mean over patches, through ``hidden`` units with GELU."""

    hidden: int = 108
    pool: Literal["class", "mean"] = "class"


@dataclass(frozen=True)
class Prefix:
    """Image tokens take the places of the <image> placeholders in the language model's sequence."""


@dataclass(frozen=True)
class AdapterPrompts:
    """Gated prompts in the last ``layers`` layers, ``length`` each (LLaMA-Adapter, arXiv:2303.16199); a picture's vector is added to them. In
    the sequence a picture takes one place, the <image> token's own. ``gate``: what is made of the learned gate (the paper: identity)."""

    length: int = 10
    layers: int = 30
    gate: Literal["tanh", "identity"] = "tanh"


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model; ``family`` is its transformers model type."""

    family: str = "llama"
    weights: str | None = "lmsys/vicuna-7b-v1.1"
    quantize: Literal["none", "4bit"] = "none"  # 4bit: NF4 through bitsandbytes, for LoRA over frozen weights
    vocab: int = 32000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32
    ffn: int = 11008
    context: int = 2048
    tied: bool = False
    norm_eps: float = 1e-6
    init: float = 0.02


@dataclass(frozen=True)
class Fixed:
    """One square of ``size`` pixels: shorter side resized, centre cropped, values 0 .. 1 less mean over std (CLIP's by default)."""

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


# ----------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Data:
    """What a stage reads. ``name`` is a built-in set ("shapes", "easy_vqa"), or a published one, whose records the user supplies.

    ``path``: JSON, JSONL, parquet or webdataset tar files (a file, a folder or a pattern), or ``hub:NAME``. ``images``: the folder that
    picture names are relative to (default: beside the file). ``columns`` maps their names to ours, so nothing has to be converted.
    ``streaming`` reads through without an index; ``weight`` is the share of draws within a ``Mixture`` (None: as many as it has records).
    """

    name: str
    path: str | None = None
    images: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    streaming: bool = False
    frames: int = 8  # pictures that a video is read as
    weight: float | None = None
    on_bad_record: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class Mixture:
    """Several data sets in one stage. An epoch has as many items as all of them together; where weights are given, items are drawn by them."""

    name: str
    parts: tuple[Data, ...]


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule. Warm-up is linear, then the peak is held up to the share ``hold`` of all steps, then the rate falls to
    ``floor`` of the peak along half a cosine or a line, or stays. (Cosine with ``floor`` is also what MAE and LLaMA-Adapter train with.)"""

    lr: float
    steps: int | None = None
    epochs: float | None = None
    batch: int = 128  # rows a micro-batch, over all processes together
    accumulate: int = 1
    warmup: float = 0.03  # a share of all steps below 1, else steps
    hold: float = 0.0
    floor: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_of: dict[str, float] = field(default_factory=dict)  # parts that learn at another rate than ``lr``
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0  # decay of a moving average of the weights, kept and saved beside them; 0: none


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv:2106.09685) through peft. A target is the end of a module's path, in whole words: "q_proj" or "mlp.up_proj"."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    part: Literal["encoder", "language"] = "language"


@dataclass(frozen=True)
class Compute:
    """How a recipe is run; it changes speed and memory, never what is learnt (beyond the rounding of a precision)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast; weights that train stay in fp32
    parallel: Literal["ddp", "fsdp"] = "ddp"  # what torchrun's processes do: copies, or shards of weights and optimiser
    checkpointing: bool = False  # recompute activations in backward
    packing: bool = False  # rows of a micro-batch end to end without padding
    pad_to: int = 1  # otherwise rows are padded to a multiple of so many tokens: fewer shapes to prepare kernels for
    workers: int = 0  # processes that read and decode records
    bad_steps: int = 3  # steps in a row with NaN or Inf that are skipped before the run stops


@dataclass(frozen=True)
class Stage:
    """One run of the loop: which parts train, on what, with which objective.

    lm: cross-entropy of the answer tokens. words: the bag-of-words warm-up of a tower that starts from nothing (every word that is true of
    the picture must be found among the patches, by the language model's own embeddings); it stands in for CLIP's pre-training.
    """

    name: str
    train: tuple[Part, ...]
    data: Data | Mixture
    optim: Optim
    objective: Literal["lm", "words"] = "lm"
    lora: Lora | None = None  # adapters that train beside ``train``
    template: str = "vicuna_v1"
    max_length: int = 2048


@dataclass(frozen=True)
class System:
    """A multimodal model and how it is trained. ``weights``: a run folder or a Hugging Face folder that all parts start from."""

    name: str
    paper: str = ""
    weights: str | None = None
    encoder: Clip | Siglip | Dino = Clip()
    connector: Linear | Mlp | Pooled = Linear()
    fusion: Prefix | AdapterPrompts = Prefix()
    language: LanguageModel = LanguageModel()
    image: Fixed = Fixed()
    stages: tuple[Stage, ...] = ()
    compute: Compute = Compute()

    @property
    def image_places(self) -> int:
        """Positions that one picture takes in the language model's sequence."""
        return 1 if isinstance(self.fusion, AdapterPrompts) else self.encoder.tokens


# ------------------------------------------------------------------------------------------------------------- alignment


@dataclass(frozen=True)
class Pairs:
    """Preference pairs. "shapes_own": the policy's captions of fresh shapes-world scenes that hold a false claim, each against a clean
    caption. Otherwise TRL-style records in ``path`` (images, prompt, chosen, rejected; text or messages), as ``Data`` reads them.
    ``shuffled`` gives every pair another pair's rejected text: the control that keeps the texts and removes what is wrong with them."""

    name: str
    path: str | None = None
    images: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    frames: int = 8
    scenes: int = 6000
    shuffled: bool = False
    on_bad_record: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class View:
    """A text scored under an image."""

    text: Literal["chosen", "rejected"]
    image: Literal["clean"] = "clean"


PairLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm", "simpo", "cpo", "orpo",
]  # fmt: skip


@dataclass(frozen=True)
class Contrast:
    """-log sigmoid(beta (logratio(better) - logratio(worse))) over sequence log-probabilities (DPO, arXiv:2305.18290), or another pair loss
    of ``mmfast.preference_loss``."""

    better: str
    worse: str
    weight: float = 1.0
    loss_type: PairLoss = "sigmoid"
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Likelihood:
    """Negative log-probability of a view, per token."""

    view: str
    weight: float = 1.0


@dataclass(frozen=True)
class Alignment:
    """A preference method over a policy."""

    name: str
    paper: str
    policy: System
    data: Pairs
    terms: tuple[Contrast | Likelihood, ...]
    optim: Optim
    beta: float = 0.1
    views: dict[str, View] = field(default_factory=lambda: {"chosen": View("chosen"), "rejected": View("rejected")})
    train: tuple[Part, ...] = ("language", "embeddings")
    # The policy's start: its log-probabilities computed once and kept on disk, a frozen copy of it scored in every step, or the policy
    # with its adapters switched off.
    reference: Literal["cached", "frozen", "adapter_off"] = "cached"
    lora: Lora | None = None
    template: str = "vicuna_v1"
    max_length: int = 2048
    compute: Compute = Compute()


# -------------------------------------------------------------------------------------------------------- reading, naming


def nearest(name: str, known: Any) -> str:
    """`` (did you mean 'x'?)`` for an error sentence, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def to_dict(spec: Any) -> Any:
    """Plain data of a spec, for JSON; every dataclass carries its class name."""
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        return {"kind": type(spec).__name__, **{f.name: to_dict(getattr(spec, f.name)) for f in dataclasses.fields(spec)}}
    if isinstance(spec, dict):
        return {k: to_dict(v) for k, v in spec.items()}
    return [to_dict(v) for v in spec] if isinstance(spec, tuple | list) else spec
