"""What the names of a rule stand for on a match: values with what is proven of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.errors import ModelError
from graphopt.ir import Node, Shape, Value
from graphopt.language import Const, Rejected, RuleError, Var, Vars
from graphopt.match import Context, stated
from graphopt.proofs import TensorType


class Bound(Const):
    """A matched value, with the node of the pattern that computes it, if any."""

    def __init__(self, value: Value, context: Context, node: Node | None = None) -> None:
        self.value = value
        self._context = context
        self._node = node

    def __or__(self, other: Var) -> Var:
        return self

    @property
    def shape(self) -> Shape:
        known = self._context.types[self.value]
        if known is None or known.shape is None:
            raise Rejected(f"the rank of {self.value.name!r} is unknown")
        return known.shape

    @property
    def is_never_empty(self) -> bool:
        return all(map(self._context.types.proofs.is_nonzero, self.shape))

    @property
    def dtype(self) -> np.dtype[Any]:
        known = self._context.types[self.value]
        if known is None:
            raise Rejected(f"the type of {self.value.name!r} is unknown")
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(known.data_type))

    @property
    def attrs(self) -> dict[str, Any]:
        return {a.name: a for a in self._matched().proto.attribute}

    def attr(self, name: str) -> Any:
        try:
            return stated(self._matched(), name, self._context)
        except LookupError as error:
            raise Rejected(str(error)) from None

    @property
    def values(self) -> NDArray[Any]:
        weight = self._context.constant(self.value)
        if weight is None:
            raise Rejected(f"{self.value.name!r} is not constant")
        try:
            array = weight.values
        except ModelError as error:  # a weightless model has none
            raise Rejected(str(error)) from None
        if weight.is_float and array.dtype not in (np.float32, np.float64):
            return array.astype(np.float32)  # maths on narrow types would round at every step
        return array

    def _matched(self) -> Node:
        if self._node is None:
            raise RuleError(f"{self.value.name!r} is a parameter: only operators have attributes")
        return self._node


class AbsentInput(Const):
    """An optional input that was left out: reads as its default, is passed on as nothing."""

    def __init__(self, value: float) -> None:
        self._value = value

    @property
    def is_absent(self) -> bool:
        return True

    @property
    def values(self) -> NDArray[Any]:
        return np.asarray(self._value, np.float32)


class Unmatched(Var):
    """What an alternative that was not taken would have computed."""

    def __or__(self, other: Var) -> Var:
        return other


class BoundVars(Vars):
    """Several matched values."""

    def __init__(self, values: Sequence[Value], context: Context, node: Node | None = None) -> None:
        self.items = [Bound(value, context, node) for value in values]

    def __iter__(self) -> Iterator[Var]:  # type: ignore[override]
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def attr(self, name: str) -> Any:
        return self.items[0].attr(name)

    @property
    def attrs(self) -> dict[str, Any]:
        return self.items[0].attrs


class Planned(Var):
    """What a planned node will compute."""

    def __init__(self, name: str, known: TensorType | None) -> None:
        self.name = name
        self.known = known

    @property
    def shape(self) -> Shape:
        if self.known is None or self.known.shape is None:
            raise Rejected("the rank of a new value does not follow")
        return self.known.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        if self.known is None:
            raise Rejected("the type of a new value does not follow")
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.known.data_type))
