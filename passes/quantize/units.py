"""What can run on integers: operators, grouped as onnxruntime runs them as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.ir import Node, Value
from graphopt.targets import CLAMPED, CLAMPS, FLOAT_RESULT, OPSETS, ORT_CPU, Kind

Array = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Unit:
    """Operators that run as one integer kernel.

    `nodes` in order of computation: the operator itself, then a bias, then a clamp. `inputs` are
    the activations that it reads, in the order of its slots; `outputs` what others read of it. An
    affine unit gives `factor` * x + `shift`, which costs nothing: another scale and zero point.
    """

    kind: Kind
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: Value | None = None
    bias: Value | None = None
    clamp: tuple[float, float] = (-np.inf, np.inf)
    factor: float = 1.0
    shift: float = 0.0

    @property
    def node(self) -> Node:
        """The operator that names it."""
        return self.nodes[0]

    @property
    def root(self) -> str:
        """The name that decisions and reports call it by: its first result's."""
        return self.outputs[0].name

    @property
    def gives_floats(self) -> bool:
        """True where its result need not be quantized."""
        return self.kind in FLOAT_RESULT

    @property
    def shares_range(self) -> bool:
        """True where elements only move, so that one scale holds on both sides."""
        return self.kind in ("movement", "concatenation")


class Units:
    """All units of the main graph, in order of computation; bodies have none.

    Bodies are left alone because nothing inside them can be calibrated. Models of an opset
    that the target does not quantize (`OPSETS`) have no units.
    """

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._taken: set[Node] = set()
        self.all: list[Unit] = []
        is_known = edit.model.opsets.get("", 1) in OPSETS
        for node in edit.model.graph.nodes if is_known else ():
            if node not in self._taken and (unit := self._unit(node)) is not None:
                self.all.append(unit)
                self._taken.update(unit.nodes)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.all)

    def _unit(self, node: Node) -> Unit | None:
        kind = ORT_CPU.get(node.op) if not node.domain else None
        if kind is None:
            return None
        outputs = [value for value in node.outputs if value is not None]
        if not outputs or not all(self._is_float(value) for value in outputs):
            return None
        if kind == "convolution":
            return self._convolution(node)
        if kind == "product":
            return self._matmul(node) if node.op == "MatMul" else self._gemm(node)
        if kind in ("sum", "gate"):
            return self._binary(node, kind)
        if kind in ("movement", "concatenation"):
            return self._movement(node, kind)
        source = self._activation(node.inputs[0])
        if source is None:
            return None
        if kind == "affine":
            return self._affine(node, source, outputs)
        if kind == "hard-sigmoid" and not _rises(node):
            return None
        return Unit(kind, (node,), (source,), (outputs[0],))

    def _affine(self, node: Node, source: Value, outputs: Sequence[Value]) -> Unit | None:
        """A normalisation that does the same to all channels: another way to read integers."""
        found = [self._constant(value) for value in node.inputs[1:]]
        learns = len(outputs) > 1 or _number(node, "training_mode", 0)
        if learns or any(values is None or not values.size for values in found):
            return None
        gamma, beta, mean, variance = (np.asarray(each, np.float64) for each in found)
        spread = variance + _number(node, "epsilon", 1e-5)
        if spread.min() <= 0:
            return None
        scale = gamma / np.sqrt(spread)
        shift = beta - mean * scale
        if scale[0] <= 0:
            return None
        if np.ptp(scale) > 1e-6 * scale[0] or np.ptp(shift) > 1e-6 * (scale[0] + abs(shift[0])):
            return None
        factor, moved = float(scale[0]), float(shift[0])
        return Unit("affine", (node,), (source,), (outputs[0],), factor=factor, shift=moved)

    def _convolution(self, node: Node) -> Unit | None:
        source, weights = self._activation(node.inputs[0]), node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if source is None or self._constant(weights) is None:
            return None
        if bias is not None and self._constant(bias) is None:
            return None
        return self._clamped("convolution", (node,), (source,), weights, bias)

    def _matmul(self, node: Node) -> Unit | None:
        source, weights = self._activation(node.inputs[0]), node.inputs[1]
        matrix = self._constant(weights)
        if source is None or matrix is None or matrix.ndim != 2 or self._rank(source) < 2:
            return None
        nodes, bias = (node,), None
        if (adder := self._only_reader(node)) is not None and adder.op == "Add":
            product = node.outputs[0]
            other = adder.inputs[1] if adder.inputs[0] is product else adder.inputs[0]
            if self._is_bias(other, matrix.shape[1], self._rank(source)):
                nodes, bias = (node, adder), other  # type: ignore[assignment]
        return self._clamped("product", nodes, (source,), weights, bias)

    def _gemm(self, node: Node) -> Unit | None:
        source, weights = self._activation(node.inputs[0]), node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        plain = _number(node, "alpha", 1.0) == 1 and not _number(node, "transA", 0)
        plain = plain and (bias is None or _number(node, "beta", 1.0) == 1)
        matrix = self._constant(weights)
        if source is None or matrix is None or not plain:
            return None
        columns = matrix.shape[0 if _number(node, "transB", 0) else 1]
        if bias is not None and not self._is_bias(bias, columns, 2):
            return None
        return self._clamped("product", (node,), (source,), weights, bias)

    def _is_bias(self, value: Value | None, columns: int, rank: int) -> bool:
        """True for a constant that adds a number to each column, and no axis."""
        addend = self._constant(value)
        if addend is None or addend.ndim > rank:
            return False
        return addend.size in (1, columns) and addend.shape[-1:] in ((columns,), (1,), ())

    def _binary(self, node: Node, kind: Kind) -> Unit | None:
        inputs = tuple(value for value in node.inputs if self._constant(value) is None)
        sources = tuple(value for value in map(self._activation, inputs) if value is not None)
        if not sources or len(sources) != len(inputs):
            return None
        if len(sources) < len(node.inputs) and self._rank(sources[0]) < 1:
            return None
        return self._clamped(kind, (node,), sources, None, None)

    def _movement(self, node: Node, kind: Kind) -> Unit | None:
        """Elements move; what else the operator reads says how, and stays as it is."""
        given = [value for value in node.outputs if value is not None]
        if node.op == "Resize" and not _repeats(node):
            return None
        if node.op == "MaxPool" and len(given) > 1:
            return None
        if not all(v is not None and (v.consumers or v.is_output) for v in node.outputs):
            return None  # it runs on integers where all of its results are quantized, or none
        moved = node.inputs if kind == "concatenation" else node.inputs[:1]
        sources = tuple(value for value in map(self._activation, moved) if value is not None)
        if len(sources) != len(moved):
            return None
        return Unit(kind, (node,), sources, tuple(given))

    def _clamped(
        self,
        kind: Kind,
        nodes: tuple[Node, ...],
        inputs: tuple[Value, ...],
        weights: Value | None,
        bias: Value | None,
    ) -> Unit:
        """The unit, with a clamp that alone reads its result.

        Only clamps at zero: the range of u8 ends there exactly. A bound elsewhere may be midway
        between two integers (-1 is, of -1..1), and onnxruntime then keeps the clamp, and with it
        the operator, in floats.
        """
        clamp = (-np.inf, np.inf)
        reader = self._only_reader(nodes[-1])
        if kind in CLAMPED and reader is not None and reader.op in CLAMPS:
            bounds = self._bounds(reader)
            if bounds is not None and bounds[0] == 0 < bounds[1]:
                nodes, clamp = (*nodes, reader), bounds
        result = nodes[-1].outputs[0]
        assert result is not None
        return Unit(kind, nodes, inputs, (result,), weights, bias, clamp)

    def _bounds(self, node: Node) -> tuple[float, float] | None:
        if node.op == "Relu":
            return 0.0, np.inf
        found = []
        for slot, name, free in ((1, "min", -np.inf), (2, "max", np.inf)):
            stated = node.inputs[slot] if slot < len(node.inputs) else None
            if stated is None:
                found.append(_number(node, name, free))
                continue
            value = self._constant(stated)
            if value is None or value.size != 1:
                return None
            found.append(float(value.reshape(-1)[0]))
        return found[0], found[1]

    def _only_reader(self, node: Node) -> Node | None:
        """The node of the same graph that alone reads the only result, where that is no output."""
        value = node.outputs[0]
        if value is None or value.is_output or value in value.graph.pinned:
            return None
        if len(value.consumers) != 1:
            return None
        reader, count = next(iter(value.consumers.items()))
        untaken = reader not in self._taken and not reader.domain
        return reader if count == 1 and reader.graph is node.graph and untaken else None

    def _activation(self, value: Value | None) -> Value | None:
        if value is None or not self._is_float(value):
            return None
        return None if constant_of(value, self._edit.model.store) is not None else value

    def _is_float(self, value: Value) -> bool:
        known = self._edit.types[value]
        return known is not None and known.data_type == onnx.TensorProto.FLOAT

    def _rank(self, value: Value) -> int:
        known = self._edit.types[value]
        return -1 if known is None or known.rank is None else known.rank

    def _constant(self, value: Value | None) -> Array | None:
        """The numbers of a float32 constant, None where there is nothing to quantize."""
        weight = constant_of(value, self._edit.model.store)
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT or not weight.size:
            return None
        try:
            values = weight.values
        except ModelError:
            return None  # a weightless model has no numbers
        return values if np.isfinite(values).all() else None


def _rises(node: Node) -> bool:
    """True for a HardSigmoid whose slope can be a scale."""
    alpha, beta = _number(node, "alpha", 0.2), _number(node, "beta", 0.5)
    return 0 < alpha < np.inf and bool(np.isfinite(beta))


def _repeats(node: Node) -> bool:
    """True for a Resize whose every result is an element of its input."""
    crops = _text(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
    return _text(node, "mode", "nearest") == "nearest" and not crops


def _number(node: Node, name: str, default: float) -> float:
    stated = node.attribute(name)
    return default if stated is None else float(onnx.helper.get_attribute_value(stated))


def _text(node: Node, name: str, default: str) -> str:
    stated = node.attribute(name)
    return default if stated is None else str(stated.s.decode())
