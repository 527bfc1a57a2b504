"""DPO (arXiv:2305.18290) on image-text pairs: raise the good answer over the bad one, measured against the policy's own start.

The baseline that the alignment methods refine. Learning rate and beta as LLaVA-family DPO commonly uses them.
"""

from mmfast.spec import Alignment, Contrast, Optim, Pairs

from ..architectures.llava import RECIPE as LLAVA

RECIPE = Alignment(
    name="dpo",
    paper="arXiv:2305.18290",
    policy=LLAVA,
    data=Pairs("user_pairs"),
    terms=(Contrast("chosen", "rejected"),),
    beta=0.1,
    optim=Optim(lr=5e-7, epochs=1, batch=32, warmup=0.1),
)
