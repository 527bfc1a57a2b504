"""LLaMA-Adapter (arXiv:2303.16199): zero-initialised gated prompts in the last 30 layers of LLaMA, a picture's feature added to them.

The multimodal model of ScienceQA; its text half on Alpaca is the same with ``train=("adapter",)`` and the template ``alpaca``. Where paper
and released script differ the script is followed: 32 rows and lr 9e-3 x 32 / 256 (paper: batch 64, lr 9e-3, read as the base rate that is
2.25e-3), gates through tanh (paper: as they are). No clipping there. The script decays prompts and gates like all else, as here. Labels of
``<unk>`` are scored here. Questions are put as the paper's figure shows them, whose blanks are not told. Not published: which scales of CLIP's
global features are concatenated, here the class token after every sixth block, and the layout of the projection, here two maps (68 units meet
the paper's total of 1.79 M). What is frozen is held in fp16 there, in bf16 here; what learns in fp32 in both.
"""

from mmfast.spec import AdapterPrompts, Clip, Compute, Data, Fixed, LanguageModel, Optim, Pooled, Stage, System

RECIPE = System(
    name="llama_adapter",
    paper="arXiv:2303.16199",
    encoder=Clip(weights="openai/clip-vit-large-patch14", patch=14, size=224, layer=-1, scales=(-19, -13, -7), keep_class_token=True),
    connector=Pooled(hidden=68),
    fusion=AdapterPrompts(length=10, layers=30, gate="tanh"),
    language=LanguageModel(weights="huggyllama/llama-7b"),
    image=Fixed(size=224),
    stages=(
        Stage(
            "answers",
            train=("connector", "adapter"),
            data=Data("scienceqa", choices="llama_adapter"),
            template="bare",
            max_length=512,
            optim=Optim(lr=1.125e-3, epochs=5, batch=32, warmup=0.4, betas=(0.9, 0.95), weight_decay=0.02, clip=0.0),
        ),
    ),
    compute=Compute(precision="bf16"),
)
