"""Random models of Transposes and what they can move through, every shape known to the drawer."""

from __future__ import annotations

import itertools
import random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.graphs import node

Shape = tuple[int, ...]
INPUTS: dict[str, Shape] = {"x": (2, 3, 4, 5), "z": (2, 3, 4, 5), "f": (3, 1, 4)}
_UNARY = ("Abs", "Relu", "Neg", "Identity", "Ceil")
_BINARY = ("Add", "Mul", "Max", "Sub")


class Layouts:
    """Draws a model from a seeded generator; nothing in it rounds differently when moved."""

    def __init__(self, rng: random.Random, opset: int) -> None:
        self.rng = rng
        self.opset = opset
        self.count = itertools.count()
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes: dict[str, Shape] = dict(INPUTS)
        self.elements: dict[str, int] = dict.fromkeys(INPUTS, TensorProto.FLOAT)

    def model(self, size: int) -> onnx.ModelProto:
        """A model of about `size` nodes; its first size is left open."""
        kinds = [self.transpose, self.transpose, self.back, self.unary, self.binary, self.binary]
        kinds += [self.scaled, self.concat, self.split, self.pad, self.cut, self.reduce, self.where]
        kinds += [self.squeeze, self.unsqueeze, self.reshape, self.tile, self.argmax]
        while len(self.nodes) < size:
            self.rng.choice(kinds)(self.pick())
        read = {name for n in self.nodes for name in n.input}
        ends = [name for name in self.shapes if name not in read and name not in INPUTS]
        if self.rng.random() < 0.4:
            made = [name for name in self.shapes if name not in INPUTS]
            ends = list(dict.fromkeys([*ends, self.rng.choice(made)]))
        ports = [
            helper.make_tensor_value_info(n, 1, [f"{n}_size", *s[1:]]) for n, s in INPUTS.items()
        ]
        outputs = [
            helper.make_tensor_value_info(n, self.elements[n], [None] * len(self.shapes[n]))
            for n in ends
        ]
        graph = helper.make_graph(self.nodes, "g", ports, outputs, self.weights)
        made_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        made_model.ir_version = 8
        return made_model

    def pick(self) -> str:
        names = list(self.shapes)
        return self.rng.choice(names[-4:] if self.rng.random() < 0.7 else names)

    def add(self, op: str, inputs: list[str], *shapes: Shape, **how: object) -> list[str]:
        made = [f"v{next(self.count)}" for _ in shapes]
        self.nodes.append(node(op, inputs, made, **how))
        self.shapes |= zip(made, shapes, strict=True)
        self.elements |= dict.fromkeys(made, TensorProto.FLOAT)
        return made

    def stored(self, values: object) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def set(self, name: str, values: list[int], since: int) -> tuple[list[str], dict[str, object]]:
        """An input or an attribute, by the opset."""
        if self.opset >= since:
            return [self.stored(np.array(values, np.int64))], {}
        return [], {name: values}

    # -- kinds ---------------------------------------------------------------------------------

    def transpose(self, x: str) -> None:
        shape = self.shapes[x]
        if not shape:
            return
        nhwc = [[0, 2, 3, 1], [0, 3, 1, 2]]
        drawn = self.rng.sample(range(len(shape)), len(shape))
        perm = self.rng.choice(nhwc) if len(shape) == 4 and self.rng.random() < 0.7 else drawn
        self.add("Transpose", [x], tuple(shape[axis] for axis in perm), perm=perm)

    def back(self, x: str) -> None:
        """What undoes some Transpose that there is."""
        rank = len(self.shapes[x])
        perms = [list(a.ints) for n in self.nodes for a in n.attribute if a.name == "perm"]
        perms = [perm for perm in perms if len(perm) == rank]
        if perms:
            perm = np.argsort(self.rng.choice(perms)).tolist()
            shape = tuple(self.shapes[x][axis] for axis in perm)
            self.add("Transpose", [x], shape, perm=perm)

    def unary(self, x: str) -> None:
        self.add(self.rng.choice(_UNARY), [x], self.shapes[x])

    def binary(self, x: str) -> None:
        alike = [name for name, shape in self.shapes.items() if shape == self.shapes[x]]
        self.add(self.rng.choice(_BINARY), [x, self.rng.choice(alike)], self.shapes[x])

    def where(self, x: str) -> None:
        shape = self.shapes[x]
        mask = self.stored(np.arange(shape[-1] if shape else 1) % 2 == 0)
        if shape:
            self.add("Where", [mask, x, x], shape)

    def scaled(self, x: str) -> None:
        """By a constant that broadcasts along some axes."""
        shape = self.shapes[x]
        ones = [size if self.rng.random() < 0.5 else 1 for size in shape]
        ones = ones[self.rng.randint(0, len(ones)) :]
        constant = np.arange(1, np.prod(ones, dtype=int) + 1).reshape(ones).astype(np.float32)
        if self.shapes[x] and shape[0] == 2 and ones[:1] == [2] and len(ones) == len(shape):
            return  # the first size may be open
        self.add(self.rng.choice(_BINARY), [x, self.stored(constant)], shape)

    def concat(self, x: str) -> None:
        shape = self.shapes[x]
        if shape:
            axis = self.rng.randrange(len(shape))
            twice = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
            self.add("Concat", [x, x], twice, axis=axis - self.rng.choice([0, len(shape)]))

    def split(self, x: str) -> None:
        even = [axis for axis, size in enumerate(self.shapes[x]) if size % 2 == 0]
        if even:
            axis = self.rng.choice(even)
            shape = self.shapes[x]
            half = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
            how = {"num_outputs": 2} if self.opset >= 18 else {}
            self.add("Split", [x], half, half, axis=axis, **how)

    def pad(self, x: str) -> None:
        shape = self.shapes[x]
        if np.prod(shape, dtype=int) > 2000 or not shape:
            return
        pads = [self.rng.choice([0, 0, 1]) for _ in range(2 * len(shape))]
        after = tuple(s + a + b for s, a, b in zip(shape, pads, pads[len(shape) :], strict=False))
        inputs, how = self.set("pads", pads, 11)
        self.add("Pad", [x, *inputs], after, **how)

    def cut(self, x: str) -> None:
        """A Slice of some axis."""
        wide = [axis for axis, size in enumerate(self.shapes[x]) if size > 2]
        if wide:
            axis, shape = self.rng.choice(wide), self.shapes[x]
            bounds = [[1], [shape[axis] - 1], [axis - self.rng.choice([0, len(shape)])]]
            inputs = [self.stored(np.array(bound, np.int32)) for bound in bounds]
            after = (*shape[:axis], shape[axis] - 2, *shape[axis + 1 :])
            self.add("Slice", [x, *inputs], after)

    def reduce(self, x: str) -> None:
        shape = self.shapes[x]
        if not shape:
            return
        axes = self.rng.sample(range(len(shape)), self.rng.randint(1, len(shape)))
        keeps = self.rng.randint(0, 1)
        after = tuple(1 if a in axes else s for a, s in enumerate(shape) if keeps or a not in axes)
        inputs, how = self.set("axes", axes, 18)
        self.add("ReduceMax", [x, *inputs], after, keepdims=keeps, **how)

    def argmax(self, x: str) -> None:
        shape = self.shapes[x]
        if shape:
            axis = self.rng.randrange(len(shape))
            after = (*shape[:axis], *shape[axis + 1 :])
            found = self.add("ArgMax", [x], after, axis=axis, keepdims=0)
            self.elements[found[0]] = TensorProto.INT64
            self.add("Cast", found, after, to=1)
            del self.shapes[found[0]]

    def squeeze(self, x: str) -> None:
        ones = [axis for axis, size in enumerate(self.shapes[x]) if size == 1]
        if ones:
            axis, shape = self.rng.choice(ones), self.shapes[x]
            inputs, how = self.set("axes", [axis], 13)
            self.add("Squeeze", [x, *inputs], (*shape[:axis], *shape[axis + 1 :]), **how)

    def unsqueeze(self, x: str) -> None:
        shape = self.shapes[x]
        if len(shape) < 5:
            axis = self.rng.randint(0, len(shape))
            inputs, how = self.set("axes", [axis], 13)
            self.add("Unsqueeze", [x, *inputs], (*shape[:axis], 1, *shape[axis:]), **how)

    def reshape(self, x: str) -> None:
        """Drops or adds axes of size one, or flattens."""
        shape = [size for size in self.shapes[x] if size != 1 or self.rng.random() < 0.3]
        if not shape:
            return
        if self.rng.random() < 0.3:
            shape.insert(self.rng.randint(0, len(shape)), 1)
        if self.rng.random() < 0.2:
            shape = [int(np.prod(shape))]
        target = list(shape)
        target[self.rng.randrange(len(target))] = -1
        self.add("Reshape", [x, self.stored(np.array(target, np.int64))], tuple(shape))

    def tile(self, x: str) -> None:
        shape = self.shapes[x]
        if shape and np.prod(shape) < 500:
            repeats = [self.rng.choice([1, 1, 2]) for _ in shape]
            after = tuple(s * r for s, r in zip(shape, repeats, strict=True))
            self.add("Tile", [x, self.stored(np.array(repeats, np.int64))], after)


def feed(seed: int = 0) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Values for the inputs, the open size being 2 (of `f`: 3)."""
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in INPUTS.items()}
