"""``tiny(recipe)``: the same system at a size that two CPU cores train in minutes, on the shapes world.

Widths, depths, batch sizes and step counts shrink and the data becomes the shapes world; every structural choice stays. Because nothing
pre-trained exists at that size, the stages are preceded by those that stand in for it: one gives the tower its words, and where no stage
trains the language model, one teaches it text. Numbers: AdamW with a high learning rate and beta2 .98 suits a model of a quarter million
parameters; some 1,200 steps of the last stage are where captions settle.
"""

from dataclasses import replace

from mmfast.data.chat import TEMPLATES
from mmfast.data.supervised import EPISODES
from mmfast.spec import (
    AdapterPrompts,
    Alignment,
    AttentionPool,
    BoxTokens,
    Clip,
    Compute,
    Data,
    Dino,
    Eva,
    GatedCrossAttention,
    Mixture,
    NfResnet,
    Optim,
    QFormer,
    Resampler,
    Retrieval,
    Siglip,
    Stage,
    System,
    Tokens,
    Vqgan,
)

_FAST = dict(betas=(0.9, 0.98), weight_decay=0.02, clip=1.0)
_SHORT = Optim(lr=1e-3, steps=30, batch=32, warmup=10, schedule="constant", **_FAST)
_LONG = Optim(lr=4e-3, steps=1200, batch=32, warmup=40, hold=0.3, floor=0.02, **_FAST)
_CONTEXT = 256
_DATA = Data("shapes")
_WEB = Mixture("kosmos_web", tuple(Data(f"shapes_{kind}", weight=1.0) for kind in ("text", "captions", "episodes")), by="tokens")
_MIXED = Data("shapes_drawing")

# What each published data set becomes, and how long a tiny stage on it lasts. One that is not named here is captions and questions.
STAND_INS: dict[str, tuple[Data | Mixture, Optim]] = {
    "llava_cc3m_595k": (_DATA, _SHORT),
    # What has learnt words moves slowly, or the steps in which the language model cannot read yet undo it.
    "kosmos_web": (_WEB, replace(_LONG, steps=800, lr_of={"last_block": 2e-4, "connector": 1e-3})),
    # Long enough for answers to half of the instructions, short and slow enough for what was learnt from pictures to stay.
    "kosmos_instruct": (
        replace(_WEB, name="kosmos_instruct", parts=(Data("shapes_instructions", weight=1.0), *_WEB.parts)),
        replace(_SHORT, lr=7e-4, steps=100, schedule="linear"),
    ),
    "kosmos_2_pretrain": (
        Data("shapes_grounded"),
        replace(_LONG, steps=1700, batch=16, lr_of={"encoder": 2e-4, "connector": 1e-3}),
    ),
    "kosmos_2_instruct": (Data("shapes_grounded"), replace(_SHORT, lr=1e-4)),
    # Frozen: pictures of one thing with its name; what few shots say of them is never trained on.
    "conceptual_captions": (
        Data("shapes_single"),
        Optim(lr=2e-3, lr_of={"connector": 2e-4}, steps=1500, batch=32, warmup=20, hold=0.3, floor=0.02, **_FAST),
    ),
    "blip_129m": (Data("shapes_captions"), replace(_LONG, lr=2e-3, steps=600)),
    "flamingo_mix": (Data("shapes_episodes"), replace(_LONG, steps=600)),
    "cc3m": (Data("shapes_captions"), replace(_LONG, steps=600)),
    "chameleon_pictures": (
        Data("shapes_crowded"),
        Optim(lr=1e-3, steps=1000, batch=4, warmup=20, hold=0.5, floor=0.05, schedule="linear", betas=(0.9, 0.98)),
    ),
    "chameleon_stage_1": (_MIXED, Optim(lr=4e-3, steps=1800, batch=32, warmup=40, schedule="exponential", floor=0.1, **_FAST)),
    "chameleon_stage_2": (_MIXED, Optim(lr=4e-4, steps=60, batch=32, warmup=0, schedule="exponential", floor=0.1, **_FAST)),
    "chameleon_sft": (_MIXED, replace(_SHORT, lr=1e-4)),
}
_STAND_IN = (_DATA, _LONG)

_WORDS = Stage(
    "words",
    train=("encoder", "connector", "embeddings"),
    data=_DATA,
    objective="words",
    template="bare",
    optim=Optim(lr=2e-3, steps=600, batch=64, warmup=30, floor=0.02, **_FAST),
)
# What a language model is before anything is put into it that lets it see. What it reads, by what the last stage shows; else the same.
_TEXT = Stage(
    "text",
    train=("language", "embeddings"),
    data=_DATA,
    template="bare",
    max_length=_CONTEXT,
    optim=replace(_LONG, steps=500),
)
_TEXTS = {
    "shapes_captions": replace(_TEXT, data=Data("shapes_text")),
    "shapes_episodes": replace(_TEXT, data=Data("shapes_told")),
    # One that is to read what stands where no training has put it needs more than one way to tell.
    "shapes_single": replace(_TEXT, data=Data("shapes_told"), dropout=0.1, optim=replace(_LONG, steps=800)),
}


def tiny(recipe: System | Alignment) -> System | Alignment:
    """The tiny form of a recipe."""
    return tiny_alignment(recipe) if isinstance(recipe, Alignment) else tiny_system(recipe)


