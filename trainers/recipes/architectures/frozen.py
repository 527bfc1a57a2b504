"""Frozen (arXiv:2106.13884): a picture is two vectors before the words of a language model that never changes; few shots follow by themselves.

The vision network starts from nothing and learns with the linear map behind it, on captions, by gradients through the frozen language model.
That one is not published (7 B parameters, 32,000 pieces, C4); LLaMA-7B has its size, its vocabulary's size and, as the method needs, relative
positions: a prefix that was trained at the front is read anywhere. Decay, warm-up, clipping, pixel statistics and the map's first weights are
not published either: none, ImageNet's, and so small that a prefix begins as long as a word. One epoch stands for stopping at the best
validation perplexity.

The paper's controls: train-blind ``--stages.captions.data.blind true``; finetuned ``--stages.captions.train [encoder, connector, language]
--stages.captions.optim.lr 1e-5``; scratch, the same with
``--language.weights null --language.words huggyllama/llama-7b``.
"""

from mmfast.spec import Data, Fixed, LanguageModel, NfResnet, Optim, Stage, System, Tokens

RECIPE = System(
    name="frozen",
    paper="arXiv:2106.13884",
    encoder=NfResnet(),
    connector=Tokens(2, init=3e-4),
    language=LanguageModel(weights="huggyllama/llama-7b"),
    image=Fixed(size=224, fit="pad", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    stages=(
        Stage(
            "captions",
            train=("encoder", "connector"),
            data=Data("conceptual_captions"),
            template="frozen",
            optim=Optim(lr=3e-4, epochs=1, batch=128, warmup=0, schedule="constant", betas=(0.9, 0.95), clip=0.0),
        ),
    ),
)
