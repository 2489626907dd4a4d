"""Operators that onnx's version converter gets wrong, or gives up on, and what to do instead.

An adapter takes a node as it is written for one opset and gives the nodes for the opset beside it.
Sources: the changelog of the ONNX operators (https://onnx.ai/onnx/operators/) and, for what
Resize 10 and Upsample leave open, onnxruntime's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx

from graphopt.proofs import TensorType


class NoAdapterError(Exception):
    """The node cannot be written for the other opset; the message says why."""


@dataclass(frozen=True)
class Site:
    """A node with what is proven of its inputs, by name; `fresh` gives names for new values."""

    node: onnx.NodeProto
    types: Mapping[str, TensorType]
    data: Mapping[str, onnx.TensorProto]
    fresh: Callable[[str], str]

    def copy(self, *without: str, **attributes: Any) -> onnx.NodeProto:
        """The node without some attributes, and with others added or replaced."""
        node = onnx.NodeProto()
        node.CopyFrom(self.node)
        kept = [a for a in self.node.attribute if a.name not in {*without, *attributes}]
        node.ClearField("attribute")
        node.attribute.extend(kept)
        node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attributes.items())
        return node

    def constant(self, values: Any) -> onnx.NodeProto:
        """A Constant node of these values."""
        tensor = onnx.numpy_helper.from_array(np.asarray(values))
        return onnx.helper.make_node("Constant", [], [self.fresh("constant")], value=tensor)

    def attribute(self, name: str, default: Any) -> Any:
        """The value of an attribute, bytes as text."""
        found = next((a for a in self.node.attribute if a.name == name), None)
        value = default if found is None else onnx.helper.get_attribute_value(found)
        return value.decode() if isinstance(value, bytes) else value

    def size(self, slot: int, axis: int) -> int:
        """A size of an input. Raises NoAdapterError where it is not proven."""
        known = self.types.get(self.node.input[slot])
        if known is not None and known.shape is not None and -len(known.shape) <= axis:
            size = known.shape[axis] if axis < len(known.shape) else None
            if isinstance(size, int):
                return size
        raise NoAdapterError(f"the size of axis {axis} of {self.node.input[slot]!r} is not known")


Adapter = Callable[[Site], Sequence[onnx.NodeProto]]


def _resize_11(site: Site) -> Sequence[onnx.NodeProto]:
    """Until 10 a position was the index divided by the scale; what 11 assumes is another."""
    region = site.constant(np.zeros(0, np.float32))
    stated: dict[str, Any] = {"coordinate_transformation_mode": "asymmetric"}
    if site.attribute("mode", "nearest") == "nearest":
        stated["nearest_mode"] = "floor"
        scales = site.data.get(site.node.input[1])
        if scales is None or (onnx.numpy_helper.to_array(scales) < 1).any():
            raise NoAdapterError("'nearest' was never defined for scales below 1")
    node = site.copy(**stated)
    node.input[:] = [site.node.input[0], region.output[0], site.node.input[1]]
    return [region, node]


def _upsample_10(site: Site) -> Sequence[onnx.NodeProto]:
    node = site.copy()
    node.op_type = "Resize"
    return [node]


def _roi_align_16(site: Site) -> Sequence[onnx.NodeProto]:
    return [site.copy(coordinate_transformation_mode="output_half_pixel")]


def _dropout_10(site: Site) -> Sequence[onnx.NodeProto]:
    if len(site.node.output) > 1 and site.node.output[1]:
        raise NoAdapterError("its mask became boolean")
    return [site.copy()]


def _group_normalization_21(site: Site) -> Sequence[onnx.NodeProto]:
    """Scale and bias are of one element a channel, no longer of one a group."""
    groups = site.attribute("num_groups", 0)
    repeats = site.size(0, 1) // max(groups, 1)
    column, row = site.constant(np.array([groups, 1])), site.constant(np.array([-1]))
    spread = site.constant(np.array([groups, repeats]))
    nodes, node = [column, row, spread], site.copy()
    for slot in (1, 2):
        inner, wide, flat = (site.fresh("parameter") for _ in range(3))
        make = onnx.helper.make_node
        nodes.append(make("Reshape", [site.node.input[slot], column.output[0]], [inner]))
        nodes.append(make("Expand", [inner, spread.output[0]], [wide]))
        nodes.append(make("Reshape", [wide, row.output[0]], [flat]))
        node.input[slot] = flat
    return [*nodes, node]


def _split_17(site: Site) -> Sequence[onnx.NodeProto]:
    """Sizes stated one by one: before 18 there were only equal ones by default."""
    if len(site.node.input) > 1 and site.node.input[1]:
        return [site.copy("num_outputs")]
    axis, parts = site.attribute("axis", 0), len(site.node.output)
    size = site.size(0, axis)
    chunk = -(-size // parts)
    sizes = site.constant(np.array([chunk] * (parts - 1) + [size - chunk * (parts - 1)]))
    node = site.copy("num_outputs")
    node.input[:] = [site.node.input[0], sizes.output[0]]
    return [sizes, node]


def _gelu_19(site: Site) -> Sequence[onnx.NodeProto]:
    """Gelu(x) = x (1 + erf(x / sqrt 2)) / 2, as the operator's definition has it."""
    if site.attribute("approximate", "none") != "none":
        raise NoAdapterError("the approximation by tanh has no operator before 20")
    known = site.types.get(site.node.input[0])
    if known is None:
        raise NoAdapterError("its element type is not known")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(known.data_type)
    root, one, half = (site.constant(np.array(v, dtype)) for v in (np.sqrt(2.0), 1.0, 0.5))
    names = [site.fresh(name) for name in ("scaled", "erf", "shifted", "product")]
    x, make = site.node.input[0], onnx.helper.make_node
    return [
        *(root, one, half),
        make("Div", [x, root.output[0]], [names[0]]),
        make("Erf", [names[0]], [names[1]]),
        make("Add", [names[1], one.output[0]], [names[2]]),
        make("Mul", [x, names[2]], [names[3]]),
        make("Mul", [names[3], half.output[0]], [site.node.output[0]]),
    ]


