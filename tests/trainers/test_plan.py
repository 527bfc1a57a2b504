"""What `mmfast plan` predicts against what is there: parameters and states exactly, activations as autograd holds them, the peak as it lives."""

import copy
import json
import re
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmfast.trainers import config, plan
from mmfast.trainers.__main__ import main
from mmfast.trainers.checkpoint import RunError
from mmfast.trainers.plan import GROUPS
from mmfast.trainers.supervised import Session
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.data.synthetic import World
from mmfast.models import add_lora, build
from mmfast.models.tokenizer import word_tokenizer
from mmfast.ops import linear_logp
from mmfast.spec import Clip, Dino, Fixed, LanguageModel, Lora, Mlp, Siglip, to_dict

NAMES = list(config.recipe_names())
TINY = config.load_recipe("llava", tiny=True)
WHOLE = ("connector", "language", "embeddings")
LORA = Lora(rank=8)


def one_stage(train=WHOLE, batch=4, length=64, width=64, depth=3, vocab=400, lora=None, precision="fp32", checkpointing=False):
    """A LLaVA of one stage between tiny and small."""
    stage = replace(TINY.stages[-1], train=train, lora=lora, max_length=length, optim=replace(TINY.stages[-1].optim, batch=batch))
    language = replace(TINY.language, context=4096, vocab=vocab, width=width, heads=4, kv_heads=4, ffn=2 * width, depth=depth)
    compute = replace(TINY.compute, precision=precision, checkpointing=checkpointing, device="cpu")
    return replace(TINY, language=language, stages=(stage,), compute=compute)


def real(recipe):
    """The model of such a recipe with storage, as a loop would hold it, and what learns."""
    stage = recipe.stages[0]
    model = build(recipe)
    if stage.lora is not None:
        add_lora(model, stage.lora)
    learnt = model.train_only(stage.train, lora=stage.lora is not None)
    if recipe.compute.checkpointing:
        model.checkpoint_activations()
    model.train()
    return model, learnt


def answer_loss(model, hidden, labels):
    head = model.language.get_output_embeddings()
    return -linear_logp(hidden[:, :-1], head.weight, labels[:, 1:], head.bias).sum()


def loss_of(recipe, model):
    """A step's loss with every position after the picture scored, which is what is predicted for."""
    stage, tokens = recipe.stages[0], recipe.encoder.tokens
    rows, length = stage.optim.batch, stage.max_length
    ids = torch.randint(5, recipe.language.vocab - 1, (rows, length))
    ids[:, 1 : 1 + tokens] = model.image_token
    labels = ids.clone()
    labels[:, : 1 + tokens] = -100
    if "encoder" in stage.train:
        images = dict(pixel_values=torch.randn(rows, 3, recipe.image.size, recipe.image.size))
    else:
        images = dict(image_states=torch.randn(rows, tokens, recipe.encoder.width))
    with torch.autocast("cpu", torch.bfloat16) if recipe.compute.precision == "bf16" else nullcontext():
        return answer_loss(model, model.hidden(ids, **images), labels)


# ------------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_built_tiny_model(name):
    recipe = config.load_recipe(name, tiny=True)
    system = getattr(recipe, "policy", recipe)
    if "easy_vqa" in [stage.data.name for stage in system.stages]:
        pytest.importorskip("easy_vqa", reason="the words of easy-vqa are in its package")
    model = Session(system, seed=0).model
    assert "all " in plan.page(recipe)
    for job in plan.jobs(recipe):
        if sentence := plan.unknown(recipe, job):
            with pytest.raises(RunError, match=re.escape(sentence)):
                plan.predict(recipe, job)
            assert sentence in plan.page(recipe)
            continue
        predicted = plan.predict(recipe, job, length=100)
        sizes = {part: sum(p.numel() for p in model.part(part).parameters()) for part in GROUPS}
        sizes["language"] -= sizes["embeddings"]
        head = predicted.parameters.pop("word head", 0)
        assert predicted.parameters == sizes
        assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
        assert predicted.trainable == sum(p.numel() for p in model.train_only(job.train)) + head


