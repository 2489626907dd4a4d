"""What can be computed before the model runs."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.evaluate import as_weight, evaluate
from graphopt.ir import Model, Node, Value, Weight
from graphopt.operators import BOUNDED_OUTPUTS, QUANTIZERS, is_random
from graphopt.passes.canonicalize.inline_if import branch_taken, suits_readers
from graphopt.passes.canonicalize.shape_facts import ShapeFacts
from graphopt.proofs import TensorType
from graphopt.runtime import limits
from graphopt.shapes import node_types, takes
from graphopt.storage import HOLLOW_OVER, tensor_bytes

RULE: Final = "fold-constant"
_STRING_BYTES: Final = 64  # of an element, guessed: only running tells
_LARGEST: Final = 1 << 28  # bytes that one node may compute, unless its inputs are as large


@dataclass(frozen=True)
class FoldConstants:
    """Nodes that depend on constants and proven sizes only => what onnxruntime computes for them.

    A result may exceed the constants that go for it by `budget` bytes: an Expand of a zero folds,
    a weight that is stored as int8, or as one number and a shape, stays as it is. Random operators
    and those that quantize or dequantize are left alone, and so is what a caller can replace.
    """

    name: ClassVar[str] = "fold-constants"
    budget: int = 65536

    def run(self, model: Model, edit: Editor) -> None:
        mark = edit.mark()
        kept: set[Node] = set()
        while True:
            folding = _Folding(model, edit, kept)
            while folding.sizes() | folding.nodes(self.budget):
                edit.forget_types()  # constants that are new may prove more sizes
            if not folding.refused:
                return
            edit.undo_to(mark)
            kept |= folding.refused_with_sources()


class _Folding:
    """One attempt. A node whose result its readers cannot take ends it: then the nodes before it
    must not be folded either, since a runtime that folds the rest would come to the same end."""

    def __init__(self, model: Model, edit: Editor, kept: set[Node]) -> None:
        self._model = model
        self._edit = edit
        self._kept = set(kept)
        self._folded: set[Node] = set()
        self.refused: set[Node] = set()

    def sizes(self) -> bool:
        """Fold what is proven of shapes; True where anything was folded."""
        facts = ShapeFacts(self._model, self._edit)
        folded = False
        for graph in self._model.graphs():
            for node in list(graph.nodes):
                found = facts.visit(node) if node not in self._kept else None
                value = node.outputs[0] if node.outputs else None
                if found is not None and value is not None and _is_needed(value):
                    folded |= self._store(node, {value: as_weight(found, self._model)})
        return folded and not self.refused

    def nodes(self, budget: int) -> bool:
        """Fold what onnxruntime computes; True where anything was folded."""
        if self.refused or self._model.opsets.get("", 1) > limits().opset:
            return False
        plan = _Plan(_Candidates(self._model, self._edit, self._kept), budget)
        results = evaluate(plan.needed(), plan.stored, self._model)
        self._kept.update(v.producer for v in plan.stored if v not in results and v.producer)
        folded = False
        for node in reversed(plan.dying):  # readers first: what only they needed is dead then
            needed = [value for value in node.outputs if value is not None and _is_needed(value)]
            if not needed:
                self._edit.remove_node(node)
                self._folded.add(node)
            elif all(value in results for value in needed):
                weights = {value: as_weight(results[value], self._model) for value in needed}
                folded |= self._store(node, weights)
        return folded and not self.refused

    def _store(self, node: Node, results: dict[Value, Weight]) -> bool:
        """Let what the node computes be constants; False where that is not allowed."""
        edit, root = self._edit, next(iter(results))
        if not edit.allows(RULE, root.name):
            return False
        if not all(_suits_readers(v, weight, self._model, edit) for v, weight in results.items()):
            self.refused.add(node)
            return False
        before = node.text()
        told = []
        edit.detach_node(node)
        for value in node.outputs:
            if value in results and value is not None:
                edit.make_constant(value, results[value], node.position)
                told.append(f"{value.name} [{','.join(map(str, results[value].shape))}]")
            elif value is not None:
                edit.remove_value(value)
        self._folded.add(node)
        edit.record(RULE, root.name, before, ", ".join(told))
        return True

    def refused_with_sources(self) -> set[Node]:
        """What was refused, and what was folded on the way to it; once all is undone."""
        found: set[Node] = set()
        pending = list(self.refused)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                made = (value.producer for value in node.inputs if value is not None)
                pending += [other for other in made if other in self._folded]
        return found


def _suits_readers(value: Value, weight: Weight, model: Model, edit: Editor) -> bool:
    """False where a runtime that knows the constant would refuse the model.

    Branches that no run takes may hold what cannot be computed, as long as it does not show.
    """
    known = TensorType(weight.data_type, weight.shape)
    given = weight.tensor if weight.nbytes <= HOLLOW_OVER else known
    for reader in value.consumers:
        if not reader.bodies:
            if not takes(reader, edit.types, model, {value: given}):
                return False
        elif reader.inputs[:1] == [value]:
            branch = branch_taken(reader, weight, model)
            if branch is not None and not suits_readers(reader, branch, model, edit):
                return False
    return True


def _is_needed(value: Value) -> bool:
    return bool(value.consumers) or value.is_output or value in value.graph.pinned


class _Candidates:
    """Nodes that can be computed from constants, in order, with the sizes of their results."""

    def __init__(self, model: Model, edit: Editor, failed: set[Node]) -> None:
        self._model = model
        self._edit = edit
        self._functions = model.functions
        self.sizes: dict[Value, int] = {}  # bytes of each value that they compute
        self.nodes: dict[Node, None] = {}
        for graph in model.graphs():
            for node in graph.nodes:
                if node not in failed and self._is_foldable(node) and self._has_size(node):
                    self.nodes[node] = None

    def constant(self, value: Value) -> Weight | None:
        return constant_of(value, self._model.store)

    def _is_foldable(self, node: Node) -> bool:
        if node.domain or node.bodies or node.op in QUANTIZERS or not node.inputs:
            return False
        if not all(self._is_known(value) for value in node.inputs):
            return False
        if ("", node.op, node.overload) in self._functions or is_random(node):
            return False
        outputs = [value for value in node.outputs if value is not None]
        if not outputs or not any(_is_needed(value) for value in outputs):
            return False
        return _gives_tensors(node.op, self._model.opsets.get("", 1)) and self._edit.allows(
            RULE, outputs[0].name
        )

    def _is_known(self, value: Value | None) -> bool:
        if value is None or value in self.sizes:
            return True
        weight = self.constant(value)
        return weight is not None and self._has_data(weight)

    def _has_data(self, weight: Weight) -> bool:
        """False in a weightless model."""
        tensor, store = weight.tensor, self._model.store
        is_text = weight.data_type == onnx.TensorProto.STRING
        there = store.reference(tensor) is not None or store.data_bytes(tensor) is not None
        return there or is_text or weight.size == 0

    def _has_size(self, node: Node) -> bool:
        """Learn how large the node's results are; False where that does not follow."""
        inputs = [value for value in node.inputs if value is not None]
        read = sum(self._bytes(value) for value in inputs)
        inferred: dict[str, TensorType] | None = None
        found: dict[Value, int] = {}
        for value in node.outputs:
            if value is None:
                continue
            size = _bytes_of(self._edit.types[value])
            if size is None and all(self.constant(v) is not None for v in inputs):
                if inferred is None:
                    inferred = node_types(node, self._edit.types, self._model)
                size = _bytes_of(inferred.get(value.name))
                if size is None and node.op in BOUNDED_OUTPUTS:
                    size = 8 * sum(w.size * max(len(w.shape), 1) for w in self._weights(inputs))
            if size is None or size > max(_LARGEST, read):
                return False
            found[value] = size
        self.sizes.update(found)
        return True

    def _weights(self, values: Iterable[Value]) -> list[Weight]:
        return [weight for value in values if (weight := self.constant(value)) is not None]

    def _bytes(self, value: Value) -> int:
        weight = self.constant(value)
        return weight.nbytes if weight is not None else self.sizes[value]


