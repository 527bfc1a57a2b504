"""Benchmarks import their shared timing from this folder, and do not begin what the run has no time for."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import timing


@pytest.fixture(autouse=True)
def _deadline(request):
    if timing.out_of_time(request.node.name):
        pytest.skip("the run's time is spent")
