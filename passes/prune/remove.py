"""Units taken out of the graph: weights cut, what nodes state put right, values named anew.

Where the readers' weights of a unit are zero, its removal changes nothing but rounding. Groups of
one `groups_of` stay good while units of others are removed: they share no axis.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np
import onnx

from graphopt.constants import CONSTANT, constant_of
from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.passes.prune.groups import Group, Units
from graphopt.passes.prune.labels import Fix

REMOVE: Final = "remove-channels"
SUFFIX: Final = "/pruned"


def remove(edit: Editor, group: Group, units: Collection[int]) -> bool:
    """Take these units of the group out; each group is cut once.

    False, and nothing done, where the change is not allowed or would leave a tensor without any
    index. Raises ValueError where there are no such units, or none would be left.
    """
    gone = np.unique(np.asarray(list(units), np.int64))
    if not len(gone) or gone[0] < 0 or gone[-1] >= group.units or len(gone) == group.units:
        raise ValueError(f"{group.root}: of {group.units} units {sorted(units)} cannot go")
    kept = [units for _, units in group.parts.places] + [each[2] for each in group.parts.stored]
    if any(np.isin(each, gone).all() for each in kept) or not edit.allows(REMOVE, group.root):
        return False
    before = group.text(len(gone))
    _cut_constants(edit, group, gone)
    for fix, counted, watched in group.parts.fixes:
        if np.isin(watched, gone).any():
            _put_right(edit, fix, counted, gone)
    _rename(edit, group, gone)
    after = ", ".join(slot.value.name for slot in (*group.givers, *group.readers))
    edit.record(REMOVE, group.root, before, after)
    edit.forget_types()
    return True


def silence(edit: Editor, group: Group, units: Collection[int]) -> None:
    """Let readers take nothing of these units: their weights for them become zero."""
    for slot in group.readers:
        weight = constant_of(slot.value, edit.model.store)
        assert weight is not None
        array = np.array(weight.values)
        np.moveaxis(array, slot.axis, 0)[np.isin(slot.units, list(units))] = 0
        _replace(edit, slot.value, array, [(slot.node, slot.slot)], "/silenced")


# -- weights -----------------------------------------------------------------------------------


def _cut_constants(edit: Editor, group: Group, gone: Units) -> None:
    cuts: dict[int, list[tuple[int, Units]]] = {}
    constants = {id(stored): stored for stored, _, _ in group.parts.stored}
    for stored, axis, units in group.parts.stored:
        cuts.setdefault(id(stored), []).append((axis, units))
    for key, stored in constants.items():
        node, slot = stored.readers[0]
        value = node.inputs[slot]
        weight = constant_of(value, edit.model.store)
        assert value is not None
        assert weight is not None
        array = weight.values
        for axis, units in cuts[key]:
            assert array.shape[axis] == len(units), "a group is cut once"
            array = np.compress(~np.isin(units, gone), array, axis)
        if array.shape == weight.shape:
            continue
        _replace(edit, value, array, stored.uses, SUFFIX)


def _replace(
    edit: Editor, value: Value, array: Any, uses: Sequence[tuple[Node, int]], suffix: str
) -> None:
    """Let these inputs be another constant."""
    name = _new_name(edit, value, suffix)
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
    made = edit.add_constant(value.graph, name, tensor, -1.0)
    for node, slot in uses:
        edit.set_input(node, slot, made)
    _drop(edit, value)


def _drop(edit: Editor, value: Value) -> None:
    """Remove a constant that nothing reads any more."""
    if value.consumers or value.is_output or value.is_input or value in value.graph.pinned:
        return
    if value.weight is not None:
        edit.remove_value(value)
    elif value.producer is not None and value.producer.op == CONSTANT:
        edit.remove_node(value.producer)


def _new_name(edit: Editor, value: Value, suffix: str = SUFFIX) -> str:
    return edit.unique(value.name.split(suffix)[0] + suffix)


# -- what nodes state --------------------------------------------------------------------------


def _put_right(edit: Editor, fix: Fix, counted: Units, gone: Units) -> None:
    """Let the node state the number of what is left, or where it is now."""
    left = ~np.isin(counted, gone)
    if isinstance(fix.where, str):
        _state_attribute(edit, fix.node, fix.where, fix.index, int(left.sum()))
    elif fix.index is None:
        numbers = _numbers(edit, fix.node, fix.where, fix)
        numbers = np.where(numbers < 0, numbers + len(left), numbers)
        _state_input(edit, fix.node, fix.where, (np.cumsum(left) - 1)[numbers[left[numbers]]])
    else:
        node, slot = fix.node, fix.where
        if fix.part is not None:
            node, slot = _own_concat(edit, fix.node, fix.where), fix.part
        numbers = _numbers(edit, node, slot, fix)
        numbers[fix.index] = int(left.sum())
        _state_input(edit, node, slot, numbers)


def _state_attribute(edit: Editor, node: Node, name: str, index: int | None, number: int) -> None:
    """The node keeps its place, for other groups know it; its results have other names now."""
    if node.attribute(name) is None:
        return
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    for attribute in proto.attribute:
        if attribute.name == name and index is None:
            attribute.i = number
        elif attribute.name == name and index is not None:
            attribute.ints[index] = number
    edit.restate(node, proto)


def _numbers(edit: Editor, node: Node, slot: int, fix: Fix) -> Units:
    """What the input holds: as it is now, where another group changed it."""
    weight = constant_of(node.inputs[slot], edit.model.store)
    if weight is None:
        return np.array(fix.numbers, np.int64)
    return weight.values.reshape(-1).astype(np.int64)


def _state_input(edit: Editor, node: Node, slot: int, numbers: Units) -> None:
    value = node.inputs[slot]
    assert value is not None
    weight = constant_of(value, edit.model.store)
    kind = onnx.TensorProto.INT64 if weight is None else weight.data_type
    array = numbers.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    name = _new_name(edit, value)
    tensor = onnx.numpy_helper.from_array(array, name)
    edit.set_input(node, slot, edit.add_constant(node.graph, name, tensor, -1.0))
    _drop(edit, value)


def _own_concat(edit: Editor, node: Node, slot: int) -> Node:
    """The Concat that gives an input of the node: a copy where others read it too."""
    value = node.inputs[slot]
    assert value is not None
    maker = value.producer
    assert maker is not None
    if maker.rule == REMOVE and len(value.consumers) == 1:
        return maker
    proto = onnx.NodeProto()
    proto.CopyFrom(maker.proto)
    proto.name = edit.unique(f"{maker.name or value.name}{SUFFIX}")
    proto.input[:] = [source.name for source in maker.inputs if source is not None]
    proto.output[:] = [_new_name(edit, value)]
    known = {source.name: source for source in maker.inputs if source is not None}
    copy = edit.add_node(maker.graph, proto, known, {}, maker.position, REMOVE)
    edit.set_input(node, slot, copy.outputs[0])
    return copy


# -- names -------------------------------------------------------------------------------------


def _rename(edit: Editor, group: Group, gone: Units) -> None:
    """Other names for values that now mean something else."""
    moved = (place for place, units in group.parts.places if np.isin(units, gone).any())
    changed = dict.fromkeys((place.node, place.slot) for place in moved)
    for node, slot in changed:
        value = node.outputs[slot]
        assert value is not None
        made = edit.add_value(value.graph, _new_name(edit, value))
        edit.move_output(value, made)
        edit.replace_uses(value, made)
        edit.remove_value(value)
