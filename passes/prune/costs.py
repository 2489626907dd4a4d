"""What a unit is worth: the multiply-accumulates that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from graphopt import macs
from graphopt.edit import Editor
from graphopt.ir import Node
from graphopt.operators import MACS
from graphopt.passes.prune.groups import Group, Units


@dataclass(frozen=True, slots=True)
class _Share:
    """The part of a node's work that one unit of the group is, where it is given and read."""

    given: float = 0.0
    read: float = 0.0

    @property
    def total(self) -> float:
        """Of all, what lies in the one part or the other."""
        return self.given + self.read - self.given * self.read


def costs(edit: Editor, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """MACs that one unit of the group is worth on average, at these shapes of values by name.

    Of every product that gives, passes or reads it; of a recurrent operator what it gives. Values
    without a shape count nothing.
    """
    shares: dict[Node, _Share] = {}
    for place, units in group.parts.places:
        if place.axis >= 0 and (place.node.domain, place.node.op) in MACS:
            share = shares.get(place.node, _Share())
            given = max(share.given, _part(units, group.units))
            shares[place.node] = _Share(given, share.read)
    for slot in group.readers:
        node = slot.product
        if node is not None and slot.read not in node.outputs:
            share = shares.get(node, _Share())
            shares[node] = _Share(share.given, _part(slot.units, group.units))
    return sum(_macs(edit, node, shapes) * share.total for node, share in shares.items())


def _part(units: Units, count: int) -> float:
    """The part of an axis that one unit takes on average."""
    return float(np.count_nonzero(units >= 0)) / len(units) / count


def _macs(edit: Editor, node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of one node, counted as a model of its own."""
    inputs, sizes = [], {}
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    for slot, value in enumerate(node.inputs):
        if value is None:
            continue
        known, name = edit.types[value], f"x{slot}"
        size = _size(value.name, known.shape if known is not None else None, shapes)
        if size is None or known is None:
            return 0
        proto.input[slot] = name
        sizes[name] = size
        inputs.append(onnx.helper.make_tensor_value_info(name, known.data_type, size))
    proto.output[:] = [f"y{slot}" for slot in range(len(node.outputs))]
    graph = onnx.helper.make_graph([proto], "node", inputs, [])
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in proto.output)
    model = onnx.ModelProto(ir_version=edit.model.proto.ir_version, graph=graph)
    model.opset_import.extend(edit.model.proto.opset_import)
    return macs.count(model, sizes).total


def _size(
    name: str,
    proven: tuple[int | str | None, ...] | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, ...] | None:
    if name in shapes:
        return shapes[name]
    found = tuple(size for size in proven or () if isinstance(size, int))
    return found if proven is not None and len(found) == len(proven) else None
