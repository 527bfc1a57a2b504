"""A pytest plugin that lets the benchmarks believe in a GPU: what they put on "cuda" stays on the CPU, events and graphs are stand-ins.

``pytest -p fake_cuda`` runs the GPU's branches, which no machine without a card would otherwise enter. Times mean nothing.
"""

import contextlib
import time

import torch
from torch.overrides import TorchFunctionMode


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        here = lambda x: torch.device("cpu") if x == "cuda" or (isinstance(x, torch.device) and x.type == "cuda") else x  # noqa: E731
        kwargs = {k: here(v) for k, v in (kwargs or {}).items()}
        return function(*(here(a) if isinstance(a, (str, torch.device)) else a for a in args), **kwargs)


class _Event:
    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class _Stream:
    def wait_stream(self, other):
        pass


class _Graph:
    def replay(self):
        pass


def pytest_configure(config=None):
    cuda = torch.cuda
    cuda.get_device_name = lambda: "Fake GPU"
    cuda.Event, cuda.Stream, cuda.CUDAGraph = _Event, _Stream, _Graph
    cuda.stream = cuda.graph = lambda *_: contextlib.nullcontext()
    cuda.current_stream = lambda: _Stream()
    cuda.synchronize = cuda.reset_peak_memory_stats = lambda: None
    cuda.memory_allocated, cuda.max_memory_allocated = lambda: 0, lambda: 1 << 20
    import timing

    timing.DEVICE = "cuda"
    timing.limits = lambda: {"copy_gbps": 1.0, "bfloat16_tflops": 1.0, "float16_tflops": 1.0, "float32_tflops": 1.0}
    _OnCpu().__enter__()
