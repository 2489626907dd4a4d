"""The only mutator. Every edit is undone from a journal, and every change is told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from graphopt.constants import CONSTANT
from graphopt.errors import ModelError
from graphopt.importer import in_order
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.proofs import Proofs, TensorType
from graphopt.shapes import Types


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a pass did: the rule, the value it stands on, the graph before and after."""

    rule: str
    root: str
    before: str
    after: str


Denial = tuple[str, str | None]
"""A rule and the root it must not fire at; None: it must not fire at all."""


class Editor:
    """Edits a model; `undo_to(mark())` takes back everything since, newest first.

    `denied` changes must not be made, and no more changes than `fuel`: a pass asks `allows` before
    it makes one. What a pass did without asking shows in `overstepped`.
    """

    def __init__(
        self, model: Model, denied: Collection[Denial] = (), fuel: int | None = None
    ) -> None:
        self.model = model
        self.changes: list[Change] = []
        self.rejections: list[tuple[str, str, str]] = []  # rule, node, reason
        self.narrowed: frozenset[str] = frozenset()  # inputs that take fewer shapes than before
        self._denied = frozenset(denied)
        self._fuel = fuel
        self._settled = 0  # length of the journal when nodes were last put in order
        self._journal: list[Callable[[], None]] = []
        self._types: Types | None = None
        self._is_refined = False  # readers of what was bypassed read what is known better
        self._proofs = Proofs()
        self._names: set[str] | None = None

    @property
    def types(self) -> Types:
        """What is proven of every value, inferred on first use and kept up from then on."""
        if self._types is None:
            self._types = Types(self.model, self._proofs)
        return self._types

    def prove(self, value: Value, known: TensorType) -> None:
        """Tell what is proven of a value and inference does not find; it stays true for good."""
        self._proofs.types[value] = known
        self.types[value] = known

    def prove_nonzero(self, atoms: Collection[Hashable]) -> None:
        """Tell what open sizes are zero in no run that succeeds; it stays true for good."""
        self._proofs.nonzero |= set(atoms)

    def forget_types(self) -> None:
        """Infer again at the next question: constants that came up since may prove more."""
        if self._types is not None:
            self._types.forget()
        self._types = None

    def allows(self, rule: str, root: str) -> bool:
        """False for a change that was found to break the model, and once the fuel is spent."""
        return not self.is_spent and not self._is_denied(rule, root)

    @property
    def is_spent(self) -> bool:
        """True where no further change may be made."""
        return self._fuel is not None and len(self.changes) >= self._fuel

    @property
    def is_overspent(self) -> bool:
        """True where more changes were made than allowed, by a pass that does not ask."""
        return self._fuel is not None and len(self.changes) > self._fuel

    def stop(self) -> None:
        """Spend what is left of the fuel."""
        self._fuel = len(self.changes)

    def overstepped(self, mark: tuple[int, int]) -> Change | None:
        """The first change since `mark` that was not allowed, by a pass that does not ask."""
        for number, change in enumerate(self.changes[mark[1] :], mark[1]):
            beyond = self._fuel is not None and number >= self._fuel
            if beyond or self._is_denied(change.rule, change.root):
                return change
        return None

    def _is_denied(self, rule: str, root: str) -> bool:
        return (rule, root) in self._denied or (rule, None) in self._denied

    def mark(self) -> tuple[int, int]:
        """The present moment, for `undo_to`."""
        return len(self._journal), len(self.changes)

    def undo_to(self, mark: tuple[int, int]) -> None:
        """Take back every edit and change since `mark`."""
        edits, changes = mark
        if len(self._journal) > edits:
            while len(self._journal) > edits:
                self._journal.pop()()
            self._types = None  # rules refine the types of values that stay
            for graph in self.model.graphs():
                graph._restore_order()
            self._settled = -1
        del self.changes[changes:]

    @contextlib.contextmanager
    def supposing(self) -> Iterator[None]:
        """Try something out: edits, and what is proven while they last, are taken back."""
        mark, rejections = self.mark(), len(self.rejections)
        self.forget_types()  # what is learnt from here on must not reach the proofs that stay
        proofs = self._proofs
        self._proofs = proofs.copy()
        try:
            yield
        finally:
            self.undo_to(mark)
            del self.rejections[rejections:]
            self._proofs, self._types = proofs, None

    def journal(self, undo: Callable[[], None]) -> None:
        """Note how to take back what was just done; for parts of the editor in other modules."""
        self._journal.append(undo)

    def settle(self) -> None:
        """Put nodes in topological order; new ones stand behind all others until then.

        A graph with a cycle is left for verification to find. Where readers came to read what is
        known better than what they read before, types are inferred again.
        """
        if self._is_refined:
            self._is_refined = False
            self.forget_types()
        if self._settled == len(self._journal):
            return
        self._settled = len(self._journal)
        for graph in self.model.graphs():
            graph._restore_order()
            with contextlib.suppress(ModelError):
                graph.nodes = dict.fromkeys(in_order(list(graph.nodes), "result"))

    def record(self, rule: str, root: str, before: str, after: str) -> None:
        """Tell what was done; `root` is the name it stands on, `before` and `after` are text."""
        self.changes.append(Change(rule, root, before, after))

    def set_input(self, node: Node, slot: int, value: Value | None) -> None:
        """Let input `slot` of the node read `value`."""
        old = node.inputs[slot]
        node.graph._set_input(node, slot, value)
        self._journal.append(lambda: node.graph._set_input(node, slot, old))

    def append_input(self, node: Node, value: Value) -> None:
        """Let the node read one more value, behind those it reads."""

        def undo() -> None:
            node.graph._set_input(node, len(node.inputs) - 1, None)
            node.inputs.pop()

        node.inputs.append(None)
        node.graph._set_input(node, len(node.inputs) - 1, value)
        self._journal.append(undo)

    def restate(self, node: Node, proto: onnx.NodeProto) -> None:
        """Let `proto` state the node's attributes; its operator and edges stay as they are."""
        before, rewired = node.proto, node.rewired

        def undo() -> None:
            node.proto, node.rewired = before, rewired

        node.proto, node.rewired = proto, True
        node.graph._touch()
        self._journal.append(undo)

    def replace_uses(self, old: Value, new: Value | None) -> None:
        """Let every reader of `old`, in bodies too, read `new`. Graph outputs stay as they are."""
        for node in list(old.consumers):
            for slot, value in enumerate(node.inputs):
                if value is old:
                    self.set_input(node, slot, new)

    def can_bypass(self, old: Value, new: Value) -> bool:
        """True where `new` can stand for `old` everywhere, graph outputs included."""
        if old in old.graph.pinned:
            return False
        if not old.is_output:
            return not _hidden(old, new.name, new.graph)
        return (
            new.producer is not None
            and new.graph is old.graph
            and not new.is_output
            and new not in new.graph.pinned
            and not _hidden(new, old.name, old.graph)
        )

    def bypass(self, old: Value, new: Value) -> None:
        """Let readers of `old`, which nothing computes any more, read `new` instead.

        A graph output keeps its name: then the node that computes `new` computes it as `old`.
        """
        if self._types is not None and (known := self._types[new]) is not None:
            before = self._types[old]
            self._is_refined |= before is None or not before.stands_for(known)
        if not old.is_output:
            self.replace_uses(old, new)
            self.remove_value(old)
            return
        self.move_output(new, old)
        self.replace_uses(new, old)
        self.remove_value(new)

    def unique(self, base: str) -> str:
        """A name derived from `base` that no value or node of the model has."""
        if self._names is None:
            self._names = {name for graph in self.model.graphs() for name in graph.values}
            self._names |= {node.name for node in self.model.nodes()}
        name, number = base, 1
        while name in self._names:
            number += 1
            name = f"{base}_{number}"
        self._names.add(name)
        return name

    def add_constant(
        self, graph: Graph, name: str, tensor: onnx.TensorProto, position: float
    ) -> Value:
        """A new constant: an initializer, or a Constant node where those must be inputs too."""
        if graph.inputs_are_frozen:
            proto = onnx.NodeProto(op_type="Constant", name=name, output=[name])
            proto.attribute.append(onnx.helper.make_attribute("value", tensor))
            value = self.add_value(graph, name)
            self._insert(Node(proto, graph, position), [], [value])
            return value
        value = self.add_value(graph, name)
        value.weight = Weight(self.model.store.kept(tensor), self.model.store)
        return value

    def add_node(
        self,
        graph: Graph,
        proto: onnx.NodeProto,
        known: dict[str, Value],
        results: Mapping[str, Value],
        position: float,
        rule: str,
    ) -> Node:
        """A new node. `known` resolves its inputs by name and learns its outputs.

        An output named in `results` is computed as that existing value, which must be free.
        """
        node = Node(proto, graph, position)
        node.rule = rule
        node.rewired = True
        outputs = []
        for name in proto.output:
            known[name] = results[name] if name in results else self.add_value(graph, name)
            outputs.append(known[name])
        self._insert(node, [known[name] if name else None for name in proto.input], outputs)
        return node

    def _insert(
        self, node: Node, inputs: Sequence[Value | None], outputs: Sequence[Value | None]
    ) -> None:
        node.inputs, node.outputs = list(inputs), list(outputs)
        node.graph._restore_node(node)
        self._journal.append(lambda: node.graph._remove_node(node))

    def add_value(self, graph: Graph, name: str) -> Value:
        """A new name, which nothing computes yet."""
        value = Value(name, graph)
        graph._restore_value(value)
        self._journal.append(lambda: graph._remove_value(value))
        return value

    def move_output(self, old: Value, new: Value) -> None:
        """Let the node that computes `old` compute it under the name `new`, which must be free."""
        node = old.producer
        assert node is not None
        assert new.producer is None
        slot = node.outputs.index(old)
        node.graph._set_output(node, slot, new)

        def undo() -> None:
            node.graph._set_output(node, slot, old)

        self._journal.append(undo)

    def remove_node(self, node: Node) -> None:
        """Remove a node that nobody reads, and the values that it computed."""
        graph = node.graph
        for value in node.outputs:
            if value is not None and (value.consumers or value.is_output):
                raise ValueError(f"{node.label} cannot go: {value.name!r} is still read")
        graph._remove_node(node)
        self._journal.append(lambda: graph._restore_node(node))
        for value in node.outputs:
            if value is not None:
                self._remove_value(graph, value)

    def detach_node(self, node: Node) -> None:
        """Remove a node but keep its outputs, which another node is about to compute."""
        graph = node.graph
        graph._remove_node(node)
        self._journal.append(lambda: graph._restore_node(node))

    def remove_value(self, value: Value) -> None:
        """Remove a name that nothing computes or reads any more: a weight, a bypassed value."""
        if value.consumers or value.is_output or value.producer is not None:
            raise ValueError(f"{value.name!r} cannot go: it is still used")
        self._remove_value(value.graph, value)

    def freeze_input(self, value: Value) -> None:
        """Take an input with a default off the graph's inputs: its default becomes its value."""
        graph = value.graph
        before = graph.inputs
        graph._set_inputs([other for other in before if other is not value])
        self._journal.append(lambda: graph._set_inputs(before))

    def make_constant(self, value: Value, weight: Weight, position: float) -> None:
        """Let a value that nothing computes any more be a constant, under its name.

        An initializer; where that would have to be an input (IR < 4), or the value is an output
        of its graph, what a Constant node at `position` computes.
        """
        graph, named = value.graph, weight.named(value.name)
        if not value.is_output and not self.model.graph.inputs_are_frozen:
            value.weight = named
            graph._touch()

            def undo() -> None:
                value.weight = None

            self._journal.append(undo)
            return
        node = onnx.NodeProto(op_type=CONSTANT, name=value.name, output=[value.name])
        key = "sparse_value" if weight.is_sparse else "value"
        node.attribute.append(onnx.helper.make_attribute(key, named.proto))
        self._insert(Node(node, graph, position), [], [value])

    def set_weight(self, value: Value, tensor: onnx.TensorProto) -> None:
        """Let an initializer hold other numbers, of the same type and shape."""
        before = value.weight
        assert before is not None
        assert (before.data_type, before.shape) == (tensor.data_type, tuple(tensor.dims))
        value.weight = Weight(self.model.store.kept(tensor), self.model.store)
        value.graph._touch()

        def undo() -> None:
            value.weight = before

        self._journal.append(undo)

    def represent(self, value: Value, proto: onnx.TensorProto | onnx.SparseTensorProto) -> None:
        """Let an initializer hold the same numbers in another form: dense, or sparse."""
        before, after = value.weight, Weight(proto, self.model.store)
        assert before is not None
        assert (before.data_type, before.shape) == (after.data_type, after.shape)
        value.weight = after
        value.graph._touch()

        def undo() -> None:
            value.weight = before

        self._journal.append(undo)

    def declare(self, value: Value, kind: onnx.TypeProto | None) -> None:
        """Let the file state this type of a value, None for nothing; not of inputs and outputs."""
        graph, name = value.graph, value.name
        assert value not in graph.input_set
        assert not value.is_output
        before, was_redeclared = graph.value_info.get(name), name in graph.redeclared

        def undo() -> None:
            _state(graph, name, before)
            if not was_redeclared:
                graph.redeclared.discard(name)

        info = None if kind is None else onnx.ValueInfoProto(name=name, type=kind)
        _state(graph, name, info)
        graph.redeclared.add(name)
        graph._touch()
        self._journal.append(undo)

    def define(
        self, functions: Sequence[onnx.FunctionProto], opsets: Sequence[onnx.OperatorSetIdProto]
    ) -> None:
        """Let these be the functions that the model defines, and the operator sets it imports."""
        before = self.model.proto
        after = onnx.ModelProto()
        after.CopyFrom(before)
        for field, kept in (("functions", functions), ("opset_import", opsets)):
            after.ClearField(field)
            getattr(after, field).extend(kept)
        self.model.proto = after
        self._types = None

        def undo() -> None:
            self.model.proto = before
            self._types = None

        self._journal.append(undo)

    def adopt(self, other: Model) -> None:
        """Let the model be `other`, for passes that make a new graph instead of editing one."""
        before = self.model.proto, self.model.graph

        def undo() -> None:
            self.model.proto, self.model.graph = before
            self._types = self._names = None

        self.model.proto, self.model.graph = other.proto, other.graph
        self._types = self._names = None
        self._journal.append(undo)

    def narrow(self, inputs: Collection[str]) -> None:
        """Note that these inputs were given more specific types, as the user asked.

        Without it that is a broken interface (`graphopt.verify`).
        """
        before = self.narrowed
        self.narrowed |= frozenset(inputs)

        def undo() -> None:
            self.narrowed = before

        self._journal.append(undo)

    def _remove_value(self, graph: Graph, value: Value) -> None:
        graph._remove_value(value)
        self._journal.append(lambda: graph._restore_value(value))


def _state(graph: Graph, name: str, info: onnx.ValueInfoProto | None) -> None:
    if info is None:
        graph.value_info.pop(name, None)
    else:
        graph.value_info[name] = info


def _hidden(value: Value, name: str, owner: Graph) -> bool:
    """True where a reader of `value` sits in a body in which `name` means something else."""
    for reader in value.consumers:
        graph: Graph | None = reader.graph
        while graph is not None and graph is not owner:
            if name in graph.values:
                return True
            graph = graph.owner.graph if graph.owner is not None else None
    return False
