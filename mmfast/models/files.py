"""Files of named tensors beside transformers' layout, as releases have them: safetensors, or torch's own format read for tensors alone."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor


def write_state(state: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Named tensors in fp32: safetensors, with ``metadata`` in its head, or for ``.pt``, ``.pth`` and ``.bin`` torch's own format without."""
    state = {name: tensor.float().cpu().contiguous() for name, tensor in state.items()}
    if Path(path).suffix in (".pt", ".pth", ".bin"):
        torch.save(state, path)
        return
    from safetensors.torch import save_file

    save_file(state, path, metadata)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """What ``write_state`` or a release's training code wrote; a file that holds anything but tensors and plain data is refused."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no file of tensors alone, and nothing else is read, as it could run code") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """What ``write_state`` was told of a safetensors file; nothing of any other."""
    if Path(path).suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}
