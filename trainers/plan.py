"""`mmfast plan`: parameters and memory of every stage before anything is loaded, and what to change where a stage does not fit.

Counted, not guessed: the model is built without storage, and a step's forward runs on fake tensors with the real precision, freezing and
adapters, so that what autograd would save is summed as it would be, storage by storage. Only a few blocks of each stack are traced, the
rest are like the middle one. Letters: B rows of a micro-batch in one process, T positions, N tokens a picture, D width, V vocabulary, n rows
that are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.data.supervised import EasyVQA, vocabulary
from mmfast.data.synthetic import World, WorldConfig
from mmfast.models import add_lora, build, lora_parameters, resolved
from mmfast.models.build import MultimodalModel
from mmfast.models.fusions import ByRow, MediaByRow, blocks
from mmfast.models.pretrained import adopted, locate
from mmfast.models.tokenizer import word_tokenizer
from mmfast.ops.linear_logp import _LEAST_COLUMNS, _WORKSPACE_MB
from mmfast.spec import BUILT_IN as SETS
from mmfast.spec import (
    PARTS,
    QUESTION,
    AdapterPrompts,
    Alignment,
    Compute,
    GatedCrossAttention,
    LanguageModel,
    Lora,
    NfResnet,
    Prefix,
    QFormer,
    Retrieval,
    Stage,
    System,
    Vqgan,
    nearest,
)

from . import config
from .checkpoint import RunError
from .describe import columns
from .place import Place
from .queries import losses
from .runs import is_run, read_recipe, system_of
from .session import parts_of
from .supervised import WordHead

GROUPS = tuple(part for part in PARTS if part not in ("new_tokens", "queries", "last_block"))  # every parameter is in one of these
GIB = 2**30
BUILT_IN = (*SETS, "shapes_own")
_TRACED = 3  # blocks of a stack: the first, one in the middle, the last
_USABLE = 0.92  # of a device's memory; the rest is its context and what the allocator cannot fill
_NF4_BITS = 4.127  # 4 bits and a doubly quantised scale per 64 weights (arXiv:2305.14314, section 3)
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What one stage takes in one process; memory in bytes."""

    stage: str
    rows: int  # sequences of a micro-batch, B
    pictures: int
    length: int  # T
    parameters: dict[str, int]  # of each part; the language model's without its embeddings
    trainable: int
    memory: dict[str, int]  # what is there at once, by what holds it
    passing: int  # the frozen tower's forward, over before the activations are there
    activations: dict[bool, int] = field(default_factory=dict)  # without and with compute.checkpointing
    full_logits: int = 0  # what [B, T, V] in fp32 would take; none are made
    tower_rates: tuple[float, float] | None = None  # peaks, of its embeddings and its last block, where optim.layer_decay sets them apart

    @property
    def total(self) -> int:
        step = self.memory["activations"] + self.memory["logits"]
        return sum(self.memory.values()) - step + max(step, self.passing)


# ------------------------------------------------------------------------------------------------------------- the model


def _local(weights: str, where: str) -> str:
    """The same weights as they lie on this machine, hub names by the hub's cache and never by the network; ``ValueError`` where they do not."""
    folder, gguf = locate(weights, where)
    if Path(folder).is_dir():
        return weights
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(folder, gguf.get("gguf_file", "config.json"))
    if not isinstance(found, str):
        raise ValueError(f"{where} {weights} is not in the hub's cache on this machine")
    return found if gguf else str(Path(found).parent)


def at_hand(system: System) -> tuple[System, list[str]]:
    """The system with those of its weights that lie on this machine, under their local names, and a sentence for each of the others: there
    the sizes that the recipe declares beside them count."""
    said: list[str] = []

    def found(weights: str | None, where: str, choice: Any) -> str | None:
        try:
            return weights and _local(weights, where)
        except ValueError as error:
            sizes = f"(width {choice.width}, depth {choice.depth})" if choice is not system else "of all parts"
            said.append(f"sizes {sizes} are the recipe's own, nothing was read: {error}")

    if system.weights and is_run(system.weights):
        own, said = at_hand(system_of(read_recipe(Path(system.weights))[0]))
        asked = adopted(system, own)
        own = replace(own, encoder=asked.encoder, connector=asked.connector, image=asked.image, regions=asked.regions)
        return replace(own, stages=system.stages or own.stages), said
    if system.weights:
        system = replace(system, weights=found(system.weights, "weights", system))
        if system.weights:
            return system, said
    encoder = replace(system.encoder, weights=found(system.encoder.weights, "encoder.weights", system.encoder))
    language = replace(system.language, weights=found(system.language.weights, "language.weights", system.language))
    connector = system.connector
    if isinstance(connector, QFormer):
        connector = replace(connector, weights=found(connector.weights, "connector.weights", connector))
    return replace(system, encoder=encoder, connector=connector, language=language), said


