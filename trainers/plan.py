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

from mmfast.models import build
from mmfast.models.build import MultimodalModel
from mmfast.models.fusion import ByRow
from mmfast.ops.linear_logp import _LEAST_COLUMNS, _WORKSPACE_MB
from mmfast.spec import PARTS, AdapterPrompts, Alignment, Compute, LanguageModel, Lora, Stage, System, nearest

from . import config
from .checkpoint import RunError
from .describe import columns

GIB = 2**30
BUILT_IN = ("shapes", "easy_vqa", "shapes_own")
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

    @property
    def total(self) -> int:
        step = self.memory["activations"] + self.memory["logits"]
        return sum(self.memory.values()) - step + max(step, self.passing)


# ------------------------------------------------------------------------------------------------------------- the model


def sized(system: System) -> System:
    """The system without weights, at the sizes of its weights: those the recipe names, or a local folder's own."""
    from transformers import AutoConfig

    encoder, language = replace(system.encoder, weights=None), replace(system.language, weights=None)
    if system.encoder.weights and (Path(system.encoder.weights) / "config.json").is_file():
        found = AutoConfig.from_pretrained(system.encoder.weights)
        found = getattr(found, "vision_config", found)
        encoder = replace(
            encoder, width=found.hidden_size, depth=found.num_hidden_layers, heads=found.num_attention_heads, ffn=found.intermediate_size,
            patch=found.patch_size, size=found.image_size,
        )  # fmt: skip
    if system.language.weights and (Path(system.language.weights) / "config.json").is_file():
        found = AutoConfig.from_pretrained(system.language.weights)
        language = replace(
            language, family=found.model_type, vocab=found.vocab_size, width=found.hidden_size, depth=found.num_hidden_layers,
            heads=found.num_attention_heads, kv_heads=getattr(found, "num_key_value_heads", found.num_attention_heads),
            ffn=found.intermediate_size, context=found.max_position_embeddings, tied=bool(found.tie_word_embeddings),
        )  # fmt: skip
    if not language.vocab:  # the shapes world's words
        from mmfast.data.synthetic import World

        language = replace(language, vocab=len(World().vocabulary))
    return replace(system, encoder=encoder, language=language, image=replace(system.image, size=encoder.size))


def _blocks(model: MultimodalModel) -> dict[str, nn.ModuleList]:
    tower = getattr(model.encoder.vision, "vision_model", model.encoder.vision)
    return {"encoder": tower.encoder.layers, "language": model.language.get_decoder().layers}


def _prepare(model: MultimodalModel, train: tuple[str, ...], lora: Lora | None) -> list[nn.Parameter]:
    """Sets what learns, as the loop does; returns it."""
    if lora is not None:
        import re

        from peft import LoraConfig, inject_adapter_in_model

        ends = "|".join(re.escape(target) for target in lora.targets)
        options = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=rf"(.*\.)?({ends})")
        inject_adapter_in_model(options, model.part(lora.part))
    model.train_only(train)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
    model.train()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class _Count:
    """Parameters of a prepared model."""

    parts: dict[str, int]
    trained: dict[str, int]
    tensors: int  # that are trained
    linear: int  # frozen weights of the language model's blocks, which 4bit holds
    block: int  # the largest block
    blocks: int  # all blocks


_counts: dict[str, _Count] = {}


def count(system: System, train: tuple[str, ...], lora: Lora | None, words: bool = False) -> _Count:
    key = repr((system, train, lora, words))
    if key not in _counts:
        with torch.device("meta"):
            model = build(sized(system))
            learnt = {id(p) for p in _prepare(model, train, lora)}
        embeddings = {id(p) for p in model.part("embeddings").parameters()}
        groups = {name: [p for p in model.part(name).parameters() if name != "language" or id(p) not in embeddings] for name in PARTS}
        parts = {name: sum(p.numel() for p in group) for name, group in groups.items()}
        trained = {name: sum(p.numel() for p in group if id(p) in learnt) for name, group in groups.items()}
        stacks = _blocks(model)
        linear = [p for n, p in stacks["language"].named_parameters() if p.ndim == 2 and id(p) not in learnt and ".lora_" not in n]
        sizes = [sum(p.numel() for p in block.parameters()) for stack in stacks.values() for block in stack]
        tensors = len(learnt)
        if words:
            head = [p.numel() for p in _word_head(system).parameters()]
            trained["word head"], parts["word head"], tensors = sum(head), sum(head), tensors + len(head)
        _counts[key] = _Count(parts, trained, tensors, sum(p.numel() for p in linear), max(sizes), sum(sizes))
    return _counts[key]


def _word_head(system: System) -> nn.Module:
    from mmfast.data.synthetic import WorldConfig

    from .supervised import WordHead

    c = WorldConfig()
    with torch.device("meta"):
        return WordHead(system.encoder.width, c.classes, c.colours + c.shapes + 6)


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


