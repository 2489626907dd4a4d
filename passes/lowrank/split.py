"""A layer of the graph replaced by the parts of a split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Value
from graphopt.passes.linear import Layer
from graphopt.passes.lowrank.forms import FORMS, Split

Array = NDArray[Any]
RULE: Final = "split-layer"
_FREE_GEMM: Final = 11  # the version of the standard operators whose Gemm needs no bias
BETWEEN: Final = "/low-rank"  # behind the name of what a layer gives: what its parts hand on


class _Part(NamedTuple):
    """One node: its operator, its weights as that stores them, and what it states."""

    op: str
    weights: Array
    stated: Mapping[str, Any]


def split_layers(edit: Editor, layers: Sequence[Layer], split: Split) -> bool:
    """Let several smaller nodes compute what layers of one weight give, each with its own bias.

    What a layer gives keeps its name: it is the same up to what the split loses. False, and nothing
    done, where the change is denied, which is one for all of them and stands on the first. Raises
    ValueError for factors of another layer.
    """
    first = layers[0]
    _check(first, split)
    if not edit.allows(RULE, first.root):
        return False
    parts = _parts(first, split, edit.model.opsets[""])
    factors = []
    for part in parts:
        name = edit.unique(f"{first.root}/factor")
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(part.weights), name)
        factors.append(edit.add_constant(first.node.graph, name, tensor, -1.0))
    for layer in layers:
        _replace(edit, layer, parts, factors)
        _tidy(edit, layer)
    times = f"{len(layers)} x " if len(layers) > 1 else ""
    said = f"{times}{first.node.op} {first.shape}"
    edit.record(RULE, first.root, said, f"{split.method} {split.ranks}")
    return True


def _check(layer: Layer, split: Split) -> None:
    """Raise ValueError for factors of another layer, or of none."""
    form = FORMS[split.method]
    if not form.fits(layer):
        raise ValueError(f"{layer.root}: {layer.node.op} takes no form {split.method!r}")
    shapes = [factor.shape for factor in split.factors]
    ranks = [shape[0] if shape else 0 for shape in shapes[:-1]]
    is_whole = len(shapes) == form.parts and min(ranks) > 0
    if not is_whole or shapes != form.shaped(layer, ranks):
        raise ValueError(
            f"{layer.root}: factors of {shapes} are not {split.method!r} of {layer.weight.shape}"
        )
    if any(factor.dtype != np.float32 for factor in split.factors):
        raise ValueError(f"{layer.root}: factors have to be float32")


def by_weights(layers: Iterable[Layer]) -> list[tuple[Layer, ...]]:
    """Layers that read one weight in one way, which can be split alike, in order of the first."""
    found: dict[Value, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.weights, []).append(layer)
    return [tuple(each) for each in found.values() if len({_way(layer) for layer in each}) == 1]


def _way(layer: Layer) -> Any:
    return layer.node.op, layer.is_turned, layer.patches


def parts_of(root: str) -> list[str]:
    """What the parts of a split layer give, as they are called where no name was taken before."""
    between = f"{root}{BETWEEN}"
    return [root, between, f"{between}_2"]


def _replace(edit: Editor, layer: Layer, parts: Sequence[_Part], factors: Sequence[Value]) -> None:
    """Nodes with these factors in the place of a layer's own."""
    node = layer.node
    edit.detach_node(node)
    source: Value = layer.source
    for number, (part, factor) in enumerate(zip(parts, factors, strict=True)):
        is_last = number + 1 == len(parts)
        name = layer.root if is_last else edit.unique(f"{layer.root}{BETWEEN}")
        inputs = [source, factor]
        if is_last:
            inputs += [value for value in node.inputs[2:] if value is not None]
        known = {value.name: value for value in inputs}
        proto = onnx.helper.make_node(
            part.op, [v.name for v in inputs], [name], name=name, **part.stated
        )
        results = {layer.root: layer.result} if is_last else {}
        made = edit.add_node(node.graph, proto, known, results, node.position, RULE)
        (output,) = made.outputs
        assert output is not None
        source = output


def _tidy(edit: Editor, layer: Layer) -> None:
    """Weights that nobody reads any more go, with a Transpose of theirs."""
    before, weights = layer.node.inputs[1], layer.weights
    assert before is not None
    if before is not weights and before.producer is not None and not before.consumers:
        if before.is_output:
            return
        edit.remove_node(before.producer)
    if not weights.consumers and not weights.is_output:
        if weights.is_input:  # as all weights are before IR 4
            edit.freeze_input(weights)
        edit.remove_value(weights)


def _parts(layer: Layer, split: Split, opset: int) -> Sequence[_Part]:
    if layer.patches is None:
        return _products(layer, split, opset)
    return _convolutions(layer, split)


def _products(layer: Layer, split: Split, opset: int) -> list[_Part]:
    """Two of the operator that the layer is; a Gemm has a bias in old versions, MatMul does not."""
    first, last = split.factors
    if layer.node.op == "MatMul":
        return [_Part("MatMul", first.T, {}), _Part("MatMul", last.T, {})]
    whole = _Part("Gemm", last, {"transB": 1})
    if opset < _FREE_GEMM:
        return [_Part("MatMul", first.T, {}), whole]
    return [_Part("Gemm", first, {"transB": 1}), whole]


def _convolutions(layer: Layer, split: Split) -> list[_Part]:
    whole = _stated(layer)
    axes = len(whole["kernel_shape"])

    def conv(factor: Array, stated: Mapping[str, Any]) -> _Part:
        return _Part("Conv", factor, stated)

    def point(factor: Array) -> _Part:
        return conv(factor.reshape(*factor.shape, *[1] * axes), {"kernel_shape": [1] * axes})

    if split.method in ("svd", "channel"):
        first, last = split.factors
        return [conv(first, whole), point(last)]
    if split.method == "spatial":
        column, row = split.factors
        return [
            conv(column[:, :, :, None], _along(whole, 0)),
            conv(row[:, :, None, :], _along(whole, 1)),
        ]
    first, middle, last = split.factors
    if split.method == "tucker":
        return [point(first), conv(middle, whole), point(last)]
    return [point(first), conv(middle[:, None], whole | {"group": len(middle)}), point(last)]


def _stated(layer: Layer) -> dict[str, Any]:
    """What a convolution states, in full."""
    assert layer.patches is not None
    patches = layer.patches
    axes = len(patches.kernel)
    return {
        "kernel_shape": list(patches.kernel),
        "strides": list(patches.strides or [1] * axes),
        "pads": list(patches.pads or [0] * (2 * axes)),
        "dilations": list(patches.dilations or [1] * axes),
    }


def _along(whole: Mapping[str, Any], axis: int) -> dict[str, Any]:
    """The part of a convolution along one of its two axes: nothing happens along the other."""
    other = 1 - axis
    found = {name: list(numbers) for name, numbers in whole.items()}
    for name in ("kernel_shape", "strides", "dilations"):
        found[name][other] = 1
    found["pads"][other] = found["pads"][2 + other] = 0
    return found
