"""Replacements: nodes and constants planned beside the graph, each typed as it is planned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.bound import AbsentInput, Bound, BoundVars, Planned, Unmatched
from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.match import Binding, Context, default_of, input_slot, python_value
from graphopt.proofs import TensorType, element_name
from graphopt.rules import Rejected, Rule, RuleError, Var, Variable
from graphopt.shapes import small_data
from graphopt.storage import HOLLOW_OVER


@dataclass
class Plan:
    """Nodes and constants to add, under names that nothing else has."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    read: dict[str, Value] = field(default_factory=dict)  # values of the graph, by name
    known: dict[str, TensorType] = field(default_factory=dict)


class Replacement:
    """Plays the pattern back up to the yield, then plans what the rule computes."""

    def __init__(
        self, rule: Rule, binding: Binding, root: Node, context: Context, edit: Editor
    ) -> None:
        self._rule = rule
        self._binding = binding
        self._root = root
        self._edit = edit
        self._context = context
        self._drawn = 0
        self.emitting = False
        self.plan = Plan()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(self._emit if self.emitting else self._replay, name)

    def handle(self, variable: Variable) -> Var:
        found = self._binding.variables[variable.name]
        if found is None:
            assert variable.default is not None
            return AbsentInput(variable.default.value)
        if isinstance(found, tuple):
            return BoundVars(found, self._context)
        return Bound(found, self._context)

    def _replay(self, op: str, /, *_: object, outputs: int | None = 1, **__: object) -> Any:
        drawn = self._rule.nodes
        if self._drawn >= len(drawn) or drawn[self._drawn].op != op:
            raise RuleError(
                f"rule {self._rule.name!r} draws another pattern on a match: it branches"
            )
        node = self._binding.nodes.get(self._drawn)
        self._drawn += 1
        if node is None:
            return Unmatched() if outputs == 1 else tuple(Unmatched() for _ in range(outputs or 0))
        if outputs is None:
            return BoundVars([v for v in node.outputs if v is not None], self._context, node)
        found = [Bound(v, self._context, node) for v in node.outputs[:outputs] if v is not None]
        return found[0] if outputs == 1 else tuple(found)

    def _emit(
        self, op: str, /, *operands: object, outputs: int | None = 1, **attributes: object
    ) -> Any:
        if not _exists(op, self._context.opset):
            raise Rejected(f"there is no {op} in opset {self._context.opset}")
        base = root_name(self._root)
        inputs: list[str] = [self._input(operand, base) for operand in _flat(operands)]
        node = onnx.NodeProto(op_type=op, name=self._edit.unique(f"{base}/{op}"))
        for name, value in attributes.items():
            slot = input_slot(op, name, self._context.opset)
            if slot is None:
                if value is not None and (stating := self._attribute(op, name, value)) is not None:
                    node.attribute.append(stating)
                continue
            inputs += [""] * (slot + 1 - len(inputs))
            given = python_value(value) if isinstance(value, onnx.AttributeProto) else value
            inputs[slot] = "" if given is None else self._input(np.asarray(given), base)
        while inputs and not inputs[-1]:
            inputs.pop()
        node.input.extend(inputs)
        node.output.append(node.name)
        node.output.extend(self._edit.unique(f"{base}/{op}") for _ in range(1, outputs or 1))
        self.plan.nodes.append(node)
        types = self._typed(node)
        found = [Planned(name, types.get(name)) for name in node.output]
        return found[0] if outputs == 1 else tuple(found)

    def _attribute(self, op: str, name: str, value: object) -> onnx.AttributeProto | None:
        """The attribute, None where the version does without it and does the same."""
        schema = onnx.defs.get_schema(op, self._context.opset, "")
        if name not in schema.attributes:
            stated = python_value(value) if isinstance(value, onnx.AttributeProto) else value
            try:
                implied = default_of(op, name, self._context.opset)
            except LookupError as error:
                raise RuleError(str(error)) from None
            if np.array_equal(np.asarray(implied), np.asarray(stated)):
                return None
            raise Rejected(f"{op} has no attribute {name} in opset {self._context.opset}")
        if isinstance(value, onnx.AttributeProto):
            return value
        kind = int(cast(Any, schema.attributes[name].type))
        plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        if kind == onnx.AttributeProto.FLOAT:
            plain = float(cast(float, plain))
        elif kind == onnx.AttributeProto.FLOATS:
            plain = [float(number) for number in cast(Sequence[float], plain)]
        return onnx.helper.make_attribute(name, plain, attr_type=kind)

    def _input(self, operand: object, base: str) -> str:
        if operand is None or isinstance(operand, AbsentInput):
            return ""
        if isinstance(operand, Bound):
            self.plan.read[operand.value.name] = operand.value
            return operand.value.name
        if isinstance(operand, Planned):
            return operand.name
        if isinstance(operand, Var):
            raise RuleError("an alternative that was not matched cannot be passed on")
        name = self._edit.unique(f"{base}/constant")
        self.plan.constants[name] = self._constant(np.asarray(operand), name)
        return name

    def _constant(self, array: NDArray[Any], name: str) -> onnx.TensorProto:
        """A constant in the storage type of what is rewritten; integers become int64."""
        if array.dtype.kind in "iu" and array.dtype != np.int64:
            array = array.astype(np.int64)
        if array.dtype.kind == "f":
            target = self._float_type()
            with np.errstate(over="ignore"):
                narrow = array.astype(target)
            if not np.isfinite(narrow.astype(np.float64)).all():
                raise Rejected(f"a new constant is not finite as {target}")
            array = narrow
        return onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)

    def _float_type(self) -> np.dtype[Any]:
        for value in (*self._root.outputs, *self._root.inputs):
            known = self._context.types[value] if value is not None else None
            if known is not None:
                dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(known.data_type))
                if dtype.kind == "f" or "float" in dtype.name:
                    return dtype
        return np.dtype(np.float32)

    def _typed(self, node: onnx.NodeProto) -> dict[str, TensorType]:
        plan, context = self.plan, self._context
        known: dict[str, TensorType] = {}
        data: dict[str, onnx.TensorProto] = {}
        for name in filter(None, node.input):
            if name in plan.constants:
                tensor = plan.constants[name]
                known[name] = TensorType(tensor.data_type, tuple(tensor.dims))
                if len(tensor.raw_data) <= HOLLOW_OVER:
                    data[name] = tensor
            elif name in plan.known:
                known[name] = plan.known[name]
            elif name in plan.read and (found := context.types[plan.read[name]]) is not None:
                known[name] = found
                if (tensor_data := small_data(plan.read[name], context.model)) is not None:
                    data[name] = tensor_data
            else:
                return {}
        self._check_elements(node, known)
        found_types = context.types.infer(node, known, data)
        plan.known.update(found_types)
        return found_types

    def _check_elements(self, node: onnx.NodeProto, known: Mapping[str, TensorType]) -> None:
        """Reject element types that the operator does not take, which inference lets pass."""
        formal = _formal_inputs(node.op_type, self._context.opset)
        bound: dict[str, int] = {}  # what the operator's type variables stand for
        for slot, name in enumerate(node.input):
            if name not in known or not formal:
                continue
            elements, type_variable = formal[min(slot, len(formal) - 1)]
            element = known[name].data_type
            if element not in elements:
                raise Rejected(f"{node.op_type} does not take {element_name(element)}")
            if type_variable and bound.setdefault(type_variable, element) != element:
                both = element_name(element), element_name(bound[type_variable])
                raise Rejected(f"{node.op_type} takes no {both[0]} beside {both[1]}")


def root_name(node: Node) -> str:
    return next((value.name for value in node.outputs if value is not None), "")


@functools.lru_cache(maxsize=4096)
def _formal_inputs(op: str, opset: int) -> tuple[tuple[frozenset[int], str], ...]:
    """For each input the elements that it takes, and what they are called where all are of one."""
    schema = onnx.defs.get_schema(op, opset, "")
    numbers = {f"tensor({element_name(n)})": n for n in onnx.TensorProto.DataType.values()}
    return tuple(
        (
            frozenset(numbers[kind] for kind in entry.types if kind in numbers),
            entry.type_str if entry.is_homogeneous else "",
        )
        for entry in schema.inputs
    )


@functools.lru_cache(maxsize=4096)
def _exists(op: str, opset: int) -> bool:
    try:
        onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


def _flat(operands: Sequence[object]) -> Iterator[object]:
    for operand in operands:
        if isinstance(operand, BoundVars):
            yield from operand.items
        elif isinstance(operand, list | tuple) and any(isinstance(o, Var) for o in operand):
            yield from operand
        else:
            yield operand