def trace(job: Stage | Alignment, system: System, precision: str, *, pictures: int, length: int) -> _Saved:
    """What autograd saves of a step's forward, head excluded, with all blocks. Bytes grow in a straight line with the batch, so that two
    small ones, traced once, give all."""
    words = isinstance(job, Stage) and job.objective == "words"
    views = len(job.views) if isinstance(job, Alignment) else 1
    model = replace(system, name="", paper="", stages=(), compute=Compute())
    key = repr((model, job.train, job.lora, words, views, precision, length))
    if key not in _traces:
        _traces[key] = tuple(_trace(job, sized(system), precision, n * views, n, length, words) for n in (2, 3))
    two, three = _traces[key]

    def at(x: int, y: int) -> int:
        return x + (pictures - 2) * (y - x)

    def each(x: dict[str, list[int]], y: dict[str, list[int]]) -> dict[str, list[int]]:
        return {name: [at(*pair) for pair in zip(x[name], y[name], strict=True)] for name in x}

    inputs = {name: at(two.inputs[name], three.inputs[name]) for name in two.inputs}
    return _Saved(at(two.outside, three.outside), each(two.blocks, three.blocks), inputs, each(two.casts, three.casts))


def _trace(job, system: System, precision: str, rows: int, pictures: int, length: int, words: bool) -> _Saved:
    from torch._subclasses.fake_tensor import FakeTensorMode

    encoder, language, kind = system.encoder, system.language, _TYPES[precision]
    read = encoder.layer % (encoder.depth + 1)
    behind = encoder.depth - read  # blocks that nothing reads
    depth = {"encoder": min(read, _TRACED) + behind, "language": min(language.depth, _TRACED)}
    small = replace(
        system, encoder=replace(encoder, depth=depth["encoder"], layer=-behind - 1), language=replace(language, depth=depth["language"])
    )
    if isinstance(system.fusion, AdapterPrompts):
        small = replace(small, fusion=replace(system.fusion, layers=min(system.fusion.layers, depth["language"])))
    autocast = torch.autocast("cpu", kind) if precision != "fp32" else nullcontext()
    with torch.enable_grad(), torch.device("meta"):
        model = build(small)
        model.language.set_attn_implementation(_plain_attention())
        learnt = {id(p) for p in _prepare(model, job.train, job.lora)}
    with torch.enable_grad(), FakeTensorMode():
        _materialise(model, lambda p: torch.float32 if id(p) in learnt else kind)
        states = torch.zeros(pictures, encoder.tokens, encoder.width)
        head = _fake_word_head(system) if words else None
        with saved_bytes(model, _blocks(model)) as saved, autocast:
            if "encoder" in job.train or (job.lora and job.lora.part == "encoder"):
                states = model.encoder(torch.zeros(pictures, 3, encoder.size, encoder.size))
            seen = model.connector(states)
            if words:
                table = model.language.get_input_embeddings().weight[torch.zeros(len(head.bias), dtype=torch.long)]
                for logits in head(states, seen, table):
                    nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros(logits.shape))
            else:
                ids = torch.zeros(rows, length, dtype=torch.long)
                seen = seen[torch.zeros(rows, dtype=torch.long)]
                if isinstance(system.fusion, AdapterPrompts):
                    model.fusion(model.language, ids, ByRow(seen), 0, use_cache=False)
                else:
                    embeds = model.language.get_input_embeddings()(ids)
                    embeds = embeds.masked_scatter((ids == 0)[..., None], seen.to(embeds.dtype))
                    model.language.get_decoder()(inputs_embeds=embeds, use_cache=False)
    for name, full in (("encoder", read), ("language", language.depth)):
        for sizes in (saved.blocks, saved.casts):
            traced = sizes[name][: min(full, _TRACED)]
            sizes[name] = [traced[0], *[traced[1]] * (full - 2), traced[-1]] if full > _TRACED else traced
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


def _fake_word_head(system: System) -> nn.Module:
    shape = _word_head(system)
    return type(shape)(system.encoder.width, shape.classes.out_features, len(shape.bias))


# ------------------------------------------------------------------------------------------------------------ prediction


def jobs(recipe: System | Alignment) -> list[Stage | Alignment]:
    return [recipe] if isinstance(recipe, Alignment) else list(recipe.stages)


