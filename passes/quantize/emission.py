"""Q and DQ put where onnxruntime turns what is between them into integer kernels.

u8 activations by tensor, s8 weights by channel, int32 biases at the scale of the products, scalar
zero points written out, one QuantizeLinear a value and a DequantizeLinear for each reader: facts
that tests/test_targets.py checks against the graph as onnxruntime runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.kernels.affine import (
    Affine,
    Method,
    asymmetric,
    bias_affine,
    channel_affine,
    quantize,
    scale_for_bias,
)
from graphopt.passes.quantize.barriers import hold_back, keep_integer
from graphopt.passes.quantize.units import Unit
from graphopt.targets import CLAMPS

RULE: Final = "quantize-static"
_SIXTH: Final = 1 / 6

Array = NDArray[Any]


@dataclass(frozen=True)
class Options:
    """How weights are quantized: `bits` 7 for CPUs without VNNI; ranges by `method`."""

    bits: int = 8
    method: Method = "mse"


def weight_affine(unit: Unit, weights: Array, options: Options) -> Affine:
    """How the weights of a unit are quantized: symmetric, each output channel by itself."""
    axis = 0
    if unit.kind == "product":
        axis = 0 if _integer(unit.node, "transB") and unit.node.op == "Gemm" else 1
    return channel_affine(weights, axis, bits=options.bits, method=options.method)


class Emitter:
    """Quantizes units of one model. `affines` has the parameters of every value they read or give.

    `corrections` are added to biases: by the root of the unit, one number an output channel.
    `rounded` has the integers of weights, by root too, where they are not to be the nearest ones
    at the scales of `weight_affine`.
    """

    def __init__(
        self,
        edit: Editor,
        affines: Mapping[str, Affine],
        options: Options,
        corrections: Mapping[str, Array] | None = None,
        rounded: Mapping[str, Array] | None = None,
    ) -> None:
        self._edit = edit
        self._affines = affines
        self._options = options
        self._corrections = corrections or {}
        self._rounded = rounded or {}
        self._quantized: dict[Value, Value] = {}  # value -> its integers
        self._given: frozenset[Value] = frozenset()  # what integer kernels give
        self._sources: dict[Value, Value] = {}  # result of an affine unit -> what it reads
        self._constants: dict[tuple[str, bytes], Value] = {}

    def emit(self, units: Sequence[Unit]) -> None:
        """Quantize these units; of those that must not be changed, nothing is changed."""
        chosen = [unit for unit in units if self._edit.allows(RULE, unit.root)]
        before = {unit: "\n".join(node.text() for node in unit.nodes) for unit in chosen}
        readers: dict[Value, list[tuple[Node, int, float]]] = {}
        for unit in chosen:
            for value, node, slot, factor in self._restated(unit):
                readers.setdefault(value, []).append((node, slot, factor))
        given = [v for unit in chosen if not unit.gives_floats for v in unit.outputs]
        self._given = frozenset(given)
        for value in dict.fromkeys([*readers, *given]):
            self._connect(value, readers.get(value, []))
        for value, q in self._quantized.items():
            if value not in self._given and q.producer is not None:
                hold_back(self._edit, q.producer, RULE)
        self._edit.forget_types()
        for unit in chosen:
            if unit.gives_floats:
                self._keep_integer(unit)
        for unit in chosen:
            made = [v.producer for v in unit.outputs if v.producer is not None]
            self._edit.record(RULE, unit.root, before[unit], "\n".join(n.text() for n in made))
        self._edit.forget_types()

    def _keep_integer(self, unit: Unit) -> None:
        """See to clamps behind a product, whether they are part of it or not."""
        if unit.nodes[-1].op in CLAMPS:
            keep_integer(self._edit, unit.nodes[-1], True, RULE)
            return
        for node in list(unit.outputs[0].consumers):
            if node.op in CLAMPS and not node.domain:
                keep_integer(self._edit, node, False, RULE)

    # -- activations -----------------------------------------------------------------------------

    def _connect(self, value: Value, readers: Sequence[tuple[Node, int, float]]) -> None:
        """Let integer readers read the value through Q and DQ; all others too, where it is one."""
        edit, is_integer = self._edit, value in self._given
        is_output = is_integer and value.is_output
        q, affine = self._integers(value), self._affines[value.name]
        own = {(node, slot) for node, slot, _ in readers}
        others = [
            (node, slot)
            for node in list(value.consumers)
            for slot, read in enumerate(node.inputs)
            if read is value and (node, slot) not in own and node is not q.producer
        ]
        if is_output:
            self._dequantize(q, affine, value.name, _position(value), result=value)
        elif is_integer and others:
            shared = self._dequantize(q, affine, value.name, _position(value))
            for node, slot in others:
                edit.set_input(node, slot, shared)
        for node, slot, factor in readers:
            read = self._dequantize(q, affine, value.name, _position(value), factor)
            edit.set_input(node, slot, read)
        if value in self._sources and not is_output:
            edit.remove_value(value)

    def _integers(self, value: Value) -> Value:
        """The value quantized, once; where it is an output, another name is computed instead."""
        if value in self._sources:
            return self._integers(self._sources[value])
        if value not in self._quantized:
            source, edit = value, self._edit
            if value.is_output and value in self._given:
                source = edit.add_value(value.graph, edit.unique(f"{value.name}/exact"))
                edit.move_output(value, source)
            affine, position = self._affines[value.name], _position(source)
            self._quantized[value] = self._quantize(source, affine, value.name, position)
        return self._quantized[value]

    def _quantize(self, value: Value, affine: Affine, name: str, position: float) -> Value:
        return self._call(
            "QuantizeLinear",
            [value, *self._parameters(affine, name)],
            f"{name}/quantized",
            position,
        )

    def _dequantize(
        self,
        q: Value,
        affine: Affine,
        name: str,
        position: float,
        factor: float = 1.0,
        result: Value | None = None,
    ) -> Value:
        """DequantizeLinear; a `factor` on its scale multiplies by it for nothing."""
        if factor != 1:
            scale = np.asarray(affine.scale * factor, np.float32)
            affine = Affine(scale, affine.zero_point, affine.dtype)
        inputs = [q, *self._parameters(affine, name)]
        return self._call("DequantizeLinear", inputs, f"{name}/dequantized", position, result)

    def _parameters(self, affine: Affine, name: str) -> list[Value]:
        return [
            self._constant(affine.scale, f"{name}/scale"),
            self._constant(affine.zero_point, f"{name}/zero_point"),
        ]

    # -- units -------------------------------------------------------------------------------------

    def _restated(self, unit: Unit) -> list[tuple[Value, Node, int, float]]:
        """The unit in the form that fuses; who reads which activation, times which factor."""
        node = unit.node
        if unit.weights is not None:
            node = self._weighted(unit)
            return [(unit.inputs[0], node, 0, 1.0)]
        if unit.kind == "affine":
            self._edit.detach_node(node)
            self._sources[unit.outputs[0]] = unit.inputs[0]
            return []
        if unit.kind == "hard-swish":
            return self._hard_swish(unit)
        if unit.kind == "hard-sigmoid":
            return self._hard_sigmoid(unit)
        if unit.kind in ("sum", "gate"):
            for slot, value in enumerate(node.inputs):
                weight = constant_of(value, self._edit.model.store)
                if weight is not None and value is not None:
                    self._edit.set_input(node, slot, self._addend(value.name, weight.values, node))
        moved = node.inputs[:1] if unit.kind == "movement" else node.inputs
        slots = [(v, i) for i, v in enumerate(moved) if v in unit.inputs]
        return [(value, node, slot, 1.0) for value, slot in slots if value is not None]

    def _weighted(self, unit: Unit) -> Node:
        """A convolution or product with its weights, and its bias, as integers."""
        edit, node = self._edit, unit.node
        weights, bias = self._values(unit.weights), self._values(unit.bias)
        correction = self._corrections.get(unit.root)
        if correction is not None:
            bias = correction if bias is None else bias.reshape(-1) + correction
        affine = weight_affine(unit, weights, self._options)
        integers = self._rounded.get(unit.root)
        step = float(self._affines[unit.inputs[0].name].scale)
        if bias is not None:
            bias = np.broadcast_to(bias.reshape(-1), affine.scale.shape).astype(np.float64)
            scale = scale_for_bias(bias, step, affine.scale)
            if not np.array_equal(scale, affine.scale):
                integers = None  # they were rounded at other scales
            affine = Affine(scale, affine.zero_point, affine.dtype, affine.axis, affine.levels)
        if integers is None:
            integers = quantize(weights, affine)
        assert unit.weights is not None
        edit.set_input(node, 1, self._stored(unit.weights.name, integers, affine, node))
        if bias is None:
            return node
        along, _ = bias_affine(bias, step, affine.scale)
        name = unit.bias.name if unit.bias is not None else f"{unit.root}/bias"
        stored = self._stored(f"{name}/{unit.root}", quantize(bias, along), along, node)
        if unit.bias is not None:
            adder = unit.nodes[1] if node.op == "MatMul" else node
            edit.set_input(adder, adder.inputs.index(unit.bias), stored)
        elif node.op == "MatMul":
            self._add_behind(node, stored)
        else:
            return self._with_bias(node, stored)
        return node

    def _add_behind(self, node: Node, bias: Value) -> None:
        """The same product, its bias added under its name."""
        result = node.outputs[0]
        assert result is not None
        product = self._edit.add_value(node.graph, self._edit.unique(f"{result.name}/product"))
        self._edit.move_output(result, product)
        self._call("Add", [product, bias], result.name, node.position, result)

    def _with_bias(self, node: Node, bias: Value) -> Node:
        """The same operator with a third input."""
        edit, proto = self._edit, onnx.NodeProto()
        proto.CopyFrom(node.proto)
        source, weights = node.inputs[:2]
        result = node.outputs[0]
        assert source is not None
        assert weights is not None
        assert result is not None
        proto.input[:] = [source.name, weights.name, bias.name]
        proto.output[:] = [result.name]
        edit.detach_node(node)
        known = {value.name: value for value in (source, weights, bias)}
        results = {result.name: result}
        return edit.add_node(node.graph, proto, known, results, node.position, RULE)

    def _hard_swish(self, unit: Unit) -> list[tuple[Value, Node, int, float]]:
        """x * clip(x/6 + 1/2, 0, 1): the range of the gate's QuantizeLinear is the clip."""
        (result,), node = unit.outputs, unit.node
        self._edit.detach_node(node)
        name, position = result.name, node.position
        source = unit.inputs[0]
        half = self._addend(f"{name}/half", np.float32(0.5), node)
        gate = self._call("Add", [source, half], f"{name}/gate", position)
        unit_range = asymmetric(0.0, 1.0)
        q = self._quantize(gate, unit_range, f"{name}/gate", position)
        read = self._dequantize(q, unit_range, f"{name}/gate", position)
        self._call("Mul", [source, read], name, position, result)
        assert gate.producer is not None
        assert result.producer is not None
        return [(source, gate.producer, 0, _SIXTH), (source, result.producer, 0, 1.0)]

    def _hard_sigmoid(self, unit: Unit) -> list[tuple[Value, Node, int, float]]:
        """clip(a*x + b, 0, 1) as a sum: the range of its QuantizeLinear is the clip."""
        (result,), node = unit.outputs, unit.node
        alpha, beta = _float(node, "alpha", 0.2), _float(node, "beta", 0.5)
        self._edit.detach_node(node)
        shift = self._addend(f"{result.name}/beta", np.float32(beta), node)
        self._call("Add", [unit.inputs[0], shift], result.name, node.position, result)
        assert result.producer is not None
        return [(unit.inputs[0], result.producer, 0, alpha)]

    # -- constants ---------------------------------------------------------------------------------

    def _values(self, value: Value | None) -> Any:
        weight = constant_of(value, self._edit.model.store)
        return None if weight is None else weight.values

    def _addend(self, name: str, values: Array | np.float32, node: Node) -> Value:
        """A constant operand of a sum or product, as u8 like the activations beside it."""
        array = np.asarray(values, np.float32)
        affine = asymmetric(float(array.min()), float(array.max()))
        return self._stored(name, quantize(array, affine), affine, node)

    def _stored(self, name: str, q: Array, affine: Affine, node: Node) -> Value:
        """A constant that is kept as integers and dequantized where it is read."""
        inputs = [self._constant(q, f"{name}/integers"), *self._parameters(affine, name)]
        axis: dict[str, Any] = {} if affine.axis is None else {"axis": affine.axis}
        return self._call("DequantizeLinear", inputs, f"{name}/dequantized", node.position, **axis)

    def _constant(self, array: Array, name: str) -> Value:
        """A constant; one for all that is equal and would have the same name."""
        key = (name, array.dtype.str.encode() + np.ascontiguousarray(array).tobytes())
        if key not in self._constants:
            graph, unique = self._edit.model.graph, self._edit.unique(name)
            tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape))
            tensor.name = unique
            self._constants[key] = self._edit.add_constant(graph, unique, tensor, -1.0)
        return self._constants[key]

    def _call(
        self,
        op: str,
        inputs: Sequence[Value],
        name: str,
        position: float,
        result: Value | None = None,
        **attributes: Any,
    ) -> Value:
        """A new node of one output, named `name` or computing `result`."""
        edit, graph = self._edit, self._edit.model.graph
        output = result.name if result is not None else edit.unique(name)
        proto = onnx.helper.make_node(
            op,
            [value.name for value in inputs],
            [output],
            edit.unique(f"{output}/{op}"),
            **attributes,
        )
        known = {value.name: value for value in inputs}
        results = {output: result} if result is not None else {}
        edit.add_node(graph, proto, known, results, position, RULE)
        return known[output]


def _position(value: Value) -> float:
    return value.producer.position if value.producer is not None else -1.0


def _integer(node: Node, name: str) -> int:
    stated = node.attribute(name)
    return 0 if stated is None else int(stated.i)


def _float(node: Node, name: str, default: float) -> float:
    stated = node.attribute(name)
    return default if stated is None else float(stated.f)