def test_a_trace_of_fewer_blocks_need_not_have_the_layers_that_are_read():
    recipe = config.load_recipe("fromage", tiny=True)
    deep = replace(recipe, language=replace(recipe.language, depth=9))
    read = replace(deep, fusion=replace(deep.fusion, layers=(7, -1)))
    job = deep.stages[1]  # the text stage
    assert plan.predict(read, job).memory["activations"] == plan.predict(deep, job).memory["activations"] > 0


def test_the_word_head_is_the_one_that_trains():
    from mmfast.trainers import supervised

    source = supervised.Session(TINY, seed=0).source(TINY.stages[0].data, "bare")
    names, _, classes = source.words()
    head = supervised.WordHead(TINY.encoder.width, classes.shape[1], len(names))
    assert plan.predict(TINY, TINY.stages[0]).parameters["word head"] == sum(p.numel() for p in head.parameters())


def test_published_counts():
    """LLaVA and LLaVA-1.5 of 7B, and rank 128 adapters on it, as their checkpoints have them."""
    llava = config.load_recipe("llava")
    assert plan.count(llava, plan.Setting()).parts == {
        "encoder": 303_179_776,
        "connector": 4_198_400,
        "adapter": 0,
        "language": 6_738_415_616 - 32_000 * 4096,
        "embeddings": 32_000 * 4096,
    }
    fromage = config.load_recipe("fromage")
    two = replace(fromage, fusion=replace(fromage.fusion, layers=(16, -1)))
    adapters = [plan.count(system, plan.Setting()).parts["adapter"] for system in (fromage, two)]
    assert adapters == [262_400 + 1_048_832 + 1, 262_400 + 2 * 1_048_832 + 1]
    larger = replace(llava, language=replace(llava.language, width=5120, depth=40, heads=40, kv_heads=40, ffn=13824))
    assert plan.count(larger, plan.Setting()).parts["connector"] == 5_248_000
    newer = replace(llava, encoder=replace(llava.encoder, size=336), image=Fixed(size=336), connector=Mlp(2))
    counted = plan.count(newer, plan.Setting(("connector",), Lora(rank=128)))
    adapters = 319_815_680
    assert counted.parts["encoder"] == 303_507_456
    assert counted.parts["connector"] == 20_979_712
    assert sum(counted.parts.values()) == 7_062_902_784 + adapters
    assert sum(counted.trained.values()) == 340_795_392


def test_sizes_of_a_local_folder_come_first(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig

    LlamaConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, vocab_size=123
    ).save_pretrained(tmp_path / "text")
    CLIPVisionConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=16
    ).save_pretrained(tmp_path / "tower")
    llava = config.load_recipe("llava")
    there = replace(
        llava,
        language=replace(llava.language, weights=str(tmp_path / "text")),
        encoder=replace(llava.encoder, weights=str(tmp_path / "tower")),
    )
    parts = plan.count(there, plan.Setting()).parts
    assert parts["embeddings"] == 123 * 96
    assert parts["connector"] == 48 * 96 + 96


