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
from typing import Any, ClassVar, Literal

# The parts of a model that a stage may train.
# "last_block": of a tower the last block that is read, and the norm behind it. "queries": of a Q-Former what compares pictures with texts;
# "connector": what the language model reads pictures through.
PARTS = ("encoder", "last_block", "connector", "queries", "adapter", "language", "embeddings", "new_tokens")
Part = Literal["encoder", "last_block", "connector", "queries", "adapter", "language", "embeddings", "new_tokens"]

# ------------------------------------------------------------------------------------------ the six choices, a class a kind


@dataclass(frozen=True)
class Clip:
    """A CLIP vision tower. ``layer`` picks the hidden state that is passed on (-2: the last but one); those of ``scales`` stand before it on the
    channels."""

    weights: str | None = "openai/clip-vit-large-patch14"
    width: int = 1024
    depth: int = 24
    heads: int = 16
    ffn: int = 4096
    patch: int = 14
    size: int = 224
    layer: int = -2
    scales: tuple[int, ...] = ()
    keep_class_token: bool = False
    post_norm: bool = False  # the tower's last norm, over every state that is passed on
    unit: bool = False  # states of length 1, after that norm (Kosmos-2)
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"  # of a tower without weights
    interpolate: int = 0  # side of pictures that the position embeddings of its weights are stretched to; 0: their own

    @property
    def channels(self) -> int:
        """Width of what is passed on."""
        return self.width * (1 + len(self.scales))

    @property
    def tokens(self) -> int:
        """States of one picture."""
        return (self.size // self.patch) ** 2 + self.keep_class_token


@dataclass(frozen=True)
class Eva:
    """BLIP-2's EVA-CLIP tower (arXiv:2211.07636), all its states with the class token's; the norm behind it is the connector's."""

    weights: str | None = "Salesforce/blip2-opt-2.7b"
    width: int = 1408
    depth: int = 39
    heads: int = 16
    ffn: int = 6144
    patch: int = 14
    size: int = 224
    layer: int = -1
    interpolate: int = 0  # side of pictures that the position embeddings of its weights are stretched to; 0: their own

    @property
    def tokens(self) -> int:
        """States of one picture."""
        return (self.size // self.patch) ** 2 + 1


@dataclass(frozen=True)
class NfResnet:
    """A residual network without normalisation layers (arXiv:2101.08692): no statistics that pictures of a batch could leak into each other
    through. ``width``: channels of its last stage, ``blocks``: residual blocks of each stage."""

    size: int = 224
    stem: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 2048
    weights: None = None  # it starts from nothing

    @property
    def patch(self) -> int:
        """Pixels a side that one state stands for."""
        return 2 ** (len(self.blocks) + 1)

    @property
    def tokens(self) -> int:
        """States of one picture, before they are pooled."""
        return (self.size // self.patch) ** 2


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
    interpolate: int = 0  # side of pictures that the position embeddings of its weights are stretched to; 0: their own

    @property
    def tokens(self) -> int:
        """States of one picture."""
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
    interpolate: int = 0  # side of pictures that the position embeddings of its weights are stretched to; 0: their own

    @property
    def tokens(self) -> int:
        """States of one picture."""
        return (self.size // self.patch) ** 2 + self.keep_class_token


@dataclass(frozen=True)
class Vqgan:
    """A VQGAN (arXiv:2012.09841) that makes a picture a grid of codes; as a tower its states are the codes' vectors. The default sizes are those
    of Chameleon's (arXiv:2405.09818); their training is unpublished.

    ``codebook``: "learned" codes are moved by their loss, "ema" codes follow a moving average of what chose them (VQ-VAE, arXiv:1711.00937),
    and those with a running count below ``dead_below`` start anew at a row of the batch.
    """

    size: int = 512
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = ()  # sides of the grids that attend to themselves, beside the middle
    latent: int = 256
    width: int = 256  # of a code
    codes: int = 8192
    groups: int = 32
    dropout: float = 0.0
    codebook: Literal["learned", "ema"] = "learned"
    beta: float = 0.25
    legacy: bool = True  # beta on the codebook's side of the loss, as in VQGAN's code; False: on the commitment, as in the paper
    gradient: Literal["ste", "rotation"] = "ste"
    decay: float = 0.99
    dead_below: float = 0.0
    weights: None = None  # it starts from nothing

    @property
    def patch(self) -> int:
        """Pixels a side that one code stands for."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def tokens(self) -> int:
        """Codes of one picture."""
        return (self.size // self.patch) ** 2


@dataclass(frozen=True)
class Linear:
    """One affine map from the tower's width to the language model's."""


@dataclass(frozen=True)
class NoConnector:
    """What the tower tells as it is, for a fusion that reads that: states in the tower's width (Idefics without a resampler), or tokens of the
    language model (``SharedTokens``)."""


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
class Tokens:
    """One affine map from a picture's pooled state to ``tokens`` vectors of the language model's width (Frozen, FROMAGe). ``class``: the class
    token's state (the tower keeps it), ``mean``: the mean over states."""

    tokens: int = 2
    pool: Literal["class", "mean"] = "mean"
    init: float = 0.0  # deviation of the map's first weights, its bias 0; 0: torch's own, whose vectors are far longer than words'


@dataclass(frozen=True)
class Resampler:
    """Perceiver resampler (Flamingo, arXiv:2204.14198): a picture's states become ``tokens`` latents of the tower's width."""

    tokens: int = 64
    depth: int = 6
    heads: int = 8
    head_width: int = 64
    activation: Literal["gelu", "relu", "squared_relu"] = "gelu"
    frames: int = 0  # learned embeddings of so many frames of a video, which is then one picture; 0: none, and each frame is a picture
    qk_norm: bool = False


@dataclass(frozen=True)
class AttentionPool:
    """``tokens`` learned queries read the projected states and themselves, once (Kosmos-2, arXiv:2306.14824)."""

    tokens: int = 64
    heads: int = 32


@dataclass(frozen=True)
class QFormer:
    """BLIP-2's querying transformer (arXiv:2301.12597) with the norm before it and, in ``fusion``'s width, the projection behind it.

    ``text``: whether it has what compares pictures with texts (its first stage), in a space of ``shared`` dimensions. ``instructed``: whether
    queries read a row's question beside its picture, up to ``QUESTION`` tokens (InstructBLIP, arXiv:2305.06500; BLIP-2 where it is fine-tuned
    on questions). ``vocab``: words that it reads either with, 0: the language model's."""

    tokens: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    every: int = 2  # layers with cross-attention
    text: bool = True
    instructed: bool = False
    vocab: int = 30523
    positions: int = 512
    shared: int = 256
    dropout: float = 0.1
    norm_eps: float = 1e-6  # of the norm before it; LAVIS has 1e-5
    init: float = 0.02  # standard deviation of what starts from nothing
    weights: str | None = None  # a BERT whose layers, words and tokenizer it starts from

    @property
    def reads(self) -> bool:
        """Whether it has words."""
        return self.text or self.instructed


DECODE = "[DEC]"  # the Q-Former's first token where it writes text
QUESTION = 128  # the most tokens of a question that the Q-Former reads; a longer one loses its beginning


@dataclass(frozen=True)
class Prefix:
    """Image tokens take the places of the <image> placeholders in the language model's sequence, between the tokens ``begin`` and ``end``
    ("": none). Where a document speaks of a picture after a text, ``begin`` is learnt like the text."""

    begin: str = ""
    end: str = ""


@dataclass(frozen=True)
class AdapterPrompts:
    """Gated prompts in the last ``layers`` layers, ``length`` each (LLaMA-Adapter, arXiv:2303.16199); a picture's vector is added to them. In
    the sequence a picture takes one place, the <image> token's own. ``gate``: what is made of the learned gate (the paper: identity)."""

    length: int = 10
    layers: int = 30
    gate: Literal["tanh", "identity"] = "tanh"


@dataclass(frozen=True)
class GatedCrossAttention:
    """Gated cross-attention blocks before some of a frozen language model's layers (Flamingo, arXiv:2204.14198). In the sequence a picture
    takes one place. Layer i of the language model has one before it where ``(i + offset) % every == 0``: 0 in the paper and Idefics, 1 in
    OpenFlamingo. ``block``: whose block it is."""

    every: int = 4
    offset: int = 0
    heads: int = 8
    head_width: int = 64
    block: Literal["flamingo", "idefics"] = "flamingo"
    activation: Literal["gelu", "squared_relu"] = "gelu"
    immediate: bool = True  # text sees the latest picture before it, or all of them
    qk_norm: bool = False  # idefics
    gates: Literal["scalar", "vector"] = "scalar"  # idefics
    end: str = "<|endofchunk|>"  # token at the end of what is said of a picture; "": none
    around: str = ""  # token on either side of a picture, one between adjacent ones; "": none


@dataclass(frozen=True)
class Retrieval:
    """A prefix, and a token whose hidden states are compared with pictures in a space of ``shared`` dimensions (FROMAGe, arXiv:2301.13823)."""

    shared: int = 256
    # Whose states: 0 what the first block reads, -1 the last, behind the norm. Each has a map; the results are summed.
    layers: tuple[int, ...] = (-1,)
    token: ClassVar[str] = "[RET]"  # the template "fromage" ends texts with it


@dataclass(frozen=True)
class SharedTokens:
    """A picture is the codes of its tokenizer, tokens like any other, read and written (Chameleon, arXiv:2405.09818)."""

    begin: str = "<racm3:break>"
    end: str = "<eoss>"

    @staticmethod
    def code(number: int) -> str:
        """The token of a code, as Chameleon's vocabulary spells it: IMGIMGBCZ is 12."""
        return f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(number))}Z"


@dataclass(frozen=True)
class NoRegions:
    """Places in pictures are not spoken of."""


@dataclass(frozen=True)
class BoxTokens:
    """Boxes as tokens of a grid of ``bins`` x ``bins`` places, behind the phrase they belong to (Kosmos-2, arXiv:2306.14824)."""

    bins: int = 32

    @property
    def tokens(self) -> tuple[str, ...]:
        """In the order of Kosmos-2's vocabulary."""
        tags = ("<phrase>", "</phrase>", "<object>", "</object>", "</delimiter_of_multi_objects/>", "<grounding>")
        return (*tags, *(f"<patch_index_{place:04}>" for place in range(self.bins**2)))


# Families of language models that read a row up to its first label with one stack, and say the rest with another.
ENCODER_DECODERS = ("t5",)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, or one of ``ENCODER_DECODERS``; ``family`` is its transformers model type."""

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
    norm: Literal["before", "after"] = "before"  # chameleon: each sub-layer's norm stands before it, or over what it adds (its 34B)
    init: float = 0.02
    words: str | None = None  # the folder or hub name of a tokenizer, for a model that starts from nothing

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder and a decoder."""
        return self.family in ENCODER_DECODERS


@dataclass(frozen=True)
class Fixed:
    """One square of ``size`` pixels, values 0 .. 1 less mean over std (CLIP's by default).

    ``fit``: how a picture that is no square becomes one. crop: shorter side resized, middle kept. squash: both sides resized, to other
    proportions. pad, pad_mean: in the middle of a black square, or one of the mean's colour, which is resized. ``fit_asked``: the same for
    pictures in questions, where these are treated otherwise than those in answers and documents; None: alike.
    """

    size: int = 224
    fit: Literal["crop", "squash", "pad", "pad_mean"] = "crop"
    fit_asked: Literal["crop", "squash", "pad", "pad_mean"] | None = None
    augment: bool = False  # in training: a part of the square, at least half of it, in its place, every other one mirrored
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


# ----------------------------------------------------------------------------------------------------------- training

# Data sets that need no path; mmfast.data.supervised makes them.
BUILT_IN = (
    "shapes", "shapes_captions", "shapes_text", "shapes_single", "shapes_episodes", "shapes_told", "shapes_crowded", "shapes_drawing", "shapes_grounded",
    "shapes_instructions", "easy_vqa",
)  # fmt: skip


@dataclass(frozen=True)
class Pages:
    """How interleaved documents are read. What is drawn is drawn once a document, the same in every run.

    ``pictures``: the first so many are kept; 0: all. ``similarity``: of MMC4's records, pictures that match no sentence so well are left out,
    and records of which none is left; the others are matched one to one. ``window``: a document begins at one of its pieces, drawn, and what follows ``max_length`` is cut
    as ever. ``following``: the share of documents whose pictures each stand before the text that precedes them, so that it is read with them.
    ``single``: the share of documents with one picture that is kept; the others are left out, and told.
    """

    pictures: int = 0
    similarity: float = 0.0
    window: bool = False
    following: float = 0.0
    single: float = 1.0


@dataclass(frozen=True)
class Shots:
    """How a record that is a few-shot episode is asked (``mmfast.data.episodes``), and a question with its answer where any of this is set.

    ``prompt``: whose words stand around questions and answers; None: texts as they stand, and Frozen's words where there are none. ``ways``: of
    examples those of so many answers, the right one among them; ``inner_shots``: of each answer the first so many; ``shots``: of all the
    first so many; None: all. ``repeats``: how often the examples are said again; ``induction``: a sentence before all that says what is
    wanted; ``unseen``: examples without their pictures.
    """

    prompt: str | None = None
    shots: int | None = None
    ways: int | None = None
    inner_shots: int | None = None
    repeats: int = 0
    induction: bool = False
    unseen: bool = False


@dataclass(frozen=True)
class Data:
    """What a stage reads. ``name`` is a built-in set (``BUILT_IN``), or a published one, whose records the user supplies.

    ``path``: JSON, JSONL, TSV, parquet or webdataset tar files (a file, a folder or a pattern), or ``hub:NAME``. ``split``: of a hub data set,
    and of ScienceQA's problems. ``images``: the folder that
    picture names are relative to (default: beside the file). ``columns`` maps their names to ours, so nothing has to be converted.
    ``streaming`` reads through without an index; ``weight`` is the share of draws within a ``Mixture`` (None: as many as it has records), and
    ``loss`` the weight of its loss there, a mean over its own tokens in a step (None: tokens weigh alike, whichever set they are of).
    """

    name: str
    path: str | None = None
    images: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    streaming: bool = False
    blind: bool = False  # every picture black: the control of what the words alone give away
    clean: bool = False  # answers as BLIP reads captions: lower case, .!"()*#:;~ left out, the first 50 words
    frames: int = 8  # pictures that a video is read as
    boxes: float = 0.5  # the share of captions with places (GRIT) that tell them; other records always do, and with 0 none does
    instruct: float = 0.0  # the share of these captions of which one place is asked about instead, in Kosmos-2's six templates
    # Of pictures with a caption, read as documents: the share whose caption comes first, drawn once a record; None: they are questions.
    captions_first: float | None = None
    choices: Literal["llava", "llama_adapter"] = "llava"  # how a question with choices (ScienceQA) is put, and answered
    min_side: int = 0  # a record with a picture of fewer pixels on a side is left out, and told (LAION's filter: 200)
    full: bool = False  # texts end to end in rows of max_length, cut where a row ends; records without pictures
    weight: float | None = None
    loss: float | None = None
    pages: Pages = Pages()
    shots: Shots = Shots()
    on_bad_record: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class Mixture:
    """Several data sets in one stage. An epoch has as many items as all of them together; where weights are given, items are drawn by them:
    as shares of ``items``, or so that the ``tokens`` drawn of each set (pictures' places among them) have these shares."""

    name: str
    parts: tuple[Data, ...]
    by: Literal["items", "tokens"] = "items"


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule. Warm-up is linear, then the peak is held up to the share ``hold`` of all steps, then the rate falls to
    ``floor`` of the peak along half a cosine or a line, by the same factor every step (exponential), or stays. (Cosine with ``floor`` is also
    what MAE and LLaMA-Adapter train with.)"""

    lr: float
    steps: int | None = None
    epochs: float | None = None
    batch: int = 128  # rows a micro-batch, over all processes together
    accumulate: int = 1
    warmup: float = 0.03  # a share of all steps below 1, else steps
    hold: float = 0.0
    floor: float = 0.0
    schedule: Literal["cosine", "linear", "exponential", "constant"] = "cosine"
    lr_of: dict[str, float] = field(default_factory=dict)  # parts that learn at another rate than ``lr``
    layer_decay: float = 1.0  # factor of the rate from each layer of a vision transformer to the one below; 1: they learn alike
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    weight_decay_of: dict[str, float] = field(default_factory=dict)  # parts that decay otherwise; new_tokens never do
    decay_vectors: bool = True  # whether weight decay also applies to biases, norms and gates
    clip: float = 1.0
    ema: float = 0.0  # decay of a moving average of the weights, kept and saved beside them; 0: none
    level_new: bool = False  # after each step the input rows of new_tokens get the mean norm of the rows before them (FROMAGe)


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
class Drawing:
    """The terms of objective "tokenizer" (VQGAN, arXiv:2012.09841): the error of what is drawn, the codebook's loss, and a critic's judgement
    with the adaptive weight times ``adversarial`` (0: no critic; 0.8 in VQGAN's code) after the first ``critic_after`` steps. A perceptual
    term is a module, which ``Session.perceptual`` holds."""

    error: Literal["l1", "l2"] = "l1"
    codebook: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.0
    critic_after: int = 250_001
    critic_channels: int = 64
    critic_layers: int = 3


@dataclass(frozen=True)
class Stage:
    """One run of the loop: which parts train, on what, with which objective.

    tokenizer: pictures through codes and back, for an encoder that is a ``Vqgan``; ``drawing`` has its terms.
    retrieval: captions, and each caption's [RET] beside its picture among the batch's (FROMAGe). queries: contrast, matching and captioning
    of the Q-Former alone (BLIP-2's first stage). lm: cross-entropy of the answer tokens. words: the bag-of-words warm-up of a tower that starts from nothing (every word that is true of
    the picture must be found among the patches, by the language model's own embeddings); it stands in for CLIP's pre-training.
    """

    name: str
    train: tuple[Part, ...]
    data: Data | Mixture
    optim: Optim
    objective: Literal["lm", "words", "tokenizer", "retrieval", "queries"] = "lm"
    drawing: Drawing = Drawing()
    contrast: float = 1.0  # weight of the contrastive loss of retrieval
    z_loss: float = 0.0  # weight of the squared log of the softmax's denominator, beside lm (arXiv:2204.02311)
    dropout: float = 0.0  # of what each attention and each feed-forward layer of the language model adds
    lora: Lora | None = None  # adapters that train beside ``train``
    template: str = "vicuna_v1"
    max_length: int = 2048


@dataclass(frozen=True)
class System:
    """A multimodal model and how it is trained. ``weights``: a run folder or a Hugging Face folder that all parts start from."""

    name: str
    paper: str = ""
    weights: str | None = None
    encoder: Clip | Siglip | Dino | Eva | NfResnet | Vqgan = Clip()
    connector: Linear | Mlp | Pooled | NoConnector | Tokens | Resampler | AttentionPool | QFormer = Linear()
    fusion: Prefix | AdapterPrompts | GatedCrossAttention | Retrieval | SharedTokens = Prefix()
    language: LanguageModel = LanguageModel()
    image: Fixed = Fixed()
    regions: NoRegions | BoxTokens = NoRegions()
    stages: tuple[Stage, ...] = ()
    compute: Compute = Compute()

    @property
    def image_places(self) -> int:
        """Positions that one picture takes in the language model's sequence, ``borders`` aside."""
        return 1 if isinstance(self.fusion, AdapterPrompts | GatedCrossAttention) else self.image_tokens

    @property
    def clips(self) -> bool:
        """Whether the connector reads a video as one picture of several frames, and not as a picture a frame."""
        return bool(getattr(self.connector, "frames", 0))

    @property
    def projects(self) -> bool:
        """Whether the connector makes vectors of the language model's width that words can be read from, several a picture."""
        return isinstance(self.connector, Linear | Mlp | AttentionPool)

    @property
    def mixes(self) -> bool:
        """Whether each of these vectors is made of all the tower's states."""
        return isinstance(self.connector, AttentionPool)

    @property
    def borders(self) -> tuple[str, ...]:
        """Tokens before and behind each picture; where they are the same, adjacent pictures share the one between them."""
        if isinstance(self.fusion, GatedCrossAttention) and self.fusion.around:
            return (self.fusion.around,) * 2
        spoken = isinstance(self.fusion, Prefix | SharedTokens) and self.fusion.begin
        return (self.fusion.begin, self.fusion.end) if spoken else ()

    @property
    def image_tokens(self) -> int:
        """Vectors that the connector makes of one picture."""
        return getattr(self.connector, "tokens", None) or self.encoder.tokens

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Tokens that the choices need and a tokenizer of text does not have, ``<image>`` aside; the part ``new_tokens`` is their rows."""
        added: list[str] = []
        if isinstance(self.fusion, Prefix):
            added += [token for token in self.borders if token != "<image>"]
        if isinstance(self.connector, QFormer) and self.connector.text and not self.connector.vocab:
            added.append(DECODE)
        if isinstance(self.fusion, GatedCrossAttention):
            added += filter(None, (self.fusion.around, self.fusion.end))
        if isinstance(self.fusion, Retrieval):
            added.append(self.fusion.token)
        if isinstance(self.fusion, SharedTokens) and isinstance(self.encoder, Vqgan):
            added += [self.fusion.begin, self.fusion.end, *map(self.fusion.code, range(self.encoder.codes))]
        if isinstance(self.regions, BoxTokens):
            added += self.regions.tokens
        return tuple(added)


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
    of ``mmfast.preference_loss``. Those that compare pairs with each other (aot, aot_unpaired, bco_pair) see the pairs of one micro-batch on
    one process; all others do not depend on how a step's pairs are cut."""

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


# ------------------------------------------------------------------------------------------------- what goes together


def misfits(system: System, *, read: bool = False) -> list[str]:
    """Sizes and choices of a model that do not go together, a sentence each, beginning with the field.

    Args:
        read: the sizes are those of the weights (``mmfast.models.resolved``). Otherwise a part with weights is passed over: what is declared
            beside them is not what will be built.
    """
    encoder, language, out = system.encoder, system.language, []

    def multiple(name: str, value: int, of_name: str, of: int) -> None:
        if of > 0 and value % of:
            out.append(f"{name}: {value} is not a multiple of {of_name} {of}")

    # Published weights need not keep these: SigLIP's so400m drops the pixels beyond whole patches, Qwen3's heads are wider than width / heads.
    tower = not isinstance(encoder, Vqgan | NfResnet)
    if tower and not (system.weights or encoder.weights):
        multiple("encoder.width", encoder.width, "encoder.heads", encoder.heads)
        multiple("encoder.size", encoder.size, "encoder.patch", encoder.patch)
        if isinstance(encoder, Dino):
            multiple("encoder.ffn", encoder.ffn, "encoder.width", encoder.width)
    if tower and encoder.interpolate and not (system.weights or encoder.weights):
        out.append("encoder.interpolate: stretches what encoder.weights bring, and there are none; set encoder.size in its place")
    if tower and encoder.interpolate and read:
        multiple("encoder.interpolate", encoder.interpolate, "encoder.patch", encoder.patch)
    if isinstance(encoder, NfResnet) and encoder.blocks:
        multiple("encoder.size", encoder.size, "encoder.patch", encoder.patch)
        multiple("encoder.width", encoder.width, "4 and a halving for each stage but one,", 4 << (len(encoder.blocks) - 1))
    if not (system.weights or language.weights):
        multiple("language.width", language.width, "language.heads", language.heads)
        multiple("language.heads", language.heads, "language.kv_heads", language.kv_heads)
    if read or not (system.weights or encoder.weights):
        for name, layer in [("layer", encoder.layer), *(("scales", layer) for layer in getattr(encoder, "scales", ()))] if tower else ():
            if not -encoder.depth - 1 <= layer <= encoder.depth:
                out.append(f"encoder.{name}: expected at least {-encoder.depth - 1} and at most {encoder.depth}, got {layer}")
        if system.image.size != encoder.size:
            out.append(f"image.size: {system.image.size} and encoder.size {encoder.size} must agree")
    if getattr(encoder, "scales", ()) and (encoder.post_norm or encoder.unit):
        out.append("encoder.scales: post_norm and unit are about one layer's states; leave scales empty")
    if isinstance(system.connector, QFormer) and (read or not (system.weights or system.connector.weights)):
        multiple("connector.width", system.connector.width, "connector.heads", system.connector.heads)
    if isinstance(system.fusion, Prefix) and bool(system.fusion.begin) != bool(system.fusion.end):
        out.append("fusion: begin and end stand around a picture together; set both, or neither")
    if language.words and language.weights:
        out.append("language.words: language.weights bring a tokenizer of their own; take one of them out")
    fusion, family = type(system.fusion).__name__, language.family
    if system.image.augment and not isinstance(system.regions, NoRegions):
        out.append("image.augment: shows a part of a picture, mirrored or not, and the places told of it would not follow; set it to false")
    if language.encodes and not isinstance(system.fusion, Prefix):
        out.append(
            f"fusion: {fusion} goes into a causal language model, and {family} is an encoder and a decoder; set Prefix, or another language model"
        )
    if language.encodes and system.borders:
        out.append(
            f'fusion.begin: {system.borders[0]} is learnt behind a text, and {family} reads pictures in its encoder alone; set begin and end "", or a '
            "causal language model"
        )
    if language.encodes and system.compute.precision == "fp16":
        out.append(f"compute.precision: {family} overflows in fp16; set bf16")
    if system.compute.packing and language.family in ("kosmos_2_text_model", "mpt", "opt", *ENCODER_DECODERS):
        out.append(f"compute.packing: the decoder of {language.family} cannot keep packed rows apart; leave packing off")
    if system.weights and isinstance(system.fusion, AdapterPrompts | Retrieval):  # no published class has one; the others are looked into
        out.append(
            f"weights: {system.weights} are those of a prefix model; with {type(system.fusion).__name__} give the parts' own weights"
        )
    gated, told = isinstance(system.fusion, GatedCrossAttention), read or not system.weights
    if told and gated and not isinstance(system.connector, Resampler | NoConnector):
        out.append(
            f"connector: GatedCrossAttention reads the latents of a Resampler, in the tower's width, got {type(system.connector).__name__}"
        )
    if told and gated and system.fusion.block == "idefics" and not system.fusion.immediate:
        out.append(
            "fusion.immediate: false is for Flamingo's blocks; Idefics' see the latest picture, or what an image_attention_mask says"
        )
    shared = isinstance(system.fusion, SharedTokens)
    if told and isinstance(system.connector, NoConnector) and not (gated or shared):
        out.append(
            f"connector: NoConnector leaves states in the tower's width, which GatedCrossAttention reads; with {type(system.fusion).__name__} "
            "set Linear or another"
        )
    if (
        isinstance(system.connector, Pooled | Tokens)
        and system.connector.pool == "class"
        and not getattr(encoder, "keep_class_token", False)
    ):
        out.append("connector.pool: class reads the class token; set encoder.keep_class_token true, or pool mean")
    if isinstance(system.fusion, Retrieval) and not isinstance(system.connector, Tokens):
        out.append(
            f"connector: Retrieval compares a picture's pooled state, which {type(system.connector).__name__} does not have; set Tokens"
        )
    if isinstance(system.fusion, Retrieval) and (read or not language.weights):
        layers, count = system.fusion.layers, max(language.depth, 0) + 1
        if not layers or len({layer % count for layer in layers}) < len(layers) or not all(-count <= layer < count for layer in layers):
            out.append(f"fusion.layers: expected some of {-count} to {count - 1}, no state twice, got {list(layers)}")
    if shared and not (isinstance(system.connector, NoConnector) and isinstance(encoder, Vqgan)):
        out.append("fusion: SharedTokens goes with encoder Vqgan and connector NoConnector; set all three")
    if language.norm == "after" and language.family != "chameleon":
        out.append(f"language.norm: after is an order of family chameleon, and this is {language.family}; set before")
    if language.words and language.weights:
        out.append("language.words: language.weights bring a tokenizer of their own; take one of them out")
    if language.quantize != "none":
        if system.weights:
            out.append(
                f"language.quantize: {language.quantize} needs language.weights of its own; weights {system.weights} are read as they are"
            )
        elif not language.weights:
            out.append(f"language.quantize: {language.quantize} holds given weights in fewer bits; set language.weights too")
        elif language.weights.endswith(".gguf"):
            out.append(f"language.quantize: GGUF is read as plain weights; {language.quantize} needs a Hugging Face folder")
    return out


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
