"""What several rules require of shapes and constants. Only what is proven counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.rules import Const, Var

Dims = Sequence[int | str | None]


def same_shape(a: Var, b: Var) -> bool:
    """True where every size of both is proven, as a number or a symbol, and they are equal."""
    return None not in a.shape and a.shape == b.shape


def broadcasts_into(small: Dims, large: Dims) -> bool:
    """True where an elementwise operator of the two gives the shape `large`, whatever that is."""
    ahead = len(large) - len(small)
    return ahead >= 0 and all(
        a == 1 or (a is not None and a == b) for a, b in zip(small, large[ahead:], strict=True)
    )


def is_neutral(c: Const, neutral: float, x: Var) -> bool:
    """True where all elements are `neutral` and the constant does not spread `x` out."""
    values = c.values
    keeps = values.ndim == 0 or broadcasts_into(values.shape, x.shape)
    return values.dtype.kind in "biuf" and bool((values == neutral).all()) and keeps


def is_identity(permutation: Sequence[int]) -> bool:
    """True where nothing moves."""
    return list(permutation) == list(range(len(permutation)))


def from_front(axes: Any, rank: int) -> list[int]:
    """Axes counted from the front."""
    return [int(axis) % rank for axis in axes]


def whole(numbers: NDArray[Any] | Sequence[int] | None) -> list[int]:
    """Python integers of an attribute's or a constant's numbers, none where it is left out."""
    return [] if numbers is None else [int(number) for number in np.ravel(numbers)]


def adds_no_axes(c: Const, x: Var) -> bool:
    """True where an elementwise operator of the two has as many axes as `x`."""
    return c.values.ndim == 0 or c.values.ndim <= x.rank
