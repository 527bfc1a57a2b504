"""A small CLIP-type tower that starts from nothing and learns to see the coloured shapes of easy-vqa, in a minute on a CPU.

It stands in for published tower weights where there is no network: every word that answers a what-question about a picture must be found
among its patches. Export the run, and another recipe's ``encoder.weights`` can name the folder (docs/examples/real_parts.md).
"""

from mmfast.spec import Clip, Data, Fixed, LanguageModel, Linear, Optim, Stage, System

RECIPE = System(
    name="easy_vqa_tower",
    paper="arXiv:2103.00020",
    encoder=Clip(weights=None, width=64, depth=3, heads=4, ffn=128, patch=16, size=64, layer=-2),
    connector=Linear(),
    language=LanguageModel(weights=None, vocab=0, width=64, depth=1, heads=4, kv_heads=4, ffn=128, context=256, tied=True, init=0.05),
    image=Fixed(size=64, mean=(0.9,) * 3, std=(0.25,) * 3),
    stages=(
        Stage(
            "words",
            train=("encoder", "connector", "embeddings"),
            data=Data("easy_vqa"),
            objective="words",
            template="bare",
            optim=Optim(lr=2e-3, steps=400, batch=64, warmup=30, floor=0.02, betas=(0.9, 0.98), weight_decay=0.02),
        ),
    ),
)
