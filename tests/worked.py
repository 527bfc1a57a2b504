"""What tests of worked values share: tolerances of the two types, and rows of numbers."""

import pytest
import torch


def near(values, dtype):
    return pytest.approx(values, rel=1e-9, abs=1e-12) if dtype == torch.float64 else pytest.approx(values, rel=1e-5, abs=1e-8)


def row(*values, dtype=torch.float64, grad=False):
    return torch.tensor(values, dtype=dtype, requires_grad=grad)