def sized(system: System) -> System:
    """The system without weights, at the sizes of those of its weights that are at hand, else at the sizes that it declares."""
    found = resolved(at_hand(system)[0])
    encoder = replace(found.encoder, weights=None)
    if side := getattr(encoder, "interpolate", 0):
        encoder = replace(encoder, size=side, interpolate=0)
    language = replace(found.language, weights=None, quantize="none", vocab=found.language.vocab or _vocabulary(system))
    connector = replace(found.connector, weights=None) if isinstance(found.connector, QFormer) else found.connector
    return replace(
        found, weights=None, encoder=encoder, connector=connector, language=language, image=replace(found.image, size=encoder.size)
    )


def unknown(recipe: System | Alignment, job: Stage | Alignment) -> str | None:
    """Why a stage's memory cannot be told beforehand, in a sentence; None where it can."""
    system, objective = system_of(recipe), getattr(job, "objective", "lm")
    kinds = (Prefix, Retrieval, AdapterPrompts, GatedCrossAttention)
    at = f"{recipe.name}, {job.name}: the plan knows"
    if objective not in ("lm", "words", "queries"):
        return f"{at} the memory of objectives lm, words and queries, not of {objective}; this stage has to be tried"
    if system.language.encodes and objective == "lm":
        return f"{at} the memory of causal language models, not of {system.language.family}; this stage has to be tried"
    if isinstance(system.encoder, Vqgan):
        return f"{at} the memory of towers of transformers, not of {type(system.encoder).__name__}; this stage has to be tried"
    if not isinstance(system.fusion, kinds):
        known = ", ".join(kind.__name__ for kind in kinds)
        return f"{at} the memory of fusions {known}, not of {type(system.fusion).__name__}; this stage has to be tried"
    return None


def _vocabulary(system: System) -> int:
    """Words of the built-in data and tokens of the choices, which a model without weights speaks, as in ``session.Session``."""
    if system.weights and is_run(system.weights):
        origin = system_of(read_recipe(Path(system.weights))[0])
        own = at_hand(origin)[0]
        return _vocabulary(origin) + len({*adopted(system, own).added_tokens} - {*own.added_tokens})
    names = {part.name for stage in system.stages for part in parts_of(stage.data)}
    return len(word_tokenizer(vocabulary(names, World()), system.added_tokens))


@dataclass(frozen=True)
class Setting:
    """What a stage finds, and what of it learns."""

    train: tuple[str, ...] = ()
    lora: Lora | None = None  # adapters that are there, of this stage or an earlier one
    adapts: bool = True  # whether they learn
    half: frozenset[str] = frozenset()  # parts held in bf16
    head: tuple[int, int] | None = None  # classes and words of the bag-of-words head


def setting(recipe: System | Alignment, job: Stage | Alignment) -> Setting:
    """The setting of one of a recipe's stages; what ``supervised.run_stage`` and ``preference.train_alignment`` prepare."""
    names = [stage.name for stage in system_of(recipe).stages]
    before = [job] if isinstance(job, Alignment) else [*system_of(recipe).stages[: names.index(job.name)], job]
    adapters = [stage.lora for stage in before if stage.lora is not None]
    head = None
    if isinstance(job, Stage) and job.objective == "words":
        c = WorldConfig()
        words = len(EasyVQA.answer_words()) if job.data.name == "easy_vqa" else 0
        head = (words, words) if words else (c.classes, c.colours + c.shapes + 6)
    return Setting(job.train, adapters[0] if adapters else None, job.lora is not None, _in_half(recipe, before), head)


def _in_half(recipe: System | Alignment, stages: list) -> frozenset[str]:
    """Parts held in bf16 under that precision: read from weights, and trained by none of these stages, which hold what they train in fp32 and
    leave it so. Parts made here are fp32."""
    system = system_of(recipe)
    if system.weights and is_run(system.weights):
        origin = read_recipe(Path(system.weights))[0]
        read = _in_half(origin, jobs(origin))
    elif recipe.compute.precision != "bf16":
        return frozenset()
    elif system.weights:
        read = set(GROUPS)
    else:
        read = {"encoder"} if system.encoder.weights else set()
        read |= {"language", "embeddings"} if system.language.weights else set()
    return frozenset(part for part in read if not any(_trains(stage, part) for stage in stages))


def _prepare(model: MultimodalModel, its: Setting) -> list[nn.Parameter]:
    """Sets what learns, as ``session.Session.let_train`` does; returns it."""
    if its.lora is not None:
        add_lora(model, its.lora)
    learnt = model.train_only(its.train, lora=its.lora is not None and its.adapts)
    model.train()
    return learnt


def _groups(model: MultimodalModel) -> dict[str, list[nn.Parameter]]:
    """Parameters by part, each in one: the language model's are without its embeddings."""
    embeddings = {id(p) for p in model.part("embeddings").parameters()}
    return {name: [p for p in model.part(name).parameters() if name != "language" or id(p) not in embeddings] for name in GROUPS}


