"""Flamingo (arXiv:2204.14198): gated cross-attention blocks before some layers of a frozen language model read a picture's latents.

The 9B model with open parts: CLIP L/14 for its NFNet-F6, so that the resampler is 1024 wide (paper: 1536, 16 heads of 96), and LLaMA-7B for
Chinchilla's 7.1B, whose 32 layers have 8 blocks (paper: 40 and 10). Data are interleaved pages (M3W) and pairs and videos (ALIGN, LTIP, VTP),
all in every update; none is open, and neither the batch, its shares nor the betas are published. The published weights multiply a set's loss summed
over a sequence, in expectation; here, as in OpenFlamingo, its mean over tokens, so that sets of short texts weigh more than there. A video is one
picture of 8 frames. Augmentation of pictures is left out. Precision as published: what is frozen and activations in bf16, what learns in fp32.
"""

from mmfast.spec import Clip, Compute, Data, Fixed, GatedCrossAttention, LanguageModel, Mixture, Optim, Pages, Resampler, Stage, System

M3W = Data("m3w", loss=1.0, pages=Pages(pictures=5, window=True, following=0.5))
PAIRS = (Data("align", loss=0.2), Data("ltip", loss=0.2), Data("vtp", loss=0.03))

RECIPE = System(
    name="flamingo",
    paper="arXiv:2204.14198",
    encoder=Clip(weights="openai/clip-vit-large-patch14-336", patch=14, size=336, layer=-1),
    connector=Resampler(tokens=64, depth=6, heads=16, head_width=64, activation="squared_relu", frames=8),
    fusion=GatedCrossAttention(every=4, offset=0, heads=32, head_width=128, activation="squared_relu"),
    language=LanguageModel(weights="huggyllama/llama-7b"),
    image=Fixed(size=336, fit="pad_mean"),
    stages=(
        Stage(
            "interleaved",
            train=("connector", "adapter", "new_tokens"),
            data=Mixture("flamingo_mix", (M3W, *PAIRS)),
            template="flamingo",
            max_length=256,
            optim=Optim(lr=1e-4, steps=500_000, batch=256, warmup=5000, schedule="constant", weight_decay_of={"adapter": 0.1}),
        ),
    ),
    compute=Compute(precision="bf16"),
)
