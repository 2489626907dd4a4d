"""What rounding does on average taken back in biases, and weights rounded for their inputs.

Both are local: every unit is judged on what it reads in floats, so that errors from before it are
neither learnt nor corrected twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.kernels.affine import Affine, dequantize, quantize
from graphopt.kernels.rounding import gptq
from graphopt.passes.linear import convolution_patches
from graphopt.passes.quantize.emission import Options, weight_affine
from graphopt.passes.quantize.units import Unit
from graphopt.runtime import Feed
from graphopt.statistics import Observer, Statistics, sweep

RULE: Final = "round-beside"

Array = NDArray[Any]


def bias_corrections(
    edit: Editor,
    units: Collection[Unit],
    affines: Mapping[str, Affine],
    feeds: Iterable[Feed],
    options: Options | None = None,
    *,
    rounded: Mapping[str, Array] | None = None,
    threads: int = 0,
) -> dict[str, Array]:
    """What to add to the biases of units with weights, by root: float64 [output channels].

    It is the mean, over all positions of `feeds`, of a unit's exact result minus that with its
    input rounded (and clipped) by `affines` and its weights by `options`, or to the integers
    `rounded`: bias correction (Nagel et al., arXiv:1906.04721, section 4.2), measured, so that
    padding and clipping count as they are. One sweep over the model with every unit a second time
    beside itself; nothing of that stays. Left out are MatMuls without a bias, which one would cost
    time, and units whose results are not all finite.
    """
    rounded = rounded or {}
    pairs: dict[str, tuple[str, str, int]] = {}
    with edit.supposing():
        beside = _Beside(edit, affines, options or Options(), rounded)
        for unit in units:
            if unit.weights is None or (unit.node.op == "MatMul" and unit.bias is None):
                continue
            exact, other = unit.node.outputs[0], beside.add(unit)
            axis = 1 if unit.kind == "convolution" else -1
            assert exact is not None
            pairs[unit.root] = exact.name, other.name, axis
        if not pairs:
            return {}
        edit.settle()
        wanted = {
            Observer(name, "moments", axis) for *both, axis in pairs.values() for name in both
        }
        seen = sweep(edit.model, feeds, wanted, threads=threads)
    corrections = {}
    for root, (exact_name, other_name, axis) in pairs.items():
        both = exact_name, other_name
        finite = not seen.nonfinite.keys() & set(both)
        if finite and all(Observer(name, "moments", axis) in seen for name in both):
            mean, moved = (seen.moments(name, axis).mean for name in both)
            corrections[root] = mean - moved
    return corrections


class _Beside:
    """Units a second time, reading rounded activations and weights, in floats."""

    def __init__(
        self,
        edit: Editor,
        affines: Mapping[str, Affine],
        options: Options,
        rounded: Mapping[str, Array],
    ) -> None:
        self._edit = edit
        self._affines = affines
        self._options = options
        self._rounded = rounded
        self._inputs: dict[Value, Value] = {}

    def add(self, unit: Unit) -> Value:
        """The first result of the unit's operator, as rounding would have it."""
        node, (source,) = unit.node, unit.inputs
        if source not in self._inputs:
            self._inputs[source] = self._activation(source, node)
        assert unit.weights is not None
        weights = _numbers(self._edit, unit.weights)
        affine = weight_affine(unit, weights, self._options)
        integers = self._rounded.get(unit.root)
        if integers is None:
            integers = quantize(weights, affine)
        read = [
            self._inputs[source],
            self._constant(f"{unit.root}/weights", dequantize(integers, affine)),
            *(value for value in node.inputs[2:] if value is not None),
        ]
        return self._call(node.op, read, f"{unit.root}/rounded", node, list(node.proto.attribute))

    def _activation(self, source: Value, node: Node) -> Value:
        affine, name = self._affines[source.name], source.name
        parameters = [
            self._constant(f"{name}/scale", affine.scale),
            self._constant(f"{name}/zero_point", affine.zero_point),
        ]
        q = self._call("QuantizeLinear", [source, *parameters], f"{name}/integers", node)
        return self._call("DequantizeLinear", [q, *parameters], f"{name}/rounded", node)

    def _constant(self, name: str, array: Array) -> Value:
        tensor = onnx.numpy_helper.from_array(np.asarray(array), self._edit.unique(name))
        return self._edit.add_constant(self._edit.model.graph, tensor.name, tensor, -1.0)

    def _call(
        self,
        op: str,
        inputs: list[Value],
        name: str,
        place: Node,
        stated: Iterable[onnx.AttributeProto] = (),
    ) -> Value:
        edit, output = self._edit, self._edit.unique(name)
        read = [value.name for value in inputs]
        proto = onnx.helper.make_node(op, read, [output], edit.unique(f"{output}/{op}"))
        proto.attribute.extend(stated)
        known = {value.name: value for value in inputs}
        edit.add_node(place.graph, proto, known, {}, place.position, RULE)
        return known[output]


def gram_observer(edit: Editor, unit: Unit) -> Observer | None:
    """What `rounded_weights` has to know; None for a unit without weights, or whose padding is
    settled only where it runs.

    A convolution's Gram matrix has (C / group * kernel)^2 numbers a group.
    """
    if unit.weights is None:
        return None
    name = unit.inputs[0].name
    if unit.kind == "product":
        return Observer(name, "gram", -1)
    patches = convolution_patches(unit.node, _numbers(edit, unit.weights).shape[2:])
    if patches is None:
        return None
    return Observer(name, "gram", patches=patches)


def rounded_weights(edit: Editor, unit: Unit, affine: Affine, statistics: Statistics) -> Array:
    """Integers of a unit's weights, in their shape, by GPTQ with the Gram matrices of its inputs.

    `affine` is that of `weight_affine`. Raises LookupError where calibration did not see the
    unit's `gram_observer`.
    """
    observer = gram_observer(edit, unit)
    if observer is None or unit.weights is None:
        raise LookupError(f"no Gram matrix can be had for {unit.root!r}")
    weights = _numbers(edit, unit.weights)
    rows = observer.patches if observer.patches is not None else -1
    grams = [gram.matrix[:-1, :-1] for gram in statistics.grams(observer.value, rows)]
    turned = affine.axis == 1
    matrix = weights.T if turned else weights.reshape(len(weights), -1)
    per = len(matrix) // len(grams)
    parts = []
    for at, gram in enumerate(grams):
        part = slice(at * per, (at + 1) * per)
        scales = Affine(affine.scale[part], affine.zero_point[part], affine.dtype, 0, affine.levels)
        parts.append(gptq(matrix[part], gram, scales))
    q = np.concatenate(parts)
    return np.ascontiguousarray(q.T if turned else q.reshape(weights.shape))


def _numbers(edit: Editor, value: Value) -> Array:
    weight = constant_of(value, edit.model.store)
    assert weight is not None
    return np.asarray(weight.values)
