"""What the versions of an operator have in common: where a node means the same in both.

Most changes of an operator only let it take more types, inputs or settings.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import onnx

from graphopt.passes.canonicalize.opset_adapters import UNLIKE
from graphopt.proofs import TensorType

_OPTIONAL: Final = onnx.defs.OpSchema.FormalParameterOption.Optional
_SINGLE: Final = onnx.defs.OpSchema.FormalParameterOption.Single
_VARIADIC: Final = onnx.defs.OpSchema.FormalParameterOption.Variadic


@dataclass
class Scope:
    """What is known of values by name: proven types, and constants of up to 1 KB."""

    types: Mapping[str, TensorType]
    data: Mapping[str, onnx.TensorProto]


def next_change(op: str, version: int, target: int) -> tuple[int, int] | None:
    """The opsets on both sides of the operator's next change on the way to the target."""
    way = 1 if target > version else -1
    for at in range(version, target, way):
        if since(op, at) != since(op, at + way):
            return at, at + way
    return None


@functools.cache
def since(op: str, version: int) -> int:
    """Which version of the operator an opset has, 0 for none; minus that where it is deprecated."""
    try:
        schema = onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return 0
    return -schema.since_version if schema.deprecated else int(schema.since_version)


def unchanged(node: onnx.NodeProto, before: int, after: int, scope: Scope) -> onnx.NodeProto | None:
    """The node, where it means the same in both versions; None where that takes more thought."""
    newer = max(before, after)
    if min(since(node.op_type, before), since(node.op_type, after)) <= 0:
        return None
    if (node.op_type, abs(since(node.op_type, newer))) in UNLIKE:
        return None
    old = onnx.defs.get_schema(node.op_type, min(before, after), "")
    new = onnx.defs.get_schema(node.op_type, newer, "")
    if after > before:
        return node if _extends(old, new, node) else None
    return _restricted(old, new, node, scope)


def _extends(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema, node: onnx.NodeProto) -> bool:
    """True where the new version takes what the old one took, and more."""
    stated = {attribute.name for attribute in node.attribute}
    return (
        len(old.inputs) <= len(new.inputs)
        and all(a.option in (b.option, _option(b)) for a, b in _pairs(old.inputs, new.inputs))
        and all(entry.option == _OPTIONAL for entry in new.inputs[len(old.inputs) :])
        and [o.option for o in old.outputs] == [o.option for o in new.outputs][: len(old.outputs)]
        and all(o.option == _OPTIONAL for o in new.outputs[len(old.outputs) :])
        and all(_same_attribute(old, new, name) for name in {*stated, *_defaults(old)})
        and not any(a.required and name not in stated for name, a in new.attributes.items())
    )


def _pairs(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(first, second, strict=False))


def _option(entry: Any) -> Any:
    """Where an input may be left out, one that is given is fine."""
    return _SINGLE if entry.option == _OPTIONAL else entry.option


def _defaults(schema: onnx.defs.OpSchema) -> dict[str, bytes]:
    return {
        name: entry.default_value.SerializeToString(deterministic=True)
        for name, entry in schema.attributes.items()
        if entry.default_value.name
    }


def _same_attribute(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema, name: str) -> bool:
    a, b = old.attributes.get(name), new.attributes.get(name)
    if a is None or b is None:
        return False
    return a.type == b.type and _defaults(old).get(name) == _defaults(new).get(name)


def _restricted(
    old: onnx.defs.OpSchema, new: onnx.defs.OpSchema, node: onnx.NodeProto, scope: Scope
) -> onnx.NodeProto | None:
    """The node for the older version, where it makes no use of what that cannot do."""
    given = [name for name in node.input[len(old.inputs) :] if name]
    variadic = old.inputs and old.inputs[-1].option == _VARIADIC
    if (
        missing(node, old) is not None
        or (given and not variadic)
        or len(node.output) > max(len(old.outputs), old.max_output)
    ):
        return None
    if not all(_same_attribute(old, new, name) for name in _defaults(old)):
        return None
    surplus = [a for a in node.attribute if a.name not in old.attributes]
    defaults = _defaults(new)
    if any(a.SerializeToString(deterministic=True) != defaults.get(a.name) for a in surplus):
        return None
    if any(a.required and n not in new.attributes for n, a in old.attributes.items()):
        return None
    if any(not _same_attribute(old, new, a.name) for a in node.attribute if a not in surplus):
        return None
    for entry, name in zip(old.inputs, node.input, strict=False):
        known = scope.types.get(name)
        if known is not None and str(_tensor(known)) not in entry.types:
            return None
    if not surplus and not (len(node.input) > len(old.inputs) and not variadic):
        return node
    kept = onnx.NodeProto()
    kept.CopyFrom(node)
    kept.ClearField("attribute")
    kept.attribute.extend(a for a in node.attribute if a not in surplus)
    if not variadic:
        del kept.input[len(old.inputs) :]
    return kept


def _tensor(known: TensorType) -> str:
    return f"tensor({str(known).partition('[')[0]})"


def missing(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> int | None:
    """The first input that the version needs and the node does not have."""
    for slot, entry in enumerate(schema.inputs):
        if entry.option == _SINGLE and not "".join(node.input[slot : slot + 1]):
            return slot
    return None