def predict(recipe: System | Alignment, job: Stage | Alignment, *, processes: int = 1, length: int | None = None) -> Plan:
    """Parameters and memory of one stage in one of ``processes`` processes, with every row ``length`` positions long (default: as long as
    the stage or the language model lets it be)."""
    system = recipe.policy if isinstance(recipe, Alignment) else recipe
    compute, optim, words = recipe.compute, job.optim, isinstance(job, Stage) and job.objective == "words"
    shape = sized(system)
    pictures = math.ceil(optim.batch / processes)
    rows = pictures * (len(job.views) if isinstance(job, Alignment) else 1)
    length = length or min(job.max_length, shape.language.context)
    if length <= shape.image_places:
        raise RunError(f"rows of {length} positions cannot hold a picture of {shape.image_places} tokens; give a longer --length")
    counted = count(system, job.train, job.lora, words)
    saved = trace(job, system, compute.precision, pictures=pictures, length=length)

    half = 4 if compute.precision == "fp32" else 2
    trained = sum(counted.trained.values())
    frozen = sum(counted.parts.values()) - trained
    held = counted.linear if system.language.quantize == "4bit" else 0
    weights = 4 * trained + half * (frozen - held) + math.ceil(held * _NF4_BITS / 8)
    reference = 0
    if isinstance(job, Alignment) and job.reference == "frozen":
        changing = {*job.train, *((job.lora.part,) if job.lora else ()), *(("embeddings",) if "language" in job.train else ())}
        reference = half * sum(counted.parts[part] for part in changing)
    states = dict(weights=weights, gradients=4 * trained, optimizer=8 * trained + 4 * counted.tensors, ema=4 * trained if optim.ema else 0)
    states["reference"], gathered, casts = reference, 0, sum(sum(sizes) for sizes in saved.casts.values())
    if compute.parallel == "fsdp" and processes > 1:
        states = {name: math.ceil(value / processes) for name, value in states.items()}
        outside = sum(counted.parts.values()) - counted.blocks
        gathered, casts = half * (outside + 2 * counted.block), 0  # a block at work and the next one on its way

    learns_head = "language" in job.train or (shape.language.tied and "embeddings" in job.train)
    outside = saved.outside + (0 if words else head_bytes(rows, length, shape.language, half, trained=learns_head))
    plain = outside + sum(sum(blocks) for blocks in saved.blocks.values()) + casts
    kept = outside + sum(saved.inputs[name] * len(blocks) for name, blocks in saved.blocks.items())
    widest = max((max(blocks, default=0) for blocks in saved.blocks.values()), default=0)
    activations = {False: plain, True: min(plain, kept + max(casts, widest))}
    scored = 0 if words else rows * (length - shape.image_places)
    memory = {**states, "gathered": gathered, "activations": activations[compute.checkpointing]}
    memory["logits"] = logits_bytes(scored, shape.language.vocab, shape.language.width, half, cpu=compute.device == "cpu")
    full = 0 if words else 4 * rows * length * shape.language.vocab
    passing = _passing(job, shape, pictures, half)
    return Plan(job.name, rows, pictures, length, dict(counted.parts), trained, memory, passing, activations, full)


def head_bytes(rows: int, length: int, language: LanguageModel, size: int, *, trained: bool) -> int:
    """What ``linear_logp`` saves for backward: hidden states in fp32 (in half types a copy, and one of a head that trains), labels and its
    statistics; no logits."""
    half = 2 * language.width * (rows * length + trained * language.vocab) if size == 2 else 0
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
    at, model = ("", "policy.") if isinstance(job, Alignment) else (f"stages.{job.name}.", "")
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
    system = recipe.policy if isinstance(recipe, Alignment) else recipe
    if "language" in job.train:
        out.append(Move(adapters, False))
    if system.language.quantize == "none" and system.language.weights:
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
    plans = [predict(recipe, job, processes=processes, length=length) for job in jobs(recipe)]
    compute, system = recipe.compute, recipe.policy if isinstance(recipe, Alignment) else recipe
    shared = f"{processes} processes ({compute.parallel})" if processes > 1 else "one process"
    lines = [f"{recipe.name}: {compute.precision}, {shared}, checkpointing {'on' if compute.checkpointing else 'off'}", ""]

    trains = {part: [job.name for job in jobs(recipe) if _trains(job, part)] for part in PARTS}
    adapters = [job.name for job in jobs(recipe) if job.lora is not None]
    whole = count(system, (), None).parts
    rows = [("part", "parameters", "trains in")]
    rows += [(part, f"{whole[part]:,}", ", ".join(trains[part]) or "-") for part in PARTS if whole[part]]
    rows.append(("all", f"{sum(whole.values()):,}", f"adapters in {', '.join(adapters)}" if adapters else ""))
    lines += [*columns(rows, right=(1,)), ""]

    def row(name: str, value) -> tuple[str, ...]:
        return (name, *(value(plan) for plan in plans))

    def held(name: str) -> tuple[str, ...]:
        return row(name, lambda plan: gib(plan.memory[name]) if plan.memory[name] else "-")

    quantized = ", 4bit" if system.language.quantize == "4bit" else ""
    table = [row("stage", lambda p: p.stage), row("trained parameters", lambda p: f"{p.trainable:,}")]
    table.append(row("rows x positions", lambda p: f"{p.rows} x {p.length}" if p.full_logits else f"{p.pictures} pictures"))
    table += [held(name) for name in plans[0].memory if any(plan.memory[name] for plan in plans)]
    table.append(row("tower, before the rest", lambda p: gib(p.passing) if p.passing else "-"))
    table.append(row("together", lambda p: gib(p.total)))
    if gpu_memory:
        table.append(row(f"fits {gpu_memory:g} GiB", lambda p: "yes" if p.total <= _USABLE * gpu_memory * GIB else "NO"))
    end = columns(table, right=range(1, 99))
    lines += [f"memory of a process{quantized}", *end, ""]
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


def _trains(job: Stage | Alignment, part: str) -> bool:
    return part in job.train or (part == "embeddings" and "language" in job.train)
