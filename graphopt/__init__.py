"""Makes ONNX models smaller and faster, and proves that they still compute the same thing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt import errors, hooks
    from graphopt.api import Result, optimize
    from graphopt.ir import Model

__all__ = ["Model", "Result", "errors", "hooks", "optimize"]

_HOMES = {
    "Model": "graphopt.ir",
    "Result": "graphopt.api",
    "optimize": "graphopt.api",
}


def __getattr__(name: str) -> object:
    """Import on first use: `import graphopt` stays quick for those who need only a part."""
    if name in ("errors", "hooks"):
        return importlib.import_module(f"graphopt.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
