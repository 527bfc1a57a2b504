"""Kosmos-1 (arXiv:2302.14045): a language model that learns from scratch on text, image-caption pairs and interleaved documents together.

Where the paper and the released code (Kosmos-2's, the only one) differ the code is followed in positions: the paper's are xPos, those of the
released model sinusoidal. Not published for Kosmos-1: the number of image tokens (64, as in Kosmos-2). CLIP is frozen except its last block,
as in the paper. The share of each kind of data is that of the paper's tokens an update, 0.5, 0.5 and 0.2 million. A batch counts rows, most of them
short captions: at the lengths of Kosmos-2's rows (96 tokens a caption, 404 a document; text is full) 1.2 million tokens are some 5,950. With captions
or documents of other lengths another ``batch`` makes as many. Eps and clipping are Kosmos-2's, not published here, nor is the precision: bf16, where
Kosmos-2 has fp16. The second stage, instructions of text alone among the data of the first, has no published hyper-parameters: what is chosen for it
here says so beside it.
"""

from dataclasses import replace

from mmfast.spec import AttentionPool, Clip, Compute, Data, Fixed, LanguageModel, Mixture, Optim, Pages, Prefix, Stage, System

TEXT, CAPTIONS, PAGES = Data("text", full=True), Data("image_text_pairs"), Data("interleaved", pages=Pages(pictures=5, single=0.5))
PRETRAIN = Stage(
    "pretrain",
    train=("last_block", "connector", "language", "embeddings"),
    data=Mixture("kosmos_web", (replace(TEXT, weight=0.5), replace(CAPTIONS, weight=0.5), replace(PAGES, weight=0.2)), by="tokens"),
    template="bare",
    dropout=0.1,
    optim=Optim(
        lr=2e-4, steps=300_000, batch=5952, warmup=375, schedule="linear", betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, clip=2.0
    ),
)
# One set, the 68,478 pairs of Unnatural Instructions and 54,000 of FLANv2, as published; its share of the whole is not. These are the rows of
# Kosmos-2's second stage, with captions where that one has 1,404 captions and instructions with places.
INSTRUCTIONS = Data("language_instructions", weight=117)
INSTRUCT = Mixture("kosmos_instruct", (INSTRUCTIONS, replace(TEXT, weight=30), replace(CAPTIONS, weight=1404), replace(PAGES, weight=15)))

RECIPE = System(
    name="kosmos_1",
    paper="arXiv:2302.14045",
    encoder=Clip(weights="openai/clip-vit-large-patch14", layer=-1, keep_class_token=True, post_norm=True, unit=True),
    connector=AttentionPool(tokens=64, heads=32),
    fusion=Prefix(begin="<image>", end="</image>"),
    language=LanguageModel(
        family="kosmos_2_text_model", weights=None, words="microsoft/kosmos-2-patch14-224", vocab=65037, width=2048, depth=24, heads=32,
        kv_heads=32, ffn=8192, context=2048, tied=True, norm_eps=1e-5, init=2048**-0.5,
    ),
    image=Fixed(size=224),
    stages=(
        PRETRAIN,
        # Not published: rate, updates, warm-up and rows are those of Kosmos-2's second stage, parts and the rest those of this one's first.
        replace(PRETRAIN, name="instruct", data=INSTRUCT, optim=replace(PRETRAIN.optim, lr=1e-5, steps=10_000, batch=1566)),
    ),
    compute=Compute(precision="bf16"),
)  # fmt: skip
