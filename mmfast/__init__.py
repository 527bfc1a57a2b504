"""Fast multimodal ops for PyTorch, and the building blocks of multimodal language models on top of them.

``import mmfast`` needs torch alone. The ops are ``mmfast.vq_nearest`` and its relatives (``mmfast.ops``), the modules built on them
``mmfast.nn``; ``mmfast.apply(model)`` puts them into a live transformers model and ``mmfast.restore(model)`` takes them out again.
``mmfast.models``, ``mmfast.data`` and the trainers load their libraries when they are imported.
"""

from mmfast import ops
from mmfast.ops import *  # noqa: F403
from mmfast.ops.library import build_info

__all__ = ["build_info", "ops", *ops.__all__]


def __getattr__(name: str):  # mmfast.nn, .apply, .restore without their own import line, and without its cost for those who want an op
    import importlib

    if name == "__version__":  # not at import: a wrong MMFAST_CPU_ISA fails there, and `mmfast env` is to say so
        return build_info()["version"]
    if name == "nn":
        return importlib.import_module("mmfast.nn")
    if name in ("apply", "restore"):
        return getattr(importlib.import_module("mmfast.integrations.transformers"), name)
    raise AttributeError(f"module 'mmfast' has no attribute {name!r}")
