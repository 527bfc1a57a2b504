"""FROMAGe (arXiv:2301.13823): a frozen language model that reads pictures as one vector and finds them by the state of a token [RET].

Three affine maps, the row of [RET] and a scale learn: 5.5 M parameters (``connector.tokens`` 4: the second released model, 18.1 M; its
stage's ``max_length`` is 28 then). Where the paper is silent the released code is followed: image before the beginning token, neighbours joined in half
of the steps, 10 "epochs" of 2,000 steps (the paper's count is not settled), no text between picture and caption. Its schedule falls to a tenth
every 20,000 steps, so within these it never does: constant after the warm-up. Text is cut to 24 tokens, the picture's place stands beside.
"""

from mmfast.spec import Clip, Compute, Data, Fixed, LanguageModel, Optim, Retrieval, Stage, System, Tokens

RECIPE = System(
    name="fromage",
    paper="arXiv:2301.13823",
    encoder=Clip(weights="openai/clip-vit-large-patch14", patch=14, size=224, layer=-1, keep_class_token=True, post_norm=True),
    connector=Tokens(tokens=1, pool="class"),
    fusion=Retrieval(shared=256),
    language=LanguageModel(
        family="opt", weights="facebook/opt-6.7b", vocab=50272, width=4096, depth=32, heads=32, kv_heads=32, ffn=16384, tied=True
    ),
    image=Fixed(size=224),
    stages=(
        Stage(
            "pairs",
            train=("connector", "adapter", "new_tokens"),
            data=Data("cc3m"),
            objective="retrieval",
            template="fromage",
            max_length=25,
            optim=Optim(lr=3e-4, steps=20_000, batch=180, warmup=100, schedule="constant", betas=(0.9, 0.95), clip=1.0, level_new=True),
        ),
    ),
    compute=Compute(precision="bf16"),
)
