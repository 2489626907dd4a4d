"""Shapes to assume for a model's inputs where it leaves dims free and nobody says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx

from graphopt.errors import UsageError
from graphopt.sizes import Size

BATCH: Final = 1
CHANNELS: Final = 3
IMAGE_SIDE: Final = 224
SEQUENCE: Final = 128
_SUM: Final = re.compile(r"\s*\+\s*")


@dataclass(frozen=True)
class ChosenSizes:
    """Shapes of all inputs that are tensors; `assumed` names those that had to be guessed."""

    inputs: dict[str, Size]
    symbols: dict[str, int]
    assumed: list[str]


def choose_sizes(
    inputs: Sequence[onnx.ValueInfoProto], given: Mapping[str, Sequence[int]]
) -> ChosenSizes:
    """A shape for every input: as given, else declared, with free dims filled by what is usual.

    Batch 1, image sides 224, 3 channels, length 128; dims of one name get one size. Raises
    UsageError where a given shape is of no input or contradicts the declared sizes.
    """
    tensors = {i.name: i for i in inputs if i.type.tensor_type.HasField("shape")}
    unknown = sorted(set(given) - {i.name for i in inputs})
    if unknown:
        names = ", ".join(i.name for i in inputs) or "none"
        raise UsageError(f"shape of {unknown[0]!r}: there is no such input; there are: {names}")
    symbols: dict[str, int] = {}
    for name, shape in given.items():
        dims = tensors[name].type.tensor_type.shape.dim if name in tensors else []
        fixed = [d.dim_value for d in dims]
        if name in tensors and (
            len(dims) != len(shape) or any(f and f != s for f, s in zip(fixed, shape, strict=True))
        ):
            declared = ",".join(str(d.dim_value or d.dim_param or "?") for d in dims)
            raise UsageError(
                f"shape of {name!r}: {','.join(map(str, shape))} does not fit {declared}"
            )
        symbols.update(
            (d.dim_param, s) for d, s in zip(dims, shape, strict=False) if _names_a_size(d)
        )
    chosen = {name: tuple(shape) for name, shape in given.items()}
    assumed = []
    for name, info in tensors.items():
        if name in chosen:
            continue
        dims = info.type.tensor_type.shape.dim
        if any(not d.HasField("dim_value") and d.dim_param not in symbols for d in dims):
            assumed.append(name)
        chosen[name] = tuple(
            _size(axis, dims, symbols) if not d.dim_value else d.dim_value
            for axis, d in enumerate(dims)
        )
    return ChosenSizes(chosen, symbols, assumed)


def _size(
    axis: int, dims: Sequence[onnx.TensorShapeProto.Dimension], symbols: dict[str, int]
) -> int:
    """The size of a free dim: what its name has already, or the usual one for its place."""
    dim = dims[axis]
    if not _names_a_size(dim):
        return _usual(axis, dims)
    parts = _SUM.split(dim.dim_param)
    if len(parts) > 1 and all(part in symbols or part.isdigit() for part in parts):
        return sum(symbols.get(part) or int(part) for part in parts)
    return symbols.setdefault(dim.dim_param, _usual(axis, dims))


def _usual(axis: int, dims: Sequence[onnx.TensorShapeProto.Dimension]) -> int:
    name = dims[axis].dim_param.lower()
    if axis == 0 or "batch" in name:
        return BATCH
    if len(dims) < 4 or "seq" in name or "len" in name:
        return SEQUENCE
    # the axis of the channels: the last where that is as few as colours are, else the second
    channels = len(dims) - 1 if 0 < dims[-1].dim_value <= 4 else 1
    if dims[channels].dim_value not in (0, 1, 3) and sum(not d.dim_value for d in dims[1:]) == 1:
        return SEQUENCE  # as in caches: (batch, heads, length, size)
    return CHANNELS if axis == channels else IMAGE_SIDE


def _names_a_size(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return dim.dim_param.strip() not in ("", "?", "-1", "None")
