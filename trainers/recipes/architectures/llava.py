"""LLaVA (arXiv:2304.08485): CLIP states through one linear layer into the language model's sequence; align, then instruct.

Stage 1 trains the projection alone on captions, stage 2 the projection and the language model on GPT-4-made instructions. Batch sizes as in
the paper; the scripts that were released later use 128 in stage 2. Sequences and templates are those of the code of July 2023 ("v1"): no
tokens around a picture. Data: LLaVA-CC3M-Pretrain-595K and LLaVA-Instruct-158K. bf16 and recomputed activations are the release's.
"""

from mmfast.spec import Clip, Compute, Data, Fixed, LanguageModel, Linear, Optim, Stage, System

RECIPE = System(
    name="llava",
    paper="arXiv:2304.08485",
    encoder=Clip(weights="openai/clip-vit-large-patch14", patch=14, size=224, layer=-2),
    connector=Linear(),
    language=LanguageModel(weights="lmsys/vicuna-7b-v1.1"),
    image=Fixed(size=224),
    stages=(
        Stage("align", train=("connector",), data=Data("llava_cc3m_595k"), template="plain", optim=Optim(lr=2e-3, epochs=1, batch=128)),
        Stage(
            "instruct",
            train=("connector", "language", "embeddings"),
            data=Data("llava_instruct_158k"),
            template="vicuna_v1",
            optim=Optim(lr=2e-5, epochs=3, batch=32),
        ),
    ),
    compute=Compute(precision="bf16", checkpointing=True),
)
