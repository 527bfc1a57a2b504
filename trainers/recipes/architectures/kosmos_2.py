"""Kosmos-2 (arXiv:2306.14824): Kosmos-1 that speaks of places, by tokens of a grid of 32 x 32 behind the phrases they belong to.

The paper starts from Kosmos-1, whose weights are not published; a run of ``kosmos_1`` or the released Kosmos-2 is what ``weights`` may name,
and without it this learns from scratch. The paper trains everything. The released code always ends with the image tower frozen (its list of
layers that should not be is undone at once), and is not followed; positions are the released model's, sinusoidal. Pictures are squashed, as
in the released demo, so that boxes are of the whole picture; the training code crops unless told otherwise (``image.fit: crop``). A batch is
93 rows of text, 1,117 captions, 1,117 grounded captions and 47 documents, 419,000 tokens. Which tokens of instructions are scored is not
published, nor how several turns are told apart; here answers are scored, each with an end of its own (template ``kosmos``). Nor is how many of
the 1,404 grounded rows of that stage are instructions and how many captions; here half. LLaVA-Instruct is to come without the pictures that
RefCOCO's validation and test parts show, as the paper's did. Trained in fp16 there, in bf16 here.
"""

from dataclasses import replace

from mmfast.spec import BoxTokens, Data, Fixed, Mixture

from .kosmos_1 import CAPTIONS, INSTRUCTIONS, PAGES, TEXT
from .kosmos_1 import RECIPE as KOSMOS_1

GRIT = Data("grit", boxes=0.5, min_side=200)
PRETRAIN = Mixture(
    "kosmos_2_pretrain",
    (
        replace(TEXT, weight=93),
        replace(CAPTIONS, weight=1117),
        replace(GRIT, weight=1117),
        replace(PAGES, weight=47),
    ),
)
INSTRUCT = Mixture(
    "kosmos_2_instruct",
    (
        INSTRUCTIONS,
        Data("llava_instruct", weight=351),
        replace(GRIT, weight=1404, boxes=1.0, instruct=0.5),
        replace(TEXT, weight=30),
        replace(PAGES, weight=15),
    ),
)
STAGE = replace(KOSMOS_1.stages[0], train=("encoder", "connector", "language", "embeddings"), data=PRETRAIN)
OPTIM = replace(STAGE.optim, steps=60_000, batch=2374)

RECIPE = replace(
    KOSMOS_1,
    name="kosmos_2",
    paper="arXiv:2306.14824",
    image=Fixed(size=224, fit="squash"),
    regions=BoxTokens(bins=32),
    stages=(
        replace(STAGE, optim=OPTIM),
        replace(STAGE, name="instruct", data=INSTRUCT, template="kosmos", optim=replace(OPTIM, lr=1e-5, steps=10_000, batch=1917)),
    ),
)
