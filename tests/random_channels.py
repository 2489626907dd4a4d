"""Random graphs that move, join, split and mix channels in every way that can be followed, and
in some that cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from tests import graphs

N, SIZE = 2, 4  # batch, height and width of every value
Array = np.ndarray[Any, Any]


class Chain:
    """Grows a graph of values [N, C, SIZE, SIZE], each step from one or two of those before."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []
        self.channels: dict[str, int] = {"x": 3}
        self.read: set[str] = set()

    def model(self, steps: int) -> onnx.ModelProto:
        """The graph after so many steps: a convolution reads what nothing reads."""
        for _ in range(2):
            self.convolve("x")
        for _ in range(steps):
            step = self.pick(STEPS)
            step(self, self.pick([*self.channels][1:][-4:]))
        ends = [name for name in self.channels if name not in self.read]
        outputs = []
        for number, name in enumerate(ends):
            weights = self.weights(2, self.channels[name], 1, 1)
            outputs.append(f"y{number}")
            self.node("Conv", [name, weights], outputs[-1])
        if self.random.random() < 0.15:
            outputs.append(self.pick([*self.channels][1:]))
        inputs = [graphs.value("x", (N, 3, SIZE, SIZE))]
        infos = [graphs.value(name, ["n", "c", "h", "w"]) for name in dict.fromkeys(outputs)]
        return graphs.model(self.nodes, inputs, infos, self.held, opset=17)

    # -- parts ---------------------------------------------------------------------------------

    def pick(self, options: Any) -> Any:
        return options[int(self.random.integers(len(options)))]

    def node(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        self.read.update(inputs)
        return output

    def give(self, name: str, channels: int) -> str:
        self.channels[name] = channels
        return name

    def hold(self, array: Array) -> str:
        name = f"k{len(self.held)}"
        self.held.append(onnx.numpy_helper.from_array(array, name))
        return name

    def weights(self, *shape: int, positive: bool = False) -> str:
        values = self.random.normal(size=shape) / np.sqrt(math.prod(shape[1:]))
        return self.hold((np.abs(values) + 0.5 if positive else values).astype(np.float32))

    def ints(self, *numbers: int) -> str:
        return self.hold(np.asarray(numbers, np.int64))

    # -- steps ---------------------------------------------------------------------------------

    def convolve(self, x: str) -> str:
        to, c = self.pick([2, 4, 6, 8]), self.channels[x]
        inputs = [x, self.weights(to, c, 3, 3)]
        if self.random.random() < 0.5:
            inputs.append(self.weights(to))
        return self.give(self.node("Conv", inputs, pads=[1, 1, 1, 1]), to)

    def depthwise(self, x: str) -> str:
        c, times = self.channels[x], self.pick([1, 1, 2])
        weights = self.weights(c * times, 1, 1, 1)
        return self.give(self.node("Conv", [x, weights], group=c), c * times)

    def grouped(self, x: str) -> str:
        c = self.channels[x]
        if c % 2:
            return self.convolve(x)
        return self.give(self.node("Conv", [x, self.weights(4, c // 2, 1, 1)], group=2), 4)

    def transposed(self, x: str) -> str:
        weights = self.weights(self.channels[x], 4, 1, 1)
        return self.give(self.node("ConvTranspose", [x, weights]), 4)

    def activate(self, x: str) -> str:
        op = self.pick(["Relu", "Sigmoid", "Tanh", "HardSwish", "Identity", "Neg"])
        return self.give(self.node(op, [x]), self.channels[x])

    def join(self, x: str) -> str:
        c = self.channels[x]
        others = [name for name, count in self.channels.items() if count == c]
        return self.give(self.node(self.pick(["Add", "Mul", "Max"]), [x, self.pick(others)]), c)

    def scale(self, x: str) -> str:
        c = self.channels[x]
        shape = self.pick([(c, 1, 1), (1, c, 1, 1), (1,), (SIZE, 1), (c, SIZE, SIZE)])
        return self.give(self.node(self.pick(["Mul", "Add"]), [x, self.weights(*shape)]), c)

    def normalise(self, x: str) -> str:
        c = self.channels[x]
        inputs = [x, *(self.weights(c) for _ in range(3)), self.weights(c, positive=True)]
        if self.random.random() < 0.5:
            return self.give(self.node("InstanceNormalization", inputs[:3]), c)
        return self.give(self.node("BatchNormalization", inputs), c)

    def concat(self, x: str) -> str:
        other = self.pick([*self.channels])
        count = self.channels[x] + self.channels[other]
        return x if count > 24 else self.give(self.node("Concat", [x, other], axis=1), count)

    def halves(self, x: str) -> str:
        c = self.channels[x]
        if c < 4:
            return self.convolve(x)
        first = c // 2 if self.random.random() < 0.5 else int(self.random.integers(1, c))
        names = [f"v{len(self.nodes)}a", f"v{len(self.nodes)}b"]
        inputs = [x] if first * 2 == c else [x, self.ints(first, c - first)]
        self.nodes.append(helper.make_node("Split", inputs, names, axis=1))
        self.read.add(x)
        self.give(names[0], first)
        return self.give(names[1], c - first)

    def stretch(self, x: str) -> str:
        c = self.channels[x]
        first = int(self.random.integers(0, c - 1)) if c > 1 else 0
        last = int(self.random.integers(first + 1, c + 1))
        bounds = (first - c, 2**40 if last == c else last) if self.random.random() < 0.5 else (
            first, last)  # fmt: skip
        inputs = [x, self.ints(bounds[0]), self.ints(bounds[1]), self.ints(1)]
        return self.give(self.node("Slice", inputs), last - first)

    def choose(self, x: str) -> str:
        c = self.channels[x]
        count = int(self.random.integers(1, c + 2))
        indices = self.ints(*self.random.integers(-c, c, count).tolist())
        return self.give(self.node("Gather", [x, indices], axis=1), count)

    def shuffle(self, x: str) -> str:
        c = self.channels[x]
        groups = self.pick([g for g in (1, 2, 3, 4) if c % g == 0])
        apart = self.node("Reshape", [x, self.ints(0, groups, -1, SIZE, SIZE)])
        turned = self.node("Transpose", [apart], perm=[0, 2, 1, 3, 4])
        return self.give(self.node("Reshape", [turned, self.ints(N, c, SIZE, SIZE)]), c)

    def in_groups(self, x: str) -> str:
        c = self.channels[x]
        groups = self.pick([g for g in (1, 2, 3, 4) if c % g == 0])
        apart = self.node("Reshape", [x, self.ints(0, groups, -1)])
        inputs = [apart, self.weights(groups), self.weights(groups)]
        normal = self.node("InstanceNormalization", inputs)
        return self.give(self.node("Reshape", [normal, self.ints(0, c, SIZE, SIZE)]), c)

    def pad(self, x: str) -> str:
        c, before = self.channels[x], self.pick([0, 1])
        return self.give(
            self.node("Pad", [x, self.ints(0, before, 0, 0, 0, 1, 0, 0)]), c + before + 1
        )

    def excite(self, x: str) -> str:
        c = self.channels[x]
        pooled = self.node("GlobalAveragePool", [x])
        inner = self.node("Relu", [self.node("Conv", [pooled, self.weights(2, c, 1, 1)])])
        gate = self.node("Sigmoid", [self.node("Conv", [inner, self.weights(c, 2, 1, 1)])])
        return self.give(self.node("Mul", [x, gate]), c)

    def positions(self, x: str) -> str:
        """Positions as one axis and back, by a target that is literal, measured, or both."""
        c = self.channels[x]
        flat = self.node(
            "Reshape", [x, self.ints(*self.pick([(0, c, -1), (N, c, 16), (0, 0, 16)]))]
        )
        kind = self.pick(["literal", "measured", "both"])
        if kind == "literal":
            target = self.ints(N, c, SIZE, SIZE)
        elif kind == "measured":
            target = self.node("Shape", [x])
        else:
            size = self.node("Shape", [x])
            count = self.pick([1, 2])
            measured = self.node("Slice", [size, self.ints(0), self.ints(count)])
            rest = [c, SIZE, SIZE] if count == 1 else [SIZE, -1]
            target = self.node("Concat", [measured, self.ints(*rest)], axis=0)
        return self.give(self.node("Reshape", [flat, target]), c)

    def last(self, x: str) -> str:
        """A product along channels as the last axis."""
        turned = self.node("Transpose", [x], perm=[0, 2, 3, 1])
        product = self.node("MatMul", [turned, self.weights(self.channels[x], 4)])
        return self.give(self.node("Transpose", [product], perm=[0, 3, 1, 2]), 4)

    def dense(self, x: str) -> str:
        c = self.channels[x]
        flat = self.node("Flatten", [x])
        product = self.node("MatMul", [flat, self.weights(c * SIZE * SIZE, 4 * SIZE * SIZE)])
        return self.give(self.node("Reshape", [product, self.ints(0, 4, SIZE, SIZE)]), 4)

    def mix(self, x: str) -> str:
        """What cannot be followed."""
        c = self.channels[x]
        op = self.pick(["Softmax", "LRN", "mean", "size", "LayerNormalization"])
        if op == "mean":
            return self.give(self.node("Sub", [x, self.node("ReduceMean", [x], axes=[1])]), c)
        if op == "size":
            count = self.node("Cast", [self.node("Size", [x])], to=1)
            return self.give(self.node("Div", [x, count]), c)
        if op == "LayerNormalization":
            return self.give(self.node(op, [x, self.weights(c, SIZE, SIZE)], axis=1), c)
        attributes: dict[str, Any] = {"axis": 1} if op == "Softmax" else {"size": 3}
        return self.give(self.node(op, [x], **attributes), c)

    def expand(self, x: str) -> str:
        c = self.channels[x]
        pooled = self.node("GlobalAveragePool", [x])
        target = self.pick([(N, c, SIZE, SIZE), (1, 1, SIZE, SIZE)])
        return self.give(self.node("Expand", [pooled, self.ints(*target)]), c)

    def repeat(self, x: str) -> str:
        c = self.channels[x]
        return x if c > 8 else self.give(self.node("Tile", [x, self.ints(1, 2, 1, 1)]), 2 * c)


STEPS: list[Callable[[Chain, str], str]] = [
    *[Chain.convolve] * 4,
    *[Chain.activate] * 2,
    *[Chain.join] * 3,
    *[Chain.concat] * 2,
    *[Chain.halves] * 2,
    *[Chain.stretch] * 2,
    Chain.choose,
    Chain.depthwise,
    Chain.grouped,
    Chain.transposed,
    Chain.scale,
    Chain.normalise,
    Chain.shuffle,
    Chain.in_groups,
    Chain.pad,
    Chain.excite,
    *[Chain.positions] * 2,
    Chain.last,
    Chain.dense,
    Chain.mix,
    Chain.expand,
    Chain.repeat,
]
