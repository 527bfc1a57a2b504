"""``tiny(recipe)``: the same system at a size that two CPU cores train in minutes, on the shapes world.

Widths, depths, batch sizes and step counts shrink and the data becomes the shapes world; every structural choice stays. Because nothing
pre-trained exists at that size, the stages are preceded by one that gives the tower its words, and the stage that trains the language model
starts it from random weights. Numbers: AdamW with a high learning rate and beta2 .98 suits a model of a quarter million parameters;
some 1,200 steps of the last stage are where captions settle.
"""

from dataclasses import replace

from mmfast.spec import AdapterPrompts, Alignment, Compute, Data, Optim, Stage, System

_FAST = dict(betas=(0.9, 0.98), weight_decay=0.02, clip=1.0)
_DATA = Data("shapes")
_SHORT = Optim(lr=1e-3, steps=30, batch=32, warmup=10, schedule="constant", **_FAST)
_WORDS = Stage(
    "words",
    train=("encoder", "connector", "embeddings"),
    data=_DATA,
    objective="words",
    template="bare",
    optim=Optim(lr=2e-3, steps=600, batch=64, warmup=30, floor=0.02, **_FAST),
)

# What a language model is before prompts are put into it, their gates still at 0: one that cannot see.
_TEXT = Stage(
    "text",
    train=("language", "embeddings"),
    data=_DATA,
    template="bare",
    optim=Optim(lr=4e-3, steps=500, batch=32, warmup=40, hold=0.3, floor=0.02, **_FAST),
)


def tiny(recipe: System | Alignment) -> System | Alignment:
    """The tiny form of a recipe."""
    return tiny_alignment(recipe) if isinstance(recipe, Alignment) else tiny_system(recipe)


def tiny_system(system: System) -> System:
    encoder, language = system.encoder, system.language
    if not (system.weights or encoder.weights or language.weights):
        return system  # it starts from nothing already
    *before, last = system.stages
    # Prompts are for a language model that stays as it is, so it learns before them; all others learn it with the pictures.
    prompts = isinstance(system.fusion, AdapterPrompts)
    whole = last.train if prompts else tuple(dict.fromkeys((*last.train, "language", "embeddings")))
    return replace(
        system,
        weights=None,
        # Two layers below the hidden state that the recipe reads.
        encoder=replace(
            encoder, weights=None, width=64, depth=1 - encoder.layer if encoder.layer < -1 else 2, heads=4, ffn=128, patch=16, size=64
        ),
        language=replace(
            language, weights=None, vocab=0, width=64, depth=3, heads=4, kv_heads=4, ffn=128, context=256, tied=True, init=0.05
        ),
        fusion=replace(system.fusion, layers=2) if prompts else system.fusion,
        # The shapes world's background becomes 0.
        image=replace(system.image, size=64, mean=(220 / 255,) * 3, std=(64 / 255,) * 3),
        stages=(
            _WORDS,
            *(replace(stage, data=_DATA, template="bare", optim=_SHORT) for stage in before[:1]),
            *((_TEXT,) if prompts else ()),
            # There is no language to lay adapters beside: it learns with them.
            replace(
                last,
                train=whole,
                lora=None,
                data=_DATA,
                template="bare",
                optim=Optim(lr=4e-3, steps=1200, batch=32, warmup=40, hold=0.3, floor=0.02, **_FAST),
            ),
        ),
        compute=Compute(device="cpu"),
    )


def tiny_alignment(alignment: Alignment) -> Alignment:
    return replace(
        alignment,
        policy=tiny_system(alignment.policy),
        data=replace(alignment.data, name="shapes_own", path=None),
        template="bare",
        lora=None,
        reference="cached" if alignment.reference == "adapter_off" else alignment.reference,
        compute=Compute(device="cpu"),
        optim=Optim(lr=1e-5, steps=100, batch=32, warmup=0.1, betas=(0.9, 0.98), clip=1.0),
    )