def _reduce_axes(site: Site) -> Sequence[onnx.NodeProto]:
    """The axes as an attribute, which they were before they became an input."""
    keeps = site.attribute("noop_with_empty_axes", 0)
    node = site.copy("noop_with_empty_axes")
    stated = [name for name in site.node.input[1:] if name]
    del node.input[1:]
    if stated:
        if stated[0] not in site.data:
            raise NoAdapterError(f"its axes {stated[0]!r} are not constant")
        axes = onnx.numpy_helper.to_array(site.data[stated[0]]).reshape(-1).tolist()
        if axes:
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
            return [node]
    if keeps:
        return [onnx.helper.make_node("Identity", node.input, node.output)]
    return [node]


def _softmax_12(site: Site) -> Sequence[onnx.NodeProto]:
    """Until 12 all axes from `axis` on were one: for an inner axis it is moved to the end."""
    known = site.types.get(site.node.input[0])
    axis = site.attribute("axis", -1)
    if axis == -1 or (known is not None and axis == (known.rank or 0) - 1):
        return [site.copy(axis=axis)]
    if known is None or known.rank is None:
        raise NoAdapterError("the rank of its input is not known")
    order = list(range(known.rank))
    order[axis], order[-1] = order[-1], order[axis]
    moved, result = site.fresh("moved"), site.fresh("result")
    node = site.copy(axis=known.rank - 1)
    node.input[0], node.output[0] = moved, result
    return [
        onnx.helper.make_node("Transpose", site.node.input, [moved], perm=order),
        node,
        onnx.helper.make_node("Transpose", [result], site.node.output, perm=order),
    ]


def _resize_12(site: Site) -> Sequence[onnx.NodeProto]:
    """Region and scales had to be given, if only as empty tensors."""
    node, added = site.copy(), []
    for slot in (1, 2):
        if slot >= len(node.input):
            node.input.append("")
        if not node.input[slot]:
            added.append(site.constant(np.zeros(0, np.float32)))
            node.input[slot] = added[-1].output[0]
    return [*added, node]


def _grid_sample_19(site: Site) -> Sequence[onnx.NodeProto]:
    """Modes had names that are only right for images."""
    known = site.types.get(site.node.input[0])
    if known is None or known.rank != 4:
        raise NoAdapterError("there were only images, of rank 4")
    mode = site.attribute("mode", "linear")
    return [site.copy(mode={"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode))]


def _mod_27(site: Site) -> Sequence[onnx.NodeProto]:
    """The remainder with the sign of the divisor was defined for integers alone."""
    known = site.types.get(site.node.input[0])
    is_integer = known is not None and known.data_type in _INTEGERS
    if not is_integer and not site.attribute("fmod", 0):
        raise NoAdapterError("a remainder of real numbers had the sign of the dividend")
    return [site.copy()]


_INTEGERS: Final = frozenset(
    onnx.TensorProto.DataType.Value(f"{kind}{bits}")
    for kind in ("INT", "UINT")
    for bits in (8, 16, 32, 64)
)

_REDUCTIONS: Final = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSumSquare"),
)

# By operator and the opsets on both sides of the change.
ADAPTERS: Final[dict[tuple[str, int, int], Adapter]] = {
    ("Dropout", 9, 10): _dropout_10,
    ("Gelu", 20, 19): _gelu_19,
    ("GridSample", 20, 19): _grid_sample_19,
    **{(op, 13, 12): _softmax_12 for op in ("Hardmax", "LogSoftmax", "Softmax")},
    ("GroupNormalization", 20, 21): _group_normalization_21,
    ("Mod", 28, 27): _mod_27,
    **{(op, 18, 17): _reduce_axes for op in _REDUCTIONS},
    ("ReduceSum", 13, 12): _reduce_axes,
    ("Resize", 10, 11): _resize_11,
    ("Resize", 13, 12): _resize_12,
    ("RoiAlign", 15, 16): _roi_align_16,
    ("Split", 18, 17): _split_17,
    ("Upsample", 9, 10): _upsample_10,
}

# Versions that look alike and mean something else, or ask for more than their definitions say.
UNLIKE: Final = frozenset(
    {
        ("Dropout", 10),
        ("GroupNormalization", 21),
        ("Mod", 28),
        ("RoiAlign", 16),
        ("Split", 18),
    }
)