def tiny_system(system: System) -> System:
    if not (system.weights or system.encoder.weights or system.language.weights or system.language.words):
        return system  # it starts from nothing already
    return replace(
        system,
        weights=None,
        encoder=_small(system.encoder),
        connector=_small(system.connector),
        fusion=_small(system.fusion),
        regions=_small(system.regions),
        language=replace(
            system.language,
            weights=None,
            words=None,
            vocab=0,
            width=64,
            depth=2 if system.language.encodes else 3,  # of each stack
            heads=4,
            kv_heads=4,
            ffn=128,
            context=_CONTEXT,
            tied=True,
            init=0.05,
        ),
        # The shapes world's background becomes 0; a tokenizer's pixels are what they are.
        image=replace(system.image, size=64, augment=False)  # states that never change are computed once
        if isinstance(system.encoder, Vqgan)
        else replace(system.image, size=64, augment=False, mean=(220 / 255,) * 3, std=(64 / 255,) * 3),
        stages=_stages(system),
        compute=Compute(device="cpu"),
    )


def _small(choice):
    """A choice at tiny size, its structure as it was."""
    match choice:
        case Clip() | Siglip() | Dino() | Eva():  # two layers below the hidden state that the recipe reads, or one below the lowest
            depth = 1 - choice.layer if choice.layer < -1 else 2
            if more := len(getattr(choice, "scales", ())):
                depth = max(depth, more - choice.layer)
                choice = replace(choice, scales=tuple(range(choice.layer - more, choice.layer)))
            return replace(choice, weights=None, width=64, depth=depth, heads=4, ffn=128, patch=16, size=64)
        case Tokens():
            return replace(choice, init=choice.init and 4e-3)
        case Retrieval():  # the last of the four states that a tiny language model has
            return replace(choice, layers=tuple(range(-min(len(choice.layers), 4), 0)))
        case NfResnet():
            return replace(choice, size=64, stem=32, blocks=(1,) * len(choice.blocks), width=128)
        case QFormer():  # it reads the language model's words, as there are no others
            return replace(
                choice, weights=None, tokens=16, width=64, depth=2, heads=4, ffn=128, vocab=0, positions=64, shared=32, dropout=0.0, init=0.125
            )  # fmt: skip
        case Resampler():
            return replace(choice, tokens=8, depth=2, heads=4, head_width=16)
        case GatedCrossAttention():
            return replace(choice, every=min(choice.every, 2), heads=4, head_width=16)
        case Vqgan():  # a code for each cell of the world's grid; those that follow what chooses them learn in tens of steps
            return replace(
                choice, size=64, channels=8, multipliers=(1, 1, 2, 4, 8), blocks=1, latent=64, width=16, codes=64, groups=2, codebook="ema",
                decay=0.9, dead_below=0.05,
            )  # fmt: skip
        case AdapterPrompts():
            return replace(choice, layers=2)
        case BoxTokens():  # of 4 pixels each
            return replace(choice, bins=16)
        case AttentionPool():
            return replace(choice, tokens=16, heads=4)
    return choice


def _stages(system: System) -> tuple[Stage, ...]:
    own = [_stage(stage) for stage in system.stages]
    # A language model that is to stay as it is learns before; any other learns with the pictures, as there is none to start from.
    trained = any("language" in stage.train or stage.lora is not None for stage in system.stages)
    words = replace(_WORDS, train=("encoder", "connector", "embeddings") if system.projects else ("encoder", "embeddings"))
    seen = () if isinstance(system.encoder, NfResnet | Vqgan) else (words,)
    text = replace(_TEXTS.get(own[-1].data.name, _TEXT), template=own[-1].template) if own else _TEXT
    return (*seen, *(() if trained else (text,)), *own)


def _stage(stage: Stage) -> Stage:
    data, optim = STAND_INS.get(stage.data.name, _STAND_IN)
    # A critic would begin long after the last step; squared errors leave the mean picture sooner.
    drawing = replace(stage.drawing, error="l2", adversarial=0.0, perceptual=0.0) if stage.objective == "tokenizer" else stage.drawing
    whole = stage.lora is not None or "language" in stage.train
    train = tuple(dict.fromkeys((*stage.train, "language", "embeddings"))) if whole else stage.train
    # Templates have words that a tiny model does not know; that of pictures and captions has none, and those of episodes are known.
    form = TEMPLATES[stage.template]
    template = stage.template if (form.picture_first and not form.before) or data.name in EPISODES else "bare"
    optim = replace(optim, level_new=stage.optim.level_new, weight_decay_of=stage.optim.weight_decay_of)
    # What learns from pictures at this size has nothing to spare for dropout.
    return replace(
        stage, train=train, lora=None, data=data, template=template, max_length=min(max(stage.max_length, 64), _CONTEXT), optim=optim, drawing=drawing,
        dropout=0.0,
    )  # fmt: skip


def tiny_alignment(alignment: Alignment) -> Alignment:
    return replace(
        alignment,
        policy=tiny_system(alignment.policy),
        data=replace(alignment.data, name="shapes_own", path=None),
        template="bare",
        max_length=min(alignment.max_length, _CONTEXT),
        lora=None,
        reference="cached" if alignment.reference == "adapter_off" else alignment.reference,
        compute=Compute(device="cpu"),
        optim=Optim(lr=1e-5, steps=100, batch=32, warmup=0.1, betas=(0.9, 0.98), clip=1.0),
    )
