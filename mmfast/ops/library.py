"""Loads the compiled ops, once, and says how to build them when they are missing."""

import torch

try:
    from mmfast import _C
except ImportError as error:
    found = torch.__version__.split("+")[0]
    if tuple(int(part) for part in found.split(".")[:2]) < (2, 10):
        hint = f"mmfast needs torch >= 2.10, this is {found}: pip install 'torch>=2.10'."
    else:
        hint = "The compiled part of mmfast is missing or broken: in its source folder run `pip install --no-build-isolation .`"
    raise ImportError(f"{hint} ({error})") from error

build_info = _C.build_info
force_cpu_isa = _C.force_cpu_isa