# ----------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize(
    "options", [dict(), dict(train=("connector",)), dict(train=(), lora=LORA), dict(precision="bf16", train=("connector",), lora=LORA)]
)
def test_weights_gradients_and_optimizer_are_those_after_a_step(options):
    recipe = one_stage(**options)
    model, learnt = real(recipe)
    optimizer = torch.optim.AdamW(learnt, lr=1e-3, fused=True)
    loss_of(recipe, model).backward()
    optimizer.step()
    memory = plan.predict(recipe, recipe.stages[0]).memory
    assert memory["weights"] == sum(p.nbytes for p in model.parameters())
    assert memory["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert memory["optimizer"] == sum(t.nbytes for state in optimizer.state.values() for t in state.values())


def test_shards_copies_and_quarters():
    recipe = config.load_recipe("llava")
    instruct = recipe.stages[1]
    alone = plan.predict(recipe, instruct)
    shared = replace(recipe, compute=replace(recipe.compute, parallel="fsdp"))
    eighth = plan.predict(shared, instruct, processes=8)
    for name in ("weights", "gradients", "optimizer"):
        assert eighth.memory[name] == -(-alone.memory[name] // 8)
    assert (eighth.rows, eighth.memory["gathered"] > 0) == (4, True)
    assert plan.predict(recipe, instruct, processes=8).memory["weights"] == alone.memory["weights"], "ddp: every process has all"
    averaged = replace(instruct, optim=replace(instruct.optim, ema=0.999))
    assert plan.predict(recipe, averaged).memory["ema"] == 4 * alone.trainable
    # 4bit: the linear weights of the blocks at 4.127 bits in place of bf16, the rest as it was.
    adapted = replace(instruct, train=("connector",), lora=LORA)
    quantized = replace(recipe, language=replace(recipe.language, quantize="4bit"))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    saved = plan.predict(recipe, adapted).memory["weights"] - plan.predict(quantized, adapted).memory["weights"]
    assert saved == pytest.approx(linear * (2 - 4.127 / 8), abs=1)


def test_references():
    """A frozen reference is a copy of the whole model, in no shards; asked beside the policy, it has a workspace of its own."""
    dpo = config.load_recipe("dpo", tiny=True)
    cached = plan.predict(dpo, dpo, length=64)
    asked = replace(dpo, reference="frozen", compute=replace(dpo.compute, parallel="fsdp"))
    frozen = plan.predict(asked, asked, length=64, processes=4)
    model = Session(dpo.policy, seed=0).model
    model.train_only(dpo.train)
    assert cached.memory["reference"] == 0
    assert frozen.memory["reference"] == sum(p.nbytes for p in copy.deepcopy(model).parameters())
    alone = plan.predict(asked, asked, length=64)
    assert alone.memory["logits"] == 2 * cached.memory["logits"]
    assert cached.rows == 2 * dpo.optim.batch, "a pair is two sequences"
    assert cached.pictures == dpo.optim.batch, "over one picture"


@pytest.fixture
def alone_in_a_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_while_micro_batches_are_added_up(alone_in_a_group):
    """DDP's buckets are the gradients only where gradients travel at once; FSDP2 keeps whole ones in fp32 until they do."""

    x, net = torch.randn(2, 8), torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    shared = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    def storages():
        return {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage() for p in net.parameters()}

    shared(x).sum().backward()
    buckets = storages()
    shared.zero_grad(set_to_none=True)
    with shared.no_sync():
        shared(x).sum().backward()
    own = storages()
    added_up = sum(s.nbytes() for s in own.values())
    trained = sum(p.numel() for p in net.parameters())
    assert not buckets.keys() & own.keys()
    assert (sum(s.nbytes() for s in buckets.values()), added_up) == (4 * trained, 4 * trained)

    recipe = one_stage(batch=4)
    stage = replace(recipe.stages[0], optim=replace(recipe.stages[0].optim, accumulate=2))
    recipe = replace(recipe, stages=(stage,))
    learnt = plan.predict(recipe, stage).trainable
    assert plan.predict(recipe, stage).memory["gradients"] == 4 * learnt
    assert plan.predict(recipe, stage, processes=2).memory["gradients"] == 2 * 4 * learnt
    sharded = replace(recipe, compute=replace(recipe.compute, parallel="fsdp"))
    assert plan.predict(sharded, stage, processes=2).memory["gradients"] == 2 * learnt, "they travel with each micro-batch"


def test_what_fsdp_gathers():
    """The language model's blocks are units, two whole at a time; all the rest is whole for the step, gradients of what trains in it too."""
    recipe = one_stage(depth=6, precision="bf16")
    recipe = replace(recipe, compute=replace(recipe.compute, parallel="fsdp"))
    model, learnt = real(recipe)
    blocks = model.language.get_decoder().layers
    inside = {id(p) for p in blocks.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    expected = (
        sum(p.numel() for p in rest)
        + sum(p.numel() for p in learnt if id(p) not in inside)
        + 2 * sum(p.numel() for p in blocks[0].parameters())
    )
    assert plan.predict(recipe, recipe.stages[0], processes=2).memory["gathered"] == 2 * expected
    words = replace(TINY, compute=recipe.compute)
    planned = plan.predict(words, words.stages[0], processes=2)
    assert planned.memory["gathered"] == 2 * (sum(planned.parameters.values()) + planned.trainable), "no block runs: one unit"


# ------------------------------------------------------------------------------------------------------------- given weights


def folders(path):
    """Towers of the three kinds and a language model, tiny, as folders of weights."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        LlamaConfig,
        LlamaForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    sizes = dict(hidden_size=48, num_hidden_layers=5, num_attention_heads=4, image_size=32, patch_size=16)
    CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=64)).save_pretrained(path / "clip")
    SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=64)).save_pretrained(path / "siglip")
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).save_pretrained(path / "dino")
    words = word_tokenizer(World().vocabulary)
    words.save_pretrained(path / "text")
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, vocab_size=len(words)
        )
    ).save_pretrained(path / "text")


@pytest.mark.parametrize("kind", [Clip, Siglip, Dino])
def test_what_a_stage_with_given_weights_holds(kind, tmp_path):
    """Stage after stage in one session under bf16: what was read is bf16 until it trains and fp32 from then on, adapters stay where they are."""
    folders(tmp_path)
    lora = Lora(rank=2, targets=("q_proj", "v_proj"))
    stages = [
        replace(TINY.stages[-1], name=name, train=train, lora=lora, max_length=64)
        for name, train, lora in (
            ("a", ("connector",), None),
            ("b", ("connector",), lora),
            ("c", ("encoder", "connector"), None),
            ("d", ("connector", "embeddings"), lora),
        )
    ]
    encoder = kind(weights=str(tmp_path / kind.__name__.lower()))
    language = LanguageModel(weights=str(tmp_path / "text"))
    compute = replace(TINY.compute, precision="bf16")
    recipe = replace(TINY, encoder=encoder, language=language, image=Fixed(size=32), stages=tuple(stages), compute=compute)
    session = Session(recipe, seed=0, precision="bf16")
    assert plan.at_hand(recipe) == (recipe, [])
    for stage in stages:
        session.let_train(stage.train, stage.lora)
        predicted = plan.predict(recipe, stage)
        assert predicted.memory["weights"] == sum(p.nbytes for p in session.model.parameters()), stage.name
        assert predicted.trainable == sum(p.numel() for p in session.model.parameters() if p.requires_grad), stage.name
        traced = plan.trace(recipe, stage, pictures=2, length=40)
        assert (sum(traced.blocks["encoder"]) > 0) == session.model.encoder_learns, stage.name
        assert len(traced.blocks["encoder"]) == 4, "the fifth block is not read"


def test_sizes_from_the_hub_s_cache_and_never_from_the_network(tmp_path, monkeypatch):
    """A hub name that is in the cache counts as read; one that is not as declared, and the page says which. No socket is opened."""
    import socket

    import huggingface_hub.constants

    folders(tmp_path)
    inside = tmp_path / "hub" / "models--some--text" / "snapshots" / "abc"
    inside.mkdir(parents=True)
    (inside / "config.json").write_bytes((tmp_path / "text" / "config.json").read_bytes())
    (inside.parents[1] / "refs").mkdir()
    (inside.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was asked"))
    llava = config.load_recipe("llava")
    recipe = replace(llava, language=replace(llava.language, weights="some/text"))
    assert plan.sized(recipe).language.width == 96
    assert plan.sized(recipe).encoder == replace(llava.encoder, weights=None)
    told = [line for line in plan.page(recipe, length=300).splitlines() if line.startswith("sizes ")]
    assert told == [
        "sizes (width 1024, depth 24) are the recipe's own, nothing was read: encoder.weights openai/clip-vit-large-patch14 is not in the "
        "hub's cache on this machine"
    ]


def test_a_run_as_weights(tmp_path):
    """Its sizes are its recipe's."""
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(TINY) | {"seed": 0}))
    llava = config.load_recipe("llava")
    recipe = replace(llava, weights=str(tmp_path))
    whole = sum(plan.count(TINY, plan.Setting()).parts.values())
    planned = plan.predict(recipe, recipe.stages[1], length=64)
    assert sum(planned.parameters.values()) == whole
    assert planned.memory["weights"] == 4 * whole
    assert plan.page(recipe, length=64).count("nothing was read") == 0


def test_an_example_whose_parts_are_not_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = config.load_recipe("smollm2_easy_vqa")
    recipe = replace(recipe, language=replace(recipe.language, weights="package:not_there/" + recipe.language.weights.rpartition("/")[2]))
    text = plan.page(recipe)
    assert re.search(r"^language +106,203,456", text, re.M), "134,515,008 with its embeddings, as published"
    assert re.search(r"^embeddings +28,311,552", text, re.M)
    assert text.count("are the recipe's own, nothing was read: ") == 2


# ------------------------------------------------------------------------------------------------------------ activations


def saved_for_backward(recipe):
    """Bytes of the storages that autograd is given, each once, parameters excepted: the measure, without any of ours."""
    model, _ = real(recipe)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(recipe, model)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


ACTIVATIONS = [
    dict(),
    dict(length=256),
    dict(batch=16, length=40),
    dict(batch=1, length=40),
    dict(train=("connector",), length=128),
    dict(train=("encoder", *WHOLE)),
    dict(width=256, depth=6, vocab=4000, length=128),
    dict(train=("connector",), lora=LORA, width=256, depth=6, length=128),
    dict(train=(), lora=LORA, depth=5),
    dict(precision="bf16", length=128),
    dict(precision="bf16", width=256, depth=6, vocab=4000, batch=2),
    dict(precision="bf16", train=("connector",), lora=LORA),
]


@pytest.mark.parametrize("options", ACTIVATIONS, ids=str)
def test_activations_are_what_autograd_saves(options):
    """To 5 %: what is left is autocast's copies of biases and, where the tower trains, blocks that nothing reads."""
    recipe = one_stage(**options)
    predicted = plan.predict(recipe, recipe.stages[0])
    assert predicted.memory["activations"] == pytest.approx(saved_for_backward(recipe), rel=0.05)


def test_activations_of_the_words_stage():
    """The tower, the connector and the head that reads them; the language model gives its embeddings alone."""
    from mmfast.trainers.supervised import WordHead
    from torch.nn.functional import binary_cross_entropy_with_logits

    stage = TINY.stages[0]
    model = build(TINY, tokenizer=word_tokenizer(World().vocabulary))
    tower = getattr(model.encoder.vision, "vision_model", model.encoder.vision)
    tower.encoder.layers = tower.encoder.layers[:-1]  # nothing reads it: autograd drops what it saved, the measure here would not
    model.encoder.layers = (-1,)
    model.train_only(stage.train)
    head, pictures = WordHead(TINY.encoder.width, 36, 18), torch.randn(stage.optim.batch, 3, 64, 64)
    own = {t.untyped_storage().data_ptr() for m in (model, head) for t in (*m.parameters(), *m.buffers())}
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.encode(pictures)
        for logits in head(states, model.connector(states), model.language.get_input_embeddings().weight[torch.arange(18)]):
            binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
    predicted = plan.predict(TINY, stage)
    measured = sum(storage.nbytes() for storage in seen.values())
    assert predicted.memory["logits"] == predicted.full_logits == 0
    assert predicted.memory["activations"] == pytest.approx(measured, rel=0.05)


class Live(TorchDispatchMode):
    """The most bytes alive at once, of every storage that an op returns until it dies."""

    def __init__(self, own):
        super().__init__()
        self.own, self.alive, self.now, self.peak = own, {}, 0, 0

    def died(self, key):
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.own and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.died, key)
        return out