@dataclass(frozen=True)
class Count:
    """Parameters of a prepared model, and the bytes that hold them."""

    parts: dict[str, int]
    trained: dict[str, int]
    weights: int  # bytes
    tensors: int  # that are trained
    tower_layers: int  # of which each may learn at a rate of its own
    block: int  # of a block of the language model
    blocks: int  # of all of these
    blocks_trained: int


_counts: dict[str, Count] = {}


def count(system: System, its: Setting) -> Count:
    shape = replace(sized(system), name="", paper="", stages=(), compute=Compute())
    key = repr((shape, system.language.quantize, its))
    if key not in _counts:
        with torch.device("meta"):
            model = build(shape)
            learnt = {id(p) for p in _prepare(model, its)}
            head = _word_head(system, its)
        groups = {**_groups(model), **({"word head": list(head.parameters())} if head else {})}
        learnt |= {id(p) for p in groups.get("word head", ())}
        adapters, stack = {id(p) for p in lora_parameters(model)}, blocks(model.language)
        four = {id(p) for p in stack.parameters() if p.ndim == 2 and id(p) not in adapters} if system.language.quantize == "4bit" else set()

        def held(part: str, p: nn.Parameter) -> float:
            if id(p) in four:
                return _NF4_BITS / 8
            return 2 if part in its.half and id(p) not in adapters else 4

        weights = sum(held(part, p) * p.numel() for part, group in groups.items() for p in group)
        _counts[key] = Count(
            parts={name: sum(p.numel() for p in group) for name, group in groups.items()},
            trained={name: sum(p.numel() for p in group if id(p) in learnt) for name, group in groups.items()},
            weights=math.ceil(weights),
            tensors=sum(id(p) in learnt for group in groups.values() for p in group),
            tower_layers=max((down for _, down in model.encoder.below()), default=0) if hasattr(model.encoder, "below") else 0,
            block=max(sum(p.numel() for p in block.parameters()) for block in stack),
            blocks=sum(p.numel() for p in stack.parameters()),
            blocks_trained=sum(p.numel() for p in stack.parameters() if id(p) in learnt),
        )
    return _counts[key]


def _word_head(system: System, its: Setting) -> WordHead | None:
    if its.head is None:
        return None
    encoder = sized(system).encoder
    width = sized(system).language.width
    own, mixed = None if system.projects else width, width if system.mixes else None
    return WordHead(getattr(encoder, "channels", encoder.width), *its.head, own, mixed)


# ------------------------------------------------------------------------------------------------------------- the trace


@dataclass
class _Saved:
    """Bytes that autograd keeps of a forward pass."""

    outside: int = 0  # of all blocks
    blocks: dict[str, list[int]] = field(default_factory=dict)  # of each, by stack
    inputs: dict[str, int] = field(default_factory=dict)  # a block's input, all that checkpointing keeps of it
    casts: dict[str, list[int]] = field(default_factory=dict)  # autocast's half copies of weights that train; "": outside of blocks


