"""Chameleon (arXiv:2405.09818): pictures are codes of a VQGAN, tokens of the same vocabulary as words, read and written by one decoder.

The 7B model from nothing: the tokenizer, two stages of mixed-modal pre-training on documents (text alone, pairs with the picture first in half of
them, interleaved), supervised fine-tuning. Not published: the tokenizer's training (VQGAN's is followed), the rate's floor, the 7B's steps
(9.2 T tokens of the 34B in batches of 2^23, 80 % in the first stage), its rate (1e-4 is read from the discussion), whether that starts again in
stage 2 (here it does), and the fine-tuning's epochs and warm-up. The batch is 2,048 documents, which are 2^23 tokens where each fills its 4,096: of
pairs, about 1,050 tokens long, it is a quarter of that. Stage 2 halves the weights
of stage 1's data and adds better data; give its mixture with weights so. Dropout 0.1 is the 7B's; the 34B (width 8192, depth 48, heads 64,
kv_heads 8, ffn 22016) has norm="after" in its place.
"""

from dataclasses import replace

from mmfast.spec import Compute, Data, Drawing, Fixed, LanguageModel, NoConnector, Optim, SharedTokens, Stage, System, Vqgan

_PRETRAIN = Stage(
    "pretrain",
    train=("language", "embeddings"),
    data=Data("chameleon_stage_1", captions_first=0.5),
    template="bare",
    max_length=4096,
    z_loss=1e-5,
    dropout=0.1,
    optim=Optim(
        lr=1e-4, steps=877_000, batch=2048, warmup=4000, schedule="exponential", floor=0.01, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1
    ),
)

RECIPE = System(
    name="chameleon",
    paper="arXiv:2405.09818",
    encoder=Vqgan(),
    connector=NoConnector(),
    fusion=SharedTokens(),
    language=LanguageModel(
        family="chameleon", weights=None, words="facebook/chameleon-7b", vocab=65536, ffn=11008, context=4096, norm_eps=1e-5
    ),
    image=Fixed(size=512, fit_asked="pad", mean=(0.5,) * 3, std=(0.5,) * 3),
    stages=(
        Stage(
            "tokenizer",
            train=("encoder",),
            data=Data("chameleon_pictures"),
            objective="tokenizer",
            template="bare",
            drawing=Drawing(adversarial=0.8),
            optim=Optim(lr=5.4e-5, steps=500_000, batch=12, warmup=0, schedule="constant", betas=(0.5, 0.9), clip=0.0),
        ),
        _PRETRAIN,
        replace(_PRETRAIN, name="anneal", data=Data("chameleon_stage_2", captions_first=0.5), optim=replace(_PRETRAIN.optim, steps=219_000, warmup=0)),
        replace(
            _PRETRAIN, name="sft", data=Data("chameleon_sft"), template="chameleon", dropout=0.05,
            optim=Optim(lr=1e-5, epochs=2, batch=128, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1),
        ),
    ),
    compute=Compute(precision="bf16", packing=True),
)  # fmt: skip
