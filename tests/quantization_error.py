"""What quantizing units may cost: worst and expected errors, from the steps alone.

An independent, slow model of static int8: each QuantizeLinear of step s adds at most s/2 to every
element, s^2/12 to its square on average; operators pass errors on as mathematics has it. Nothing
here looks at the quantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from graphopt.ir import Node, Value
from graphopt.passes.quantize.units import Unit
from tests import graphs
from tests.quantized import BITS, Static, run, values_of

Array = NDArray[Any]
Error = tuple[Array, Array]  # at most, and its mean square; both by element


class Errors:
    """Errors of all values of a static model on one feed, by name."""

    def __init__(self, static: Static, feed: Mapping[str, Array]) -> None:
        self._tensors = static.tensors
        self.exact = values_of(static.before, feed)
        held = static.before.graph.initializer
        self._held = {tensor.name: numpy_helper.to_array(tensor) for tensor in held}
        for node in static.before.graph.node:
            if node.op_type == "Constant":
                self._held[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self._errors: dict[str, Error] = {}
        self._integers: set[str] = set()
        units = {unit.node.outputs[0].name: unit for unit in static.units}  # type: ignore[union-attr]
        inside = {
            value.name
            for unit in units.values()
            for node in unit.nodes
            for value in node.outputs
            if value is not None
        }
        for proto in static.before.graph.node:
            unit = units.get(proto.output[0])
            if unit is not None:
                self._unit(unit)
            elif proto.output[0] not in inside and proto.op_type != "Constant":
                self._float(proto)

    def constant(self, name: str) -> Array:
        """The numbers of a constant."""
        return self._held[name]

    def of(self, name: str) -> Error:
        zero = np.zeros(np.shape(self.exact[name]))
        return self._errors.get(name, (zero, zero))

    # -- quantization ----------------------------------------------------------------------------

    def _rounded(self, name: str, error: Error, step: float | None = None) -> Error:
        step = float(self._tensors[name].scale) if step is None else step
        return error[0] + step / 2, error[1] + step**2 / 12

    def _read(self, value: Value) -> Error:
        """Of an activation as an integer unit reads it."""
        error = self.of(value.name)
        return error if value.name in self._integers else self._rounded(value.name, error)

    def _give(self, value: Value, error: Error) -> None:
        self._errors[value.name] = error
        self._integers.add(value.name)

    def _rounded_constant(self, value: Value) -> tuple[Array, Error]:
        """An operand of a sum or product, quantized as a tensor."""
        x = self._held[value.name].astype(np.float64)
        step = (max(x.max(), 0.0) - min(x.min(), 0.0)) / 255
        zero = np.zeros(x.shape)
        return x, self._rounded("", (zero, zero), step)

    # -- operators -------------------------------------------------------------------------------

    def _float(self, proto: onnx.NodeProto) -> None:
        """Tanh, whose slope is at most one, and what cannot be anything but exact."""
        name = proto.input[0]
        if name in self._errors:
            assert proto.op_type in ("Tanh", "Relu"), proto.op_type
            self._errors[proto.output[0]] = self.of(name)

    def _unit(self, unit: Unit) -> None:
        kinds: dict[str, Callable[[Unit], Error]] = {
            "convolution": self._linear,
            "product": self._linear,
            "sum": self._sum,
            "gate": self._gate,
            "lookup": self._lookup,
            "hard-sigmoid": self._hard_sigmoid,
            "hard-swish": self._hard_swish,
            "mean": self._mean,
        }
        if unit.kind == "affine":
            self._affine(unit)
        elif unit.shares_range:
            self._moved(unit)
        elif unit.kind == "product":
            self._errors[unit.root] = self._linear(unit)
        else:
            self._give(unit.outputs[0], self._rounded(unit.root, kinds[unit.kind](unit)))

    def _linear(self, unit: Unit) -> Error:
        """Convolutions and products; weights by channel, biases in steps of the products."""
        node, x = unit.node, self._x(unit.inputs[0])
        assert unit.weights is not None
        weights = self._held[unit.weights.name].astype(np.float64)
        transposed = node.op == "Gemm" and _attribute(node, "transB", 0)
        channels = 1 if unit.kind == "product" and not transposed else 0
        others = tuple(axis for axis in range(weights.ndim) if axis != channels)
        steps = np.abs(weights).max(axis=others, keepdims=True) / (127 if BITS == 8 else 64)
        worst, power = self._read(unit.inputs[0])

        def multiply(a: Array, b: Array) -> Array:
            return _apply(node, a, np.broadcast_to(b, weights.shape))

        at_most = multiply(np.abs(x), steps / 2) + multiply(worst, np.abs(weights) + steps / 2)
        squares = multiply(x**2, steps**2 / 12) + multiply(power, weights**2 + steps**2 / 12)
        if unit.bias is not None:
            step = steps.reshape(-1) * float(self._tensors[unit.inputs[0].name].scale)
            if unit.kind == "convolution":
                step = step.reshape(-1, *[1] * (x.ndim - 2))
            at_most, squares = at_most + step / 2, squares + step**2 / 12
        return at_most, squares

    def _operands(self, unit: Unit) -> list[tuple[Array, Error]]:
        found = []
        for value in unit.node.inputs:
            assert value is not None
            if value.name in self._held:
                found.append(self._rounded_constant(value))
            else:
                found.append((self._x(value), self._read(value)))
        return found

    def _sum(self, unit: Unit) -> Error:
        (_, a), (_, b) = self._operands(unit)
        if unit.node.inputs[0] is unit.node.inputs[1]:
            return 2 * a[0], 4 * a[1]
        return a[0] + b[0], a[1] + b[1]

    def _gate(self, unit: Unit) -> Error:
        (x, a), (y, b) = self._operands(unit)
        at_most = np.abs(x) * b[0] + np.abs(y) * a[0] + a[0] * b[0]
        squares = x**2 * b[1] + y**2 * a[1] + a[1] * b[1]
        if unit.node.inputs[0] is unit.node.inputs[1]:
            squares = 4 * x**2 * a[1] + 3 * a[1] ** 2
        return at_most, squares

    def _lookup(self, unit: Unit) -> Error:
        slope = 0.25 if unit.node.op == "Sigmoid" else max(1.0, _attribute(unit.node, "alpha", 0))
        worst, power = self._read(unit.inputs[0])
        return slope * worst, slope**2 * power

    def _hard_sigmoid(self, unit: Unit) -> Error:
        """A slope, and the clip that only brings errors closer together; beta is rounded too."""
        alpha, beta = _attribute(unit.node, "alpha", 0.2), _attribute(unit.node, "beta", 0.5)
        worst, power = self._read(unit.inputs[0])
        return self._rounded("", (alpha * worst, alpha**2 * power), abs(beta) / 255)

    def _hard_swish(self, unit: Unit) -> Error:
        """x * clip(x / 6 + 1 / 2, 0, 1): nothing below -3 matters."""
        x = np.maximum(self._x(unit.inputs[0]), -3.0)
        worst, power = self._read(unit.inputs[0])
        gate = np.clip(x / 6 + 0.5, 0, 1)
        g = self._rounded("", self._rounded("", (worst / 6, power / 36), 0.5 / 255), 1 / 255)
        at_most = np.abs(x) * g[0] + gate * worst + g[0] * worst
        # Both errors come from the same rounding: they may add up.
        return at_most, 2 * (x**2 * g[1] + gate**2 * power)

    def _mean(self, unit: Unit) -> Error:
        worst, power = self._read(unit.inputs[0])
        axes = tuple(range(2, worst.ndim))
        count = np.prod([worst.shape[axis] for axis in axes])
        return worst.mean(axis=axes, keepdims=True), power.mean(axis=axes, keepdims=True) / count

    def _affine(self, unit: Unit) -> None:
        """Exact but for the shift, where that is less than a step."""
        worst, power = self._read(unit.inputs[0])
        source = self._tensors[unit.inputs[0].name]
        result = self._tensors[unit.root]
        moved = (int(source.zero_point) - int(result.zero_point)) * float(source.scale)
        off = abs(moved - unit.shift / unit.factor) * unit.factor
        self._give(unit.outputs[0], (unit.factor * worst + off, unit.factor**2 * power + off**2))

    def _moved(self, unit: Unit) -> None:
        """Errors move like elements. Parts of a Concat with scales of their own are rounded."""
        before: list[Error] = []
        for value in unit.inputs:
            error = self._read(value)
            if self._tensors[value.name] != self._tensors[unit.root]:
                error = self._rounded(unit.root, error)
            before.append(error)
        node = unit.node
        for slot, result in enumerate(node.outputs):
            assert result is not None
            parts = [
                _apply(node, *[error[part] for error in before], slot=slot, held=self._held)
                for part in (0, 1)
            ]
            self._give(result, (parts[0], parts[1]))

    def _x(self, value: Value) -> Array:
        return np.asarray(self.exact[value.name], np.float64)


def _apply(
    node: Node, *arrays: Array, slot: int = 0, held: Mapping[str, Array] | None = None
) -> Array:
    """The operator applied to other operands, by onnxruntime; what it reads besides is `held`."""
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.input[:]
    read = [value.name if value is not None else "" for value in node.inputs]
    names = [f"x{i}" for i in range(len(arrays))]
    proto.input.extend([*names, *(read[len(arrays) :] if held is not None else [])])
    feed = {name: np.asarray(a, np.float32) for name, a in zip(names, arrays, strict=True)}
    inputs = [graphs.value(name, a.shape) for name, a in feed.items()]
    outputs = [graphs.value(name, None) for name in proto.output]
    kept = {name: array for name, array in (held or {}).items() if name in proto.input}
    tensors = [numpy_helper.from_array(array, name) for name, array in kept.items()]
    model = graphs.model([proto], inputs, outputs, tensors, opset=_opset(node))
    return np.asarray(run(model, "off", feed)[proto.output[slot]], np.float64)


def _opset(node: Node) -> int:
    return 18 if node.attribute("num_outputs") is not None else 17


def _attribute(node: Node, name: str, usual: float) -> float:
    stated = node.attribute(name)
    return usual if stated is None else float(onnx.helper.get_attribute_value(stated))