@contextmanager
def saved_bytes(model: nn.Module, stacks: dict[str, nn.ModuleList]) -> Iterator[_Saved]:
    """Counts what autograd saves inside, each storage once, at the block where it is first saved; parameters and buffers are none of it."""
    per_block = {name: [0] * len(stack) for name, stack in stacks.items()}
    out = _Saved(blocks=per_block, inputs=dict.fromkeys(stacks, 0), casts={name: [0] * len(v) for name, v in per_block.items()} | {"": [0]})
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Any] = {}  # keeps the storages, so that no handle is used twice
    here: list[tuple[str, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = storage
            if _is_cast(tensor):
                stack, at = here[-1] if here else ("", 0)
                out.casts[stack][at] += storage.nbytes()
            elif here:
                stack, at = here[-1]
                out.blocks[stack][at] += storage.nbytes()
            else:
                out.outside += storage.nbytes()
        return tensor

    def enter(stack: str, at: int):
        def hook(module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            if states.requires_grad or any(p.requires_grad for p in module.parameters()):
                out.inputs[stack] = states.numel() * states.element_size()
            here.append((stack, at))

        return hook

    hooks = []
    for name, stack in stacks.items():
        for i, block in enumerate(stack):
            hooks += [
                block.register_forward_pre_hook(enter(name, i), with_kwargs=True),
                block.register_forward_hook(lambda *_: here.pop() and None),
            ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield out
    finally:
        for hook in hooks:
            hook.remove()


def _is_cast(tensor: Tensor) -> bool:
    """Whether this is a parameter in another type, perhaps transposed: autocast makes one a step and keeps it until backward is over."""
    node, cast = tensor.grad_fn, False
    while node is not None and node.name() in ("TBackward0", "ToCopyBackward0", "ViewBackward0"):
        cast = cast or node.name() == "ToCopyBackward0"
        node = node.next_functions[0][0]
    return cast and node is not None and node.name() == "torch::autograd::AccumulateGrad"


@cache
def _plain_attention() -> str:
    """An attention of transformers' that makes no mask, which is what the real one does on real tensors without padding."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("mmfast_plan", sdpa_attention_forward)
    AttentionMaskInterface.register("mmfast_plan", lambda *_, **__: None)
    return "mmfast_plan"


_traces: dict[str, tuple[_Saved, _Saved]] = {}


def trace(recipe: System | Alignment, job: Stage | Alignment, *, pictures: int, length: int, sharded: bool = False) -> _Saved:
    """What autograd saves of a step's forward, head excluded, with all blocks. Bytes grow in a straight line with the batch, so that two
    small ones, traced once, give all. ``sharded``: FSDP2 gathers weights in the precision's type, so that autocast has nothing to copy."""
    system, precision, its = system_of(recipe), recipe.compute.precision, setting(recipe, job)
    views = len(job.views) if isinstance(job, Alignment) else 1
    key = repr((replace(sized(system), name="", paper="", stages=(), compute=Compute()), its, views, precision, length, sharded))
    if key not in _traces:
        _traces[key] = tuple(_trace(sized(system), its, precision, n * views, n, length, sharded) for n in (2, 3))
    two, three = _traces[key]

    def at(x: int, y: int) -> int:
        return x + (pictures - 2) * (y - x)

    def each(x: dict[str, list[int]], y: dict[str, list[int]]) -> dict[str, list[int]]:
        return {name: [at(*pair) for pair in zip(x[name], y[name], strict=True)] for name in x}

    inputs = {name: at(two.inputs[name], three.inputs[name]) for name in two.inputs}
    return _Saved(at(two.outside, three.outside), each(two.blocks, three.blocks), inputs, each(two.casts, three.casts))


def _trace(system: System, its: Setting, precision: str, rows: int, pictures: int, length: int, sharded: bool) -> _Saved:
    from torch._subclasses.fake_tensor import FakeTensorMode

    encoder, language, kind = system.encoder, system.language, _TYPES[precision]
    small = replace(system, language=replace(language, depth=min(language.depth, _TRACED)))
    full = {"language": language.depth}  # blocks of each stack
    if not isinstance(encoder, NfResnet):  # which is traced whole
        scales = getattr(encoder, "scales", ())
        full["encoder"] = max(layer % (encoder.depth + 1) for layer in (*scales, encoder.layer))
        behind = encoder.depth - full["encoder"]  # blocks that nothing reads
        more = {"scales": (-behind - 1,) * len(scales)} if scales else {}
        small = replace(small, encoder=replace(encoder, depth=min(full["encoder"], _TRACED) + behind, layer=-behind - 1, **more))
    if isinstance(system.fusion, AdapterPrompts):
        small = replace(small, fusion=replace(system.fusion, layers=min(system.fusion.layers, small.language.depth)))
    if isinstance(system.fusion, Retrieval):  # what is compared is a place a row; fewer blocks need not have its layers
        small = replace(small, fusion=replace(system.fusion, layers=(-1,)))
    if isinstance(system.fusion, GatedCrossAttention):
        full["adapter"] = sum((i + system.fusion.offset) % system.fusion.every == 0 for i in range(language.depth))
        small = replace(small, fusion=replace(system.fusion, every=1, offset=0))
    autocast = torch.autocast("cpu", kind) if precision != "fp32" else nullcontext()
    with torch.enable_grad(), torch.device("meta"):
        model = build(small)
        model.language.set_attn_implementation(_plain_attention())
        _prepare(model, its)
    own = {id(p) for p in lora_parameters(model)}
    half = {id(p) for part, group in _groups(model).items() if part in its.half for p in group if id(p) not in own}
    with torch.enable_grad(), FakeTensorMode():
        _materialise(model, lambda p: kind if sharded else torch.bfloat16 if id(p) in half else torch.float32)
        states = torch.zeros(pictures, encoder.tokens, model.encoder.width)
        head = _word_head(system, its)
        own = {"encoder": model.encoder, "language": model, "adapter": model.fusion}
        stacks = {name: nn.ModuleList(own[name].blocks) for name in full}
        with saved_bytes(model, stacks) as saved, autocast:
            if model.encoder_learns:
                states = model.encoder(torch.zeros(pictures, 3, encoder.size, encoder.size))
            if head is not None and getattr(system.connector, "pool", "") == "class":
                states = states[:, :1]
            seen = None
            instructed = getattr(system.connector, "instructed", False)
            if "queries" not in its.train and (head is None or head.project is None):
                beside = ()
                if instructed:  # read once a row, beside a question as long as it may be
                    states = states[torch.zeros(rows, dtype=torch.long)]
                    question = max(2, min(QUESTION, system.connector.positions, length - system.image_places))
                    beside = torch.zeros(rows, question, dtype=torch.long), torch.ones(rows, question)
                seen = model.connector(states, *beside)
            if "queries" in its.train:
                ids, one = torch.zeros(rows, length, dtype=torch.long), torch.ones(())
                image = model.connector.normed(states)
                losses(
                    model.connector,
                    image,
                    ids,
                    torch.ones_like(ids),
                    torch.arange(rows),
                    rows=one,
                    words=one,
                    decode=0,
                    place=Place(one.device),
                )
            elif head is not None:
                table = model.language.get_input_embeddings().weight[torch.zeros(len(head.bias), dtype=torch.long)]
                for logits in head(states, seen, table):
                    nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros(logits.shape))
            else:
                ids = torch.zeros(rows, length, dtype=torch.long)
                seen = seen if instructed else seen[torch.zeros(rows, dtype=torch.long)]
                if isinstance(system.fusion, AdapterPrompts):
                    model.fusion(model.language, ids, ByRow(seen), 0, use_cache=False)
                elif isinstance(system.fusion, GatedCrossAttention):
                    media = MediaByRow(seen[:, None], torch.ones(rows, dtype=torch.long))
                    model.fusion(model.language, ids, media, 0, use_cache=False)
                else:
                    embeds = model.language.get_input_embeddings()(ids)
                    embeds = embeds.masked_scatter((ids == 0)[..., None], seen.to(embeds.dtype))
                    model.language.get_decoder()(inputs_embeds=embeds, use_cache=False)
    for name, count in full.items():
        for sizes in (saved.blocks, saved.casts):
            traced = sizes[name][: min(count, _TRACED)]
            sizes[name] = [traced[0], *[traced[1]] * (count - 2), traced[-1]] if count > _TRACED else traced
    return saved


def _materialise(model: nn.Module, dtype: Callable[[nn.Parameter], torch.dtype]) -> None:
    """Tensors of the mode in force in place of a model's meta tensors, tied ones tied; an adapter cannot be put into a fake model."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=dtype(old)), requires_grad=old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, old in module._buffers.items():
            module._buffers[name] = None if old is None else torch.zeros(old.shape, dtype=old.dtype)


# ------------------------------------------------------------------------------------------------------------ prediction


def jobs(recipe: System | Alignment) -> list[Stage | Alignment]:
    """What is trained, in order: before an alignment the stages of a policy that starts from nothing."""
    if isinstance(recipe, System):
        return list(recipe.stages)
    return [*(recipe.policy.stages if config.starts_from_nothing(recipe.policy) else ()), recipe]


def predict(recipe: System | Alignment, job: Stage | Alignment, *, processes: int = 1, length: int | None = None) -> Plan:
    """Parameters and memory of one stage in one of ``processes`` processes, with every row ``length`` positions long (default: as long as
    the stage or the language model lets it be)."""
    if sentence := unknown(recipe, job):
        raise RunError(sentence)
    system, compute, optim, its = system_of(recipe), recipe.compute, job.optim, setting(recipe, job)
    shape, words = sized(system), its.head is not None or "queries" in job.train  # whether the language model stands aside
    pictures = math.ceil(optim.batch / processes)
    rows = pictures * (len(job.views) if isinstance(job, Alignment) else 1)
    length = length or min(job.max_length, shape.language.context)
    if "queries" in job.train:
        length = min(length, shape.connector.positions)
    if length <= shape.image_places and not words:
        raise RunError(f"rows of {length} positions cannot hold a picture of {shape.image_places} tokens; give a longer --length")
    sharded = compute.parallel == "fsdp" and processes > 1
    counted = count(system, its)
    saved = trace(recipe, job, pictures=pictures, length=length, sharded=sharded)

    half = 4 if compute.precision == "fp32" else 2
    everything, trained = sum(counted.parts.values()), sum(counted.trained.values())
    states = dict(
        weights=counted.weights, gradients=4 * trained, optimizer=8 * trained + 4 * counted.tensors, ema=4 * trained if optim.ema else 0
    )
    gathered = 0
    if sharded:
        states = {name: math.ceil(value / processes) for name, value in states.items()}
        # Units are the language model's blocks, one at work and the next on its way, and all the rest, whole until the step is over.
        # A stage of words or queries runs no block and is one unit.
        block, blocks, learns = (0, 0, 0) if words else (counted.block, counted.blocks, counted.blocks_trained)
        gathered = half * (everything - blocks + trained - learns + 2 * block)
    elif processes > 1 and optim.accumulate > 1:  # DDP's buckets are the gradients, but not while micro-batches are added up
        states["gradients"] *= 2
    states["reference"] = counted.weights if isinstance(job, Alignment) and job.reference == "frozen" else 0  # not sharded

    head_half = {"language", *(("embeddings",) if shape.language.tied else ())} <= its.half or sharded
    outside = saved.outside + (0 if words else head_bytes(rows, length, shape.language, half, copied=not head_half))
    casts = sum(sum(sizes) for sizes in saved.casts.values())
    plain = outside + sum(sum(blocks) for blocks in saved.blocks.values()) + casts
    kept = outside + sum(saved.inputs[name] * len(blocks) for name, blocks in saved.blocks.items())
    widest = max((max(blocks, default=0) for blocks in saved.blocks.values()), default=0)
    activations = {False: plain, True: min(plain, kept + max(casts, widest))}
    scored = 0 if words else rows * (length - shape.image_places)
    memory = {**states, "gathered": gathered, "activations": activations[compute.checkpointing]}
    logits = logits_bytes(scored, shape.language.vocab, shape.language.width, half, cpu=compute.device == "cpu")
    # A reference is asked while the policy waits for its backward: a second workspace.
    memory["logits"] = logits * (2 if isinstance(job, Alignment) and job.reference != "cached" else 1)
    full = 0 if words else 4 * rows * length * shape.language.vocab
    passing = _passing(job, shape, pictures, 2 if "encoder" in its.half or sharded else 4)
    rates = None
    if optim.layer_decay != 1:
        rates = tuple(optim.lr_of.get("encoder", optim.lr) * optim.layer_decay**down for down in (counted.tower_layers, 1))
    return Plan(job.name, rows, pictures, length, dict(counted.parts), trained, memory, passing, activations, full, rates)


def head_bytes(rows: int, length: int, language: LanguageModel, size: int, *, copied: bool) -> int:
    """What ``linear_logp`` saves for backward: hidden states in fp32 (in half types a copy, and one of a head in fp32), labels and its
    statistics; no logits."""
    half = 2 * language.width * (rows * length + copied * language.vocab) if size == 2 else 0
    return rows * length * (4 * language.width + 8 + 12 * 4) + half


def logits_bytes(scored: int, vocab: int, width: int, size: int, *, cpu: bool) -> int:
    """What ``linear_logp`` takes beside the activations: its workspace for logits and the hidden states of the scored rows, [n, D]."""
    room = _WORKSPACE_MB["cpu" if cpu else "cuda"] * 2**20
    logits = scored * vocab * size
    return (logits if logits <= room else max(room, scored * _LEAST_COLUMNS * size)) + scored * width * size


def _passing(job: Stage | Alignment, system: System, pictures: int, size: int) -> int:
    """The frozen tower at work: every hidden state is kept until the read one is picked, and a block's widest pair. Built-in data has them
    computed beforehand."""
    given = getattr(job.data, "path", None) is not None or job.data.name not in BUILT_IN
    if not given or "encoder" in job.train or (job.lora is not None and job.lora.part == "encoder"):
        return 0
    encoder = system.encoder
    if isinstance(encoder, NfResnet):  # the stem's grid is its largest: before and after the activation of the first block, and pooled
        return pictures * size * 3 * encoder.stem * (encoder.size // 2) ** 2
    places = pictures * ((encoder.size // encoder.patch) ** 2 + 1)
    return places * size * ((encoder.depth + 1) * encoder.width + 2 * encoder.ffn)


# ---------------------------------------------------------------------------------------------------------------- advice


@dataclass(frozen=True)
class Move:
    """Options that take less memory. ``same``: what is learnt stays what it is, but for rounding."""

    flags: dict[str, str]
    same: bool
    processes: int | None = None

    @property
    def batch(self) -> bool:
        """Whether it splits the micro-batch: there are many of these, each smaller."""
        return any(key.endswith("optim.batch") for key in self.flags)

    def __str__(self) -> str:
        run = f"torchrun --nproc-per-node {self.processes} .. " if self.processes else ""
        return run + " ".join(f"--{key} {value}" for key, value in self.flags.items())


def moves(recipe: System | Alignment, job: Stage | Alignment, processes: int) -> list[Move]:
    """Everything that may make a stage smaller, whether or not it does."""
    model = "policy." if isinstance(recipe, Alignment) else ""
    at = "" if isinstance(job, Alignment) else f"{model}stages.{job.name}."
    optim, out = job.optim, []
    out.append(Move({"compute.checkpointing": "true"}, True))
    if recipe.compute.precision == "fp32":
        out.append(Move({"compute.precision": "bf16"}, True))
    if processes > 1:
        out.append(Move({"compute.parallel": "fsdp"}, True))
    if isinstance(job, Alignment) and job.reference != "cached":
        out.append(Move({"reference": "cached"}, True))
    part = 2
    while optim.batch % part == 0 and optim.batch // part % processes == 0:
        out.append(Move({f"{at}optim.batch": str(optim.batch // part), f"{at}optim.accumulate": str(optim.accumulate * part)}, True))
        part *= 2
    if optim.ema:
        out.append(Move({f"{at}optim.ema": "0"}, False))
    rest = ",".join(part for part in job.train if part not in ("language", "embeddings"))
    adapters = {f"{at}train": rest or "[]", f"{at}lora.rank": "128"}
    system = system_of(recipe)
    if "language" in job.train:
        out.append(Move(adapters, False))
    if system.language.quantize == "none" and system.language.weights:  # `after` drops it where it cannot be
        out.append(Move({**(adapters if "language" in job.train else {}), f"{model}language.quantize": "4bit"}, False))
    half = job.max_length // 2
    if half >= system.image_places + 64:
        out.append(Move({f"{at}max_length": str(half)}, False))
    return out


def after(recipe: System | Alignment, move: Move) -> System | Alignment | None:
    """The recipe with a move made, None where it does not hold together then."""
    problems: list[str] = []
    changed = config.apply(recipe, dict(move.flags), problems)
    return None if problems or config.check(changed, processes=1) else changed


def _stage(recipe: System | Alignment, name: str) -> Stage | Alignment:
    found = {job.name: job for job in jobs(recipe)}
    if name not in found:
        raise RunError(f"{recipe.name} has no stage {name!r}{nearest(name, found)}; there are {', '.join(found)}")
    return found[name]


def advice(
    recipe: System | Alignment, stage: str, limit: float, *, processes: int = 1, length: int | None = None
) -> tuple[list[tuple[Move, int]], Plan]:
    """Moves that together bring a stage below ``limit`` bytes, each with what it saves on top of those before it, and the plan they end in.

    First what leaves the learning as it is; what changes it only where not even the smallest micro-batch fits; then the largest
    micro-batch that does; more processes last. The plan may still be too large.
    """

    def price(recipe, processes=processes) -> Plan:
        return predict(recipe, _stage(recipe, stage), processes=processes, length=length)

    def options(recipe) -> list[tuple[Move, Any]]:
        found = ((move, after(recipe, move)) for move in moves(recipe, _stage(recipe, stage), processes))
        return [(m, r) for m, r in found if r is not None and not (length and any(key.endswith("max_length") for key in m.flags))]

    def smallest(recipe):
        return next((r for move, r in reversed(options(recipe)) if move.batch), recipe)

    def best(recipe, *, same: bool, size) -> tuple[Move, Any] | None:
        """The move that is enough and changes least, else the one that saves most."""
        now, ranked = size(recipe), []
        for move, changed in options(recipe):
            if move.same == same and not move.batch and now - (then := size(changed)) > 0.01 * now:
                ranked.append(((then > limit, then if then > limit else -then), move, changed))
        return min(ranked, key=lambda item: item[0])[1:] if ranked else None

    chosen, now = [], recipe
    while price(now).total > limit and (found := best(now, same=True, size=lambda r: price(r).total)):
        chosen, now = [*chosen, found[0]], found[1]
    while price(smallest(now)).total > limit and (found := best(now, same=False, size=lambda r: price(smallest(r)).total)):
        chosen, now = [*chosen, found[0]], found[1]
    if price(now).total > limit:
        batches = [(move, changed) for move, changed in options(now) if move.batch]
        fitting = [pair for pair in batches if price(pair[1]).total <= limit]
        if found := (fitting[:1] or batches[-1:]):
            chosen, now = [*chosen, found[0][0]], found[0][1]
    more = processes
    while price(now).total > limit and more < 64:
        more *= 2
        move = Move({"compute.parallel": "fsdp"}, True, more)
        wider = config.apply(recipe, {key: value for m in [*chosen, move] if not m.batch for key, value in m.flags.items()}, [])
        if not config.check(wider, processes=more) and (end := price(wider, more)).total <= limit:
            kept = [m for m in chosen if not m.batch]
            return _priced(recipe, [*kept, move], price), end
    return _priced(recipe, chosen, price), price(now)


def _priced(recipe: System | Alignment, chosen: list[Move], price: Callable[..., Plan]) -> list[tuple[Move, int]]:
    out, now = [], price(recipe).total
    for move in chosen:
        recipe = config.apply(recipe, dict(move.flags), [])
        then = price(recipe, move.processes).total if move.processes else price(recipe).total
        out.append((move, now - then))
        now = then
    return out


def out_of_memory_hint(recipe: System | Alignment, stage: str, *, processes: int = 1, length: int | None = None) -> str:
    """One sentence for a stage that ran out of memory: what was predicted, and the three changes that save most, each by itself."""
    try:
        return f"out of memory in {stage}, {_hint(recipe, stage, processes, length)}; `mmfast plan` shows all of it"
    except Exception as error:  # it is called while another error is handled, which must not be lost
        return f"out of memory in {stage}; `mmfast plan` names what to change (its own prediction failed: {type(error).__name__}: {error})"


def _hint(recipe: System | Alignment, stage: str, processes: int, length: int | None) -> str:
    before, found = predict(recipe, _stage(recipe, stage), processes=processes, length=length), {}
    for move in moves(recipe, _stage(recipe, stage), processes):
        if (changed := after(recipe, move)) is not None:
            then = predict(changed, _stage(changed, stage), processes=processes, length=None if "max_length" in str(move) else length)
            kind = next(iter(move.flags)).rpartition(".")[2]  # of several batch sizes the first is named, half
            if before.total > then.total and kind not in found:
                found[kind] = (before.total - then.total, move)
    best = sorted(found.values(), key=lambda pair: -pair[0])[:3]
    options = [f"{move} (saves {gib(saved)})" for saved, move in best]
    said = ", ".join(options[:-1]) + " or " * (len(options) > 1) + "".join(options[-1:])
    need = f"which needs about {gib(before.total)} a process with rows of {before.length} positions"
    return need + (f": try {said}" if said else "")


# ------------------------------------------------------------------------------------------------------------------ page


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def page(recipe: System | Alignment, *, gpu_memory: float | None = None, processes: int = 1, length: int | None = None) -> str:
    """The whole prediction as text."""
    if gpu_memory is not None and not gpu_memory > 0:
        raise RunError(f"--gpu-memory {gpu_memory}: expected GiB, more than 0")
    told = [job for job in jobs(recipe) if unknown(recipe, job) is None]
    plans = [predict(recipe, job, processes=processes, length=length) for job in told]
    compute, system = recipe.compute, system_of(recipe)
    shared = f"{processes} processes ({compute.parallel})" if processes > 1 else "one process"
    lines = [f"{recipe.name}: {compute.precision}, {shared}, checkpointing {'on' if compute.checkpointing else 'off'}"]
    lines += [*at_hand(system)[1], ""]

    trains = {part: [where for job in jobs(recipe) if (where := _where(job, part))] for part in GROUPS}
    adapters = [job.name for job in jobs(recipe) if job.lora is not None]
    whole = count(system, Setting()).parts
    rows = [("part", "parameters", "trains in")]
    rows += [(part, f"{whole[part]:,}", ", ".join(trains[part]) or "-") for part in GROUPS if whole[part]]
    rows.append(("all", f"{sum(whole.values()):,}", f"adapters in {', '.join(adapters)}" if adapters else ""))
    lines += [*columns(rows, right=(1,)), ""]
    if sentences := [unknown(recipe, job) for job in jobs(recipe) if job not in told]:
        lines += [*sentences, ""]
    if not plans:
        return "\n".join(lines).rstrip()

    def row(name: str, value) -> tuple[str, ...]:
        return (name, *(value(plan) for plan in plans))

    def held(name: str) -> tuple[str, ...]:
        return row(name, lambda plan: gib(plan.memory[name]) if plan.memory[name] else "-")

    quantized = ", 4bit" if system.language.quantize == "4bit" else ""
    table = [row("stage", lambda p: p.stage), row("trained parameters", lambda p: f"{p.trainable:,}")]
    if any(plan.tower_rates for plan in plans):
        table.append(row("rates in the tower", lambda p: f"{p.tower_rates[0]:.2g} .. {p.tower_rates[1]:.2g}" if p.tower_rates else "-"))
    table.append(row("rows x positions", lambda p: f"{p.rows} x {p.length}" if p.full_logits else f"{p.pictures} pictures"))
    table += [held(name) for name in plans[0].memory if any(plan.memory[name] for plan in plans)]
    table.append(row("tower, before the rest", lambda p: gib(p.passing) if p.passing else "-"))
    table.append(row("together", lambda p: gib(p.total)))
    if gpu_memory:
        table.append(row(f"fits {gpu_memory:g} GiB", lambda p: "yes" if p.total <= _USABLE * gpu_memory * GIB else "NO"))
    end = columns(table, right=range(1, 99))
    lines += [f"memory of a process{quantized}", *end, ""]
    if any("new_tokens" in job.train for job in told):
        lines += [
            "trained parameters hold the whole table of embeddings: its new rows alone learn, and gradients and optimiser have all",
            "",
        ]
    other = "without" if compute.checkpointing else "with"
    aside = [row(f"activations {other} checkpointing", lambda p: gib(p.activations[not compute.checkpointing]))]
    aside.append(row("full logits in fp32 (not made)", lambda p: gib(p.full_logits) if p.full_logits else "-"))
    lines += ["for comparison", *columns(aside, right=range(1, 99))]
    for plan in plans:
        if gpu_memory and plan.total > _USABLE * gpu_memory * GIB:
            lines += ["", *_advice_lines(recipe, plan, gpu_memory, processes, length)]
    return "\n".join(lines)


def _advice_lines(recipe, plan: Plan, gpu_memory: float, processes: int, length: int | None) -> list[str]:
    limit = _USABLE * gpu_memory * GIB
    chosen, end = advice(recipe, plan.stage, limit, processes=processes, length=length)
    if not chosen:
        return [f"{plan.stage}: nothing here makes it smaller; it takes {gib(plan.total)}"]
    rows, changed = [], False
    for move, saved in chosen:
        changed = changed or not move.same
        rows.append((f"  {move}", f"saves {gib(saved)}", "" if move.same else "changes what is learnt"))
    verdict = f"fits, with {gib(end.total)}" if end.total <= limit else f"still takes {gib(end.total)}: more devices, or a smaller model"
    return [f"{plan.stage}: with all of these it {verdict}", *columns(rows, right=(1,))]


def _where(job: Stage | Alignment, part: str) -> str:
    """A job's name if the part trains in it, with what of it does where that is not all; else nothing."""
    inner = {"encoder": ("last_block", "last block"), "embeddings": ("new_tokens", "new rows")}
    name, words = inner.get(part, ("", ""))
    return job.name if _trains(job, part) else f"{job.name} ({words})" if name in job.train else ""


def _trains(job: Stage | Alignment, part: str) -> bool:
    inner = {"embeddings": "language", "connector": "queries"}
    return part in job.train or inner.get(part) in job.train
