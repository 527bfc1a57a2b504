"""BLIP-2 (arXiv:2301.12597): queries learn to see beside texts, then to speak to a frozen language model; ViT-g and OPT-2.7B.

Stage 1 trains the Q-Former with its text side, its heads and the norm over the tower's states (which the paper counts to the frozen tower) on
contrast, matching and captioning; stage 2 the same without the text side, and the projection. Sizes, steps, rates and floors are the paper's
(section 3.4); LAVIS trains 10 epochs with batches of 100 and 64 a process, rates from 1e-6 over 5000 and 2000 steps, falling to 1e-5 once an
epoch, and decays no vectors (neither does this). The norm's eps is that of transformers' class (LAVIS: 1e-5). The batch is of the whole node. Tower
and OPT are frozen in fp16 there, in bf16 here.
"""

from mmfast.spec import Compute, Data, Eva, Fixed, LanguageModel, Optim, QFormer, Stage, System

RECIPE = System(
    name="blip2",
    paper="arXiv:2301.12597",
    encoder=Eva(weights="Salesforce/blip2-opt-2.7b"),
    connector=QFormer(weights="google-bert/bert-base-uncased"),
    language=LanguageModel(family="opt", weights="facebook/opt-2.7b", vocab=50272, width=2560, ffn=10240, tied=True),
    image=Fixed(size=224, fit="squash", augment=True),
    stages=(
        Stage(
            "see",
            train=("queries",),
            objective="queries",
            data=Data("blip_129m", clean=True),
            max_length=32,
            optim=Optim(
                lr=1e-4, steps=250_000, batch=1680, warmup=2000, betas=(0.9, 0.98), weight_decay=0.05, decay_vectors=False, clip=0.0
            ),
        ),
        Stage(
            "speak",
            train=("connector",),
            data=Data("blip_129m", clean=True),
            template="blip2",
            max_length=64,
            optim=Optim(
                lr=1e-4,
                steps=80_000,
                batch=1920,
                warmup=2000,
                floor=0.5,
                betas=(0.9, 0.98),
                weight_decay=0.05,
                decay_vectors=False,
                clip=0.0,
            ),
        ),
    ),
    compute=Compute(precision="bf16"),
)