class _Plan:
    """Which candidates go, which of their results are stored, so that the file stays small.

    A large result is stored in the place of constants that then go themselves: those that nothing
    else reads. Where they are too small for it, its node stays, and so does what that needs.
    """

    def __init__(self, candidates: _Candidates, budget: int) -> None:
        self._candidates = candidates
        self._budget = budget
        self._refused: set[Value] = set()
        self._settle()
        while refused := self._too_large():
            self._refused |= refused
            self._settle()

    def _settle(self) -> None:
        """Find the nodes that go, and what is stored for those that stay."""
        dying: dict[Node, None] = {}
        self.stored: dict[Value, None] = {}
        for node in reversed(self._candidates.nodes):
            outputs = [value for value in node.outputs if value is not None]
            needed = [v for v in outputs if _is_needed(v) and not self._dies(v, dying)]
            if self._refused.isdisjoint(needed):
                dying[node] = None
                self.stored.update(dict.fromkeys(needed))
        self.dying = dict.fromkeys(reversed(dying))

    def _dies(self, value: Value, dying: dict[Node, None]) -> bool:
        kept = value.is_output or value in value.graph.pinned
        return not kept and all(reader in dying for reader in value.consumers)

    def _too_large(self) -> set[Value]:
        """Stored results that exceed the constants which go for them by more than the budget."""
        left: dict[Value, int] = {}  # bytes of constants that go and no result stands for yet
        refused = set()
        for value in reversed(self.stored):
            size = self._candidates.sizes[value]
            if size <= self._budget:
                continue
            sources = self._sources(value)
            for source in sources:
                weight = self._candidates.constant(source)
                if source not in left and weight is not None:
                    left[source] = weight.nbytes if self._dies(source, self.dying) else 0
            if sum(left[source] for source in sources) + self._budget < size:
                refused.add(value)
                continue
            for source in sources:
                used = min(left[source], size)
                left[source] -= used
                size -= used
        return refused

    def _sources(self, value: Value) -> dict[Value, None]:
        """The constants that a result is computed from."""
        found: dict[Value, None] = {}
        for node in self._cone([value]):
            for read in node.inputs:
                if read is not None and read not in self._candidates.sizes:
                    found[read] = None
        return found

    def _cone(self, values: Iterable[Value]) -> dict[Node, None]:
        pending = [v.producer for v in values if v.producer is not None]
        seen: dict[Node, None] = {}  # ordered: two runs must do the same
        while pending:
            node = pending.pop()
            if node not in seen:
                seen[node] = None
                pending += [
                    v.producer for v in node.inputs if v in self._candidates.sizes and v.producer
                ]
        return seen

    def needed(self) -> list[Node]:
        """The nodes that compute what is stored, in order."""
        cone = self._cone(self.stored)
        return [node for node in self._candidates.nodes if node in cone]


def _bytes_of(known: TensorType | None) -> int | None:
    if known is None or known.shape is None:
        return None
    dims = [dim for dim in known.shape if isinstance(dim, int)]
    if len(dims) < len(known.shape):
        return None
    if known.data_type == onnx.TensorProto.STRING:
        return int(np.prod(dims, dtype=object)) * _STRING_BYTES
    return tensor_bytes(known.data_type, dims)


@functools.cache
def _gives_tensors(op: str, opset: int) -> bool:
    """True for an operator each of whose outputs may be a tensor."""
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return False
    return all(any(kind.startswith("tensor(") for kind in o.types) for o in schema.outputs)
