"""Random models of a few nodes: constants, shape chains, bodies, duplicates, dead and random parts.

Every value has a type and a shape that are tracked here, so that whatever is drawn runs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.graphs import node

FREE = 2  # what the free dimension of the input is when the model runs
FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
UNARY = ("Abs", "Identity", "Neg", "Relu", "Tanh")
Kind = tuple[int, tuple[int, ...]]
BINARY = ("Add", "Max", "Mul", "Sub")


@dataclass(frozen=True)
class Typed:
    """A name with its element type and the shape that it has in the run."""

    name: str
    element: int
    shape: tuple[int, ...]


@dataclass
class Scope:
    """A graph in the making, and what it sees of those around it."""

    visible: list[Typed]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    made: list[Typed] = field(default_factory=list)


class Drawer:
    """Draws a model from a seeded generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.count = 0

    def model(self, size: int) -> onnx.ModelProto:
        """A model of about `size` nodes with one to three outputs."""
        inputs = [Typed("x", FLOAT, (FREE, 3)), Typed("k", FLOAT, (2, 3)), Typed("c", BOOL, ())]
        scope = Scope(list(inputs))
        self.fill(scope, size, 2)
        read = {name for n in scope.nodes for name in n.input}
        chosen = [v for v in scope.made if v.name not in read]
        if len(chosen) < 1 or self.rng.random() < 0.3:  # else nothing but what bodies read is dead
            chosen = self.rng.sample(scope.made, min(len(scope.made), self.rng.randint(1, 3)))
        outputs = [port(v.name, v.element, v.shape) for v in chosen]
        ports = [
            helper.make_tensor_value_info("x", FLOAT, ["N", 3]),
            helper.make_tensor_value_info("k", FLOAT, [2, 3]),
            helper.make_tensor_value_info("c", BOOL, []),
        ]
        graph = helper.make_graph(scope.nodes, "g", ports, outputs, scope.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        made.ir_version = 10
        return made

    def fill(self, scope: Scope, size: int, depth: int) -> None:
        """Add nodes until there are `size` of them, a repeated one now and then."""
        self.constant(scope)
        while len(scope.nodes) < size:
            kinds = [self.unary, self.binary, self.binary, self.constant, self.chain, self.reshape]
            kinds += [self.again, self.again, self.randomly, self.reduce, self.transpose]
            if depth:
                kinds += [self.conditional, self.conditional]
            kind = self.rng.choice(kinds)
            if kind == self.conditional:
                self.conditional(scope, depth)
            else:
                kind(scope)  # type: ignore[call-arg]

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def pick(self, scope: Scope, element: int, rank: int | None = None) -> Typed | None:
        fits = [v for v in scope.visible if v.element == element]
        fits = [v for v in fits if rank is None or len(v.shape) == rank]
        recent = fits[-3:] if self.rng.random() < 0.5 else fits
        return self.rng.choice(recent) if recent else None

    def add(
        self,
        scope: Scope,
        op: str,
        inputs: list[str],
        like: tuple[int, tuple[int, ...]],
        **how: object,
    ) -> Typed:
        made = Typed(self.name(), *like)
        scope.nodes.append(node(op, inputs, [made.name], **how))
        scope.visible.append(made)
        scope.made.append(made)
        return made

    def stored(self, scope: Scope, values: object) -> Typed:
        """A constant: an initializer or a Constant node."""
        array = np.asarray(values)
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        if self.rng.random() < 0.5:
            tensor = numpy_helper.from_array(array, "")
            return self.add(scope, "Constant", [], (element, array.shape), value=tensor)
        made = Typed(self.name(), element, array.shape)
        scope.weights.append(numpy_helper.from_array(array, made.name))
        scope.visible.append(made)
        return made

    # -- kinds ---------------------------------------------------------------------------------

    def constant(self, scope: Scope) -> None:
        shape = self.rng.choice([(), (3,), (1, 3), (2, 3)])
        numbers = self.rng.choices([-1.0, 0.0, 0.5, 1.0, 2.0], k=int(np.prod(shape)))
        self.stored(scope, np.array(numbers, np.float32).reshape(shape))

    def unary(self, scope: Scope) -> None:
        if (x := self.pick(scope, FLOAT)) is not None:
            self.add(scope, self.rng.choice(UNARY), [x.name], (FLOAT, x.shape))

    def binary(self, scope: Scope) -> None:
        a, b = self.pick(scope, FLOAT), self.pick(scope, FLOAT)
        if a is None or b is None:
            return
        try:
            shape = np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            return
        self.add(scope, self.rng.choice(BINARY), [a.name, b.name], (FLOAT, shape))

    def transpose(self, scope: Scope) -> None:
        x = self.pick(scope, FLOAT, 2)
        if x is not None:
            self.add(scope, "Transpose", [x.name], (FLOAT, x.shape[::-1]), perm=[1, 0])

    def reduce(self, scope: Scope) -> None:
        x = self.pick(scope, FLOAT, 2)
        if x is not None:
            self.add(scope, "ReduceMax", [x.name], (FLOAT, (x.shape[0], 1)), axes=[1])

    def chain(self, scope: Scope) -> None:
        """A size of a value, by one of the ways of exporters."""
        x = self.pick(scope, FLOAT, 2)
        if x is None:
            return
        shape = self.add(scope, "Shape", [x.name], (INT, (2,)))
        if self.rng.random() < 0.5:
            at = self.stored(scope, np.array(self.rng.choice([0, 1, -1]), np.int64))
            self.add(scope, "Gather", [shape.name, at.name], (INT, ()))
        else:
            start = self.rng.choice([0, 1])
            ends = [self.stored(scope, np.array([n], np.int64)) for n in (start, start + 1)]
            self.add(scope, "Slice", [shape.name, *(e.name for e in ends)], (INT, (1,)))

    def reshape(self, scope: Scope) -> None:
        """To a shape that is a constant, that of another value, or put together of sizes."""
        x = self.pick(scope, FLOAT, 2)
        if x is None or 0 in x.shape:
            return
        like = self.pick(scope, FLOAT, 2)
        if like is not None and np.prod(like.shape) == np.prod(x.shape) and self.rng.random() < 0.5:
            target = self.add(scope, "Shape", [like.name], (INT, (2,)))
            self.add(scope, "Reshape", [x.name, target.name], (FLOAT, like.shape))
            return
        size = self.pick(scope, INT, 0)
        if size is not None and self.rng.random() < 0.5:
            axes = self.stored(scope, np.array([0], np.int64))
            ends = self.add(scope, "Unsqueeze", [size.name, axes.name], (INT, (1,)))
            rest = self.stored(scope, np.array([1, -1], np.int64))
            one = self.add(scope, "Mul", [ends.name, ends.name], (INT, (1,)))
            zero = self.add(scope, "Sub", [one.name, one.name], (INT, (1,)))
            joined = self.add(scope, "Concat", [zero.name, rest.name], (INT, (3,)), axis=0)
            shape = (x.shape[0], 1, int(np.prod(x.shape)) // x.shape[0])
            self.add(scope, "Reshape", [x.name, joined.name], (FLOAT, shape))
            return
        target = self.stored(scope, np.array([-1], np.int64))
        self.add(scope, "Reshape", [x.name, target.name], (FLOAT, (int(np.prod(x.shape)),)))

    def again(self, scope: Scope) -> None:
        """A node that is there already, under another name."""
        typed = {v.name: v for v in scope.made}
        plain = [n for n in scope.nodes if n.output[0] in typed and n.op_type != "If"]
        if not plain:
            return
        twin = self.rng.choice(plain)
        old = typed[twin.output[0]]
        made = Typed(self.name(), old.element, old.shape)
        copy = onnx.NodeProto()
        copy.CopyFrom(twin)
        copy.output[0] = made.name
        scope.nodes.append(copy)
        scope.visible.append(made)
        scope.made.append(made)

    def randomly(self, scope: Scope) -> None:
        """A random draw that does not show in the result: times zero."""
        x = self.pick(scope, FLOAT)
        if x is not None:
            drawn = Typed(self.name(), FLOAT, x.shape)
            scope.nodes.append(node("RandomUniformLike", [x.name], [drawn.name]))
            zero = self.stored(scope, np.array(0, np.float32))
            self.add(scope, "Mul", [drawn.name, zero.name], (FLOAT, x.shape))

    def conditional(self, scope: Scope, depth: int) -> None:
        """An If on an input, on a constant, or on a size; its branches give one shape."""
        kind = self.rng.choice(["input", "constant", "size", "draw"])
        condition = "c"
        if kind == "constant":
            condition = self.stored(scope, np.array(self.rng.random() < 0.5)).name
        elif kind == "size" and (size := self.pick(scope, INT, 0)) is not None:
            three = self.stored(scope, np.array(3, np.int64))
            condition = self.add(scope, "Equal", [size.name, three.name], (BOOL, ())).name
        elif kind == "draw" and (found := self.pick(scope, BOOL, 0)) is not None:
            condition = found.name
        x = self.pick(scope, FLOAT, 2)
        if x is None:
            return
        branches = []
        for _ in range(2):
            body = Scope([v for v in scope.visible if v.element != BOOL or not v.shape])
            self.fill(body, self.rng.randint(1, 4), depth - 1)
            fits = [v for v in body.made if v.element == FLOAT and v.shape == x.shape]
            last = (
                self.rng.choice(fits) if fits else self.add(body, "Neg", [x.name], (FLOAT, x.shape))
            )
            outputs = [port(last.name, FLOAT, x.shape)]
            branches.append(helper.make_graph(body.nodes, "b", [], outputs, body.weights))
        how = {"then_branch": branches[0], "else_branch": branches[1]}
        self.add(scope, "If", [condition], (FLOAT, x.shape), **how)


def port(name: str, element: int, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    """An output of that rank, its sizes left open."""
    return helper.make_tensor_value_info(name, element, [None] * len(shape))


def feeds(seed: int = 0) -> list[dict[str, np.ndarray]]:  # type: ignore[type-arg]
    """One feed for each branch that an input decides."""
    rng = np.random.default_rng(seed)
    return [
        {
            "x": rng.normal(size=(FREE, 3)).astype(np.float32),
            "k": rng.normal(size=(2, 3)).astype(np.float32),
            "c": np.array(taken),
        }
        for taken in (True, False)
    ]
