"""A drawer of random models that knows every shape at several sizes of the open dimensions.

What is drawn is valid at all of them, because a dimension is not one number but one number for each
of `SIZES`: two dimensions are equal only where they are equal at all sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.graphs import node

SIZES = ({"N": 2, "S": 3}, {"N": 1, "S": 4}, {"N": 3, "S": 1})
FLOAT, HALF, INT, INT32, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.BOOL,
)
OPSETS = (9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
Dim = tuple[int, ...]
Shape = tuple[Dim, ...]
_INPUTS: dict[str, tuple[int, list[int | str]]] = {
    "x": (FLOAT, ["N", 4, "S", 6]),
    "z": (FLOAT, ["N", "S", 8]),
    "k": (FLOAT, [4, 6]),
    "b": (FLOAT, ["N", 6]),
    "h": (HALF, ["N", 4]),
    "i": (INT, ["N", "S"]),
    "c": (BOOL, []),
}
_MOST_ELEMENTS = 3000


def fixed(size: int) -> Dim:
    """A dimension that is the same at all sizes."""
    return (size,) * len(SIZES)


def product(dims: Sequence[Dim]) -> Dim:
    """How many elements, at every size."""
    return tuple(int(np.prod([dim[at] for dim in dims], dtype=int)) for at in range(len(SIZES)))


@dataclass(frozen=True)
class Typed:
    """A name with its element type, its shape, and where it is made of sizes, its content."""

    name: str
    element: int
    shape: Shape
    content: tuple[Dim, ...] | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass
class Scope:
    """A graph in the making, and what it sees of those around it."""

    visible: list[Typed]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    made: list[Typed] = field(default_factory=list)


class Unsuited(Exception):
    """What was to be drawn does not fit what there is."""


class Drawer:
    """Draws a model from a seeded generator; `kinds` add nodes to a scope or raise Unsuited."""

    def __init__(
        self, rng: random.Random, kinds: Sequence[tuple[int, Callable[[Drawer, Scope], None]]]
    ) -> None:
        self.rng = rng
        self.opset = rng.choice(OPSETS)
        self.functions: list[onnx.FunctionProto] = []
        self.depth = 2  # how deep bodies may still nest
        self._count = 0
        self._kinds = [kind for _, kind in kinds]
        # a model of a few kinds repeats them, which is what rules look for
        self._weights = [weight * rng.choice([0, 1, 1, 4]) for weight, _ in kinds]
        if not any(self._weights):
            self._weights = [weight for weight, _ in kinds]

    def model(self, size: int) -> onnx.ModelProto:
        """A model of about `size` nodes, with the outputs that nothing reads and maybe others."""
        names = self.rng.sample(sorted(_INPUTS), self.rng.randint(2, 5))
        inputs = [_input(name) for name in names]
        scope = Scope(list(inputs))
        self.fill(scope, size)
        read = {name for n in scope.nodes for name in n.input}
        made = [v for v in scope.made if not v.name.startswith("hidden")]
        chosen = [v for v in made if v.name not in read] or made[-1:]
        if self.rng.random() < 0.3:  # the rest is dead
            chosen = self.rng.sample(made, min(len(made), self.rng.randint(1, 3)))
        elif self.rng.random() < 0.3:
            chosen = list(dict.fromkeys([*chosen, self.rng.choice(made)]))
        graph = helper.make_graph(
            scope.nodes,
            "g",
            [helper.make_tensor_value_info(name, *_INPUTS[name]) for name in names],
            [port(v) for v in chosen],
            scope.weights,
        )
        domains = [helper.make_opsetid("", self.opset)]
        domains += [helper.make_opsetid("local", 1)] if self.functions else []
        made_model = helper.make_model(graph, opset_imports=domains, functions=self.functions)
        made_model.ir_version = 10
        return made_model

    def fill(self, scope: Scope, size: int) -> None:
        """Add nodes until there are about `size` of them."""
        for _ in range(20 * size):
            if len(scope.nodes) >= size:
                break
            before = len(scope.nodes), len(scope.weights), len(scope.visible), len(scope.made)
            try:
                self.rng.choices(self._kinds, self._weights)[0](self, scope)
            except Unsuited:
                del scope.nodes[before[0] :], scope.weights[before[1] :]
                del scope.visible[before[2] :], scope.made[before[3] :]
        if not scope.made:
            x = self.pick(scope)
            self.add(scope, "Identity", [x], x.element, x.shape)

    def name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def pick(
        self,
        scope: Scope,
        element: int | Sequence[int] | None = None,
        rank: int | Sequence[int] | None = None,
        where: Callable[[Typed], bool] | None = None,
    ) -> Typed:
        """A value that there is, a recent one most of the time. Raises Unsuited."""
        elements = [element] if isinstance(element, int) else element
        ranks = [rank] if isinstance(rank, int) else rank
        fits = [
            v
            for v in scope.visible
            if (elements is None or v.element in elements)
            and (ranks is None or v.rank in ranks)
            and (where is None or where(v))
        ]
        if not fits:
            raise Unsuited
        return self.rng.choice(fits[-4:] if self.rng.random() < 0.7 else fits)

    def add(
        self, scope: Scope, op: str, inputs: Sequence[Typed | str], element: int, *shapes: Shape,
        content: tuple[Dim, ...] | None = None, **how: Any,
    ) -> Typed:  # fmt: skip
        """A node with one output for each shape; gives the first. Raises Unsuited if it is huge."""
        if any(max(product(shape)) > _MOST_ELEMENTS for shape in shapes):
            raise Unsuited
        made = [Typed(self.name(), element, shape, content) for shape in shapes]
        names = [v if isinstance(v, str) else v.name for v in inputs]
        scope.nodes.append(node(op, names, [v.name for v in made], **how))
        scope.visible += made
        scope.made += made
        return made[0]

    def stored(self, scope: Scope, values: object) -> Typed:
        """A constant: an initializer or a Constant node; integers of few axes have a content."""
        array = np.asarray(values)
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        content = None
        if array.dtype == np.int64 and array.ndim < 2:
            content = tuple(fixed(int(n)) for n in array.reshape(-1))
        made = Typed(self.name(), element, tuple(map(fixed, array.shape)), content)
        if self.rng.random() < 0.3:
            tensor = numpy_helper.from_array(array, "")
            scope.nodes.append(node("Constant", [], [made.name], value=tensor))
        else:
            scope.weights.append(numpy_helper.from_array(array, made.name))
        scope.visible.append(made)
        return made

    def ints(self, scope: Scope, values: object) -> Typed:
        return self.stored(scope, np.array(values, np.int64))

    def floats(self, scope: Scope, *shape: int, element: int = FLOAT) -> Typed:
        """Random numbers, or one number everywhere."""
        rng = np.random.default_rng(self.rng.getrandbits(32))
        if self.rng.random() < 0.3:
            values = np.full(shape, self.rng.choice([0.0, 1.0, -1.0, 0.5, 2.0]))
        else:
            values = np.round(rng.normal(size=shape), 3)
        return self.stored(scope, values.astype(helper.tensor_dtype_to_np_dtype(element)))

    def setting(
        self, scope: Scope, name: str, values: Sequence[int], since: int
    ) -> tuple[list[Typed], dict[str, Any]]:
        """What is an attribute before some opset, and an input from it on."""
        if self.opset >= since:
            return [self.ints(scope, values)], {}
        return [], {name: list(values)}

    def axis(self, x: Typed, axis: int) -> int:
        """The axis, counted from the end at times where the opset allows it."""
        return axis - x.rank if self.opset >= 13 and self.rng.random() < 0.3 else axis

    def reduced(self, x: Typed, axes: Sequence[int]) -> list[int]:
        """Axes of a reduction, in which onnxruntime keeps those counted from the end where there
        are no elements at all."""
        is_closed = all(dim == fixed(dim[0]) for dim in x.shape)
        return [self.axis(x, axis) if is_closed else axis for axis in axes]


def _input(name: str) -> Typed:
    element, dims = _INPUTS[name]
    shape = tuple(
        fixed(dim) if isinstance(dim, int) else tuple(sizes[dim] for sizes in SIZES) for dim in dims
    )
    return Typed(name, element, shape)


def port(value: Typed) -> onnx.ValueInfoProto:
    """An output of that rank, its sizes left open."""
    return helper.make_tensor_value_info(value.name, value.element, [None] * value.rank)
