"""Tables of embeddings in 8 bits: rows are gathered as integers and scaled as they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import onnx
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.kernels.affine import channel_affine, quantize
from graphopt.passes.quantize.products import stored_matrix
from graphopt.passes.quantize.site import Site

RULE: Final = "quantize-embedding"
_SINCE: Final = 7  # opset of Mul that broadcasts
_FEWEST: Final = 16  # elements that share a scale; fewer save little and cost as much
_SMALLEST: Final = 1024  # elements of a table; of a smaller one the nodes outweigh what is saved

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Lookup:
    owner: Value
    table: Array
    axis: int


def _lookup_of(node: Node, edit: Editor) -> _Lookup | str:
    if node.op != "Gather" or node.domain or node.outputs[0] is None:
        return "it is no Gather"
    stored = stored_matrix(node.inputs[0], edit.model)
    if isinstance(stored, str):
        return stored
    if edit.model.opsets.get("", 1) < _SINCE:
        return f"scales of rows need opset {_SINCE}"
    owner, table = stored
    if table.size < _SMALLEST:
        return f"the table has fewer than {_SMALLEST} elements"
    stated = node.attribute("axis")
    axis = 0 if stated is None else int(stated.i)
    if table.ndim == 0 or table.size // table.shape[axis] < _FEWEST:
        return f"rows of fewer than {_FEWEST} elements"
    return _Lookup(owner, table, axis % table.ndim)


def can_be_int8_table(node: Node, edit: Editor) -> str | None:
    """None where `make_int8_table` takes the node, else the reason why not.

    Taken is a Gather from a constant table of 1024 or more elements, along any axis, with 16 or
    more to a row.
    """
    found = _lookup_of(node, edit)
    return found if isinstance(found, str) else None


def make_int8_table(edit: Editor, node: Node) -> bool:
    """Store the table in s8 with one scale a row; False where that change is not allowed.

    Gather(table, i) => Cast(Gather(q, i)) * Gather(scales, i): what is read is converted, never
    the whole table, as DequantizeLinear in front of a Gather would do. Scales keep the table's
    rank, so that they broadcast whatever the shape of the indices. Raises ValueError for a node
    that `can_be_int8_table` has a reason against.
    """
    found = _lookup_of(node, edit)
    if isinstance(found, str):
        raise ValueError(f"{node.label} cannot read a table of integers: {found}")
    result, indices = node.outputs[0], node.inputs[1]
    assert result is not None
    if not edit.allows(RULE, result.name):
        return False
    affine = channel_affine(found.table, found.axis)
    scale, _ = affine.along(found.table.ndim)
    site = Site(edit, [node], RULE)
    q = site.constant(found.owner, "int8", quantize(found.table, affine))
    scales = site.constant(found.owner, "scales", scale)
    name = result.name
    (rows,) = site.call("Gather", [q, indices], [f"{name}/int8"], axis=found.axis)
    (wide,) = site.call("Cast", [rows], [f"{name}/float"], to=onnx.TensorProto.FLOAT)
    (steps,) = site.call("Gather", [scales, indices], [f"{name}/scales"], axis=found.axis)
    site.call("Mul", [wide, steps], [result])
    site.close()
    return True
