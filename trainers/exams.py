"""What models are measured by beside captions and questions: a built-in data set brings its exam.

An exam takes a session whose model is trained, and its recipe; it returns flat measures, shares as fractions. ``evaluate.Exam`` is the one
for captions and questions, which every model of the shapes world's words takes whose data has no exam here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmfast.spec import System

from .drawn import drawing_exam

EXAMS: dict[str, Callable[[Any, System], dict[str, float]]] = {"shapes_drawing": drawing_exam}