@pytest.mark.parametrize(
    "options",
    [
        dict(length=256, depth=6),
        dict(length=256, depth=6, checkpointing=True),
        dict(length=128, width=256, depth=6, vocab=4000),
        dict(length=128, width=256, depth=6, vocab=4000, checkpointing=True),
        dict(train=("connector",), lora=LORA, length=128, width=256, depth=6, vocab=4000),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_a_step_takes_what_is_predicted_beside_its_states(options):
    """Forward, backward and AdamW, to 25 %: temporaries of backward are not predicted, and checkpointing has its widest moment counted."""
    recipe = one_stage(**options)
    model, learnt = real(recipe)
    optimizer = torch.optim.AdamW(learnt, lr=1e-5, fused=True)
    loss_of(recipe, model).backward()
    optimizer.step()
    states = [*model.parameters(), *model.buffers(), *(p.grad for p in learnt), *(t for s in optimizer.state.values() for t in s.values())]
    with Live({t.untyped_storage()._cdata for t in states}) as live:
        loss_of(recipe, model).backward()
        optimizer.step()
    predicted = plan.predict(recipe, recipe.stages[0])
    assert predicted.memory["activations"] + predicted.memory["logits"] == pytest.approx(live.peak, rel=0.25)
    if recipe.compute.checkpointing:
        assert predicted.activations[True] < 0.5 * predicted.activations[False]


def test_no_logits_are_kept():
    """A vocabulary a hundred times as large costs nothing but the workspace once that is full."""
    small, large = (one_stage(vocab=v, length=512, batch=8) for v in (2_000, 200_000))
    a, b = (plan.predict(r, r.stages[0]) for r in (small, large))
    assert b.memory["activations"] == a.memory["activations"]
    assert b.full_logits == 100 * a.full_logits == 4 * 8 * 512 * 200_000
    assert b.memory["logits"] <= 128 * 2**20 + 8 * 512 * 64 * 4


def test_a_frozen_tower_leaves_nothing_behind():
    frozen, trained = one_stage(), one_stage(train=("encoder", *WHOLE))
    saved = plan.trace(frozen, frozen.stages[0], pictures=4, length=64)
    assert sum(saved.blocks["encoder"]) == 0
    assert sum(plan.trace(trained, trained.stages[0], pictures=4, length=64).blocks["encoder"]) > 0
    # Of built-in data the tower's states are there before; with others it runs in every step, before the rest.
    assert plan.predict(frozen, frozen.stages[0]).passing == 0
    elsewhere = replace(frozen.stages[0], data=replace(frozen.stages[0].data, path="mine.json"))
    assert plan.predict(replace(frozen, stages=(elsewhere,)), elsewhere).passing > 0


# ----------------------------------------------------------------------------------------------------------------- advice


def as_words(move):
    return [word for key, value in move.flags.items() for word in (f"--{key}", value)]


@pytest.mark.parametrize(("name", "stage", "gib"), [("llava", "align", 24), ("llava", "instruct", 24), ("dpo", "dpo", 80)])
def test_advice_fits_when_it_is_followed(name, stage, gib):
    limit = gib * 2**30
    chosen, end = plan.advice(config.load_recipe(name), stage, limit)
    assert chosen
    assert end.total <= limit
    recipe, problems = config.layered(name, rest=[word for move, _ in chosen for word in as_words(move)])
    assert problems + config.check(recipe) == []
    followed = plan.predict(recipe, plan._stage(recipe, stage))
    assert followed.total == end.total
    before = plan.predict(config.load_recipe(name), plan._stage(config.load_recipe(name), stage)).total
    assert before - sum(saved for _, saved in chosen) == end.total, "the savings add up"
    # No micro-batch twice as large would do.
    optim = plan._stage(recipe, stage).optim
    if optim.accumulate > 1:
        larger = config.apply(recipe, {f"{'' if stage == name else f'stages.{stage}.'}optim.batch": str(2 * optim.batch)}, [])
        assert plan.predict(larger, plan._stage(larger, stage)).total > limit


def test_what_changes_learning_comes_only_where_nothing_else_does():
    chosen, _ = plan.advice(config.load_recipe("llava"), "align", 24 * 2**30)
    assert all(move.same for move, _ in chosen)
    chosen, _ = plan.advice(config.load_recipe("llava"), "instruct", 24 * 2**30)
    assert any("lora" in str(move) for move, _ in chosen)


def test_more_processes_are_the_last_resort():
    llava = config.load_recipe("llava")
    chosen, end = plan.advice(llava, "instruct", 3 * 2**30)
    assert "--language.quantize 4bit" in str([str(move) for move, _ in chosen])
    assert str(chosen[-1][0]).startswith("torchrun --nproc-per-node ")
    assert str(chosen[-1][0]).endswith("--compute.parallel fsdp")
    assert end.total <= 3 * 2**30


@pytest.mark.parametrize(("name", "stage", "tiny"), [("llava", "instruct", False), ("dpo", "dpo", True), ("llava", "words", True)])
def test_the_hint_is_one_sentence_with_three_options_that_exist(name, stage, tiny):
    recipe = config.load_recipe(name, tiny=tiny)
    hint = plan.out_of_memory_hint(recipe, stage)
    assert "\n" not in hint
    flags = re.findall(r"((?:--[\w.]+ \S+ )+)\(saves ([\d.]+) [GM]iB\)", hint)
    assert len(flags) == (3 if stage != "words" else len(flags))
    assert flags
    for words, saved in flags:
        assert float(saved) > 0
        changed, problems = config.layered(name, tiny=tiny, rest=words.split())
        assert problems + config.check(changed) == []


def test_a_hint_never_hides_the_error_it_is_for(monkeypatch):
    monkeypatch.setattr(plan, "trace", lambda *_, **__: 1 / 0)
    hint = plan.out_of_memory_hint(TINY, "align")
    assert (
        hint
        == "out of memory in align; `mmfast plan` names what to change (its own prediction failed: ZeroDivisionError: division by zero)"
    )


def test_rows_end_where_the_language_model_does():
    long = replace(TINY.stages[-1], max_length=2048)  # of weights the context is read, whatever is declared
    assert plan.predict(TINY, long).length == TINY.language.context < long.max_length


def test_the_page_in_the_documents_is_the_command_s(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    text = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
    words, shown = re.search(r"\$ mmfast plan (.*?)\n(.*?)```", text, re.S).groups()
    name, memory, processes, *rest = words.replace("--gpu-memory ", "").replace("--processes ", "").split()
    recipe, problems = config.layered(name, rest=rest)
    assert problems == []
    assert plan.page(recipe, gpu_memory=float(memory), processes=int(processes)).strip() == shown.strip(), (
        "paste the command's output again"
    )


def test_command(capsys):
    def call(*argv):
        with pytest.raises(SystemExit) as end:
            main(list(argv))
        return end.value.code, *capsys.readouterr()

    code, out, err = call("plan", "llava", "--tiny", "--gpu-memory", "1")
    assert (code, err) == (0, "")
    assert re.search(r"^all +283,072", out, re.M)
    assert re.search(r"^fits 1 GiB +yes +yes +yes", out, re.M)
    code, out, _ = call("plan", "dpo", "--tiny", "--length", "64")
    assert re.search(r"^stage +words +align +instruct +dpo$", out, re.M), "a policy that starts from nothing is trained first"
    assert "words" not in call("plan", "dpo", "--length", "300")[1]
    code, out, _ = call("plan", "llava", "--tiny", "--gpu-memory", "0.05", "--stages.words", "null")
    assert re.search(r"^fits 0.05 GiB +NO +NO", out, re.M)
    assert "--compute.checkpointing true" in out
    for wrong, words in (
        (("--gpu-memory", "-1"), "expected GiB, more than 0"),
        (("--length", "10"), "cannot hold a picture of 16 tokens"),
        (("--processes", "5"), "do not divide among 5 processes"),
        (("--processes", "0"), "expected at least 1"),
    ):
        code, out, err = call("plan", "llava", "--tiny", *wrong)
        assert (code, out) == (2, "")
        assert words in err


def test_a_tower_s_rates_are_told():
    recipe = one_stage(train=("encoder", *WHOLE))
    assert "rates in the tower" not in plan.page(recipe)
    optim = replace(recipe.stages[0].optim, lr=1e-3, lr_of={"encoder": 1e-4}, layer_decay=0.5)
    recipe = replace(recipe, stages=(replace(recipe.stages[0], optim=optim),))
    blocks = recipe.encoder.depth - 1  # the last but one state is read
    assert re.search(rf"^rates in the tower +{1e-4 * 0.5 ** (blocks + 1):.2g} \.\. 5e-05$", plan.page(recipe), re.M)


def test_a_plan_reads_no_weights():
    """Names on a hub that cannot be reached, 7 billion parameters, and no storage for them."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan.page(config.load_recipe("llava"), length=700)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


def test_clip_reads_any_layer():
    """The trace keeps the layer that is read, from the front or the back."""
    for layer, blocks in ((-2, 4), (3, 3), (-1, 5)):
        recipe = one_stage(train=("encoder", *WHOLE))
        recipe = replace(recipe, encoder=replace(recipe.encoder, depth=5, layer=layer))
        saved = plan.trace(recipe, recipe.stages[0], pictures=2, length=40)
        assert len(saved.blocks["encoder"]) == blocks
        assert isinstance(recipe.encoder, Clip)


def test_parts_that_learn_in_part_are_named():
    def rows(name):
        return {
            line.split()[0]: line.split(maxsplit=2)[2]
            for line in plan.page(config.load_recipe(name, tiny=True)).split("\n\n")[1].splitlines()[1:-1]
        }

    assert "pretrain (last block)" in rows("kosmos_1")["encoder"]
    told = rows("flamingo")["embeddings"]
    assert told.endswith("interleaved (new rows)")
    assert "its new rows alone learn" in plan.page(config.load_recipe("flamingo", tiny=True))
    assert "(" not in "".join(rows("llava").values())
