"""Tables that rows are looked up in, as products of two of fewer numbers, as a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model, Node, Value, Weight
from graphopt.passes.copies import Copy

if TYPE_CHECKING:  # scipy takes half a second: it is for those who split
    from graphopt.kernels.lowrank import Spectrum
    from graphopt.runtime import Feed

Array = NDArray[Any]
RULE: Final = "split-embedding"
BETWEEN: Final = "/low-rank"  # behind the name of what a lookup gives: what it looks up now
_SMALLEST: Final = 4096  # numbers: a smaller table is not worth a node
_ROWS: Final = 8192  # of a table that are multiplied at a time


@dataclass(frozen=True)
class SplitEmbeddings:
    """Gather(table, i) => MatMul(Gather(a, i), b), where a b is about the table.

    `keep` is the share of each table's numbers that is left; with `energy` a table gets the least
    rank that keeps this share of the mean square of its rows. With `data` (as on the command line)
    each row counts as often as it is looked up, and once more: those that are not seen there are
    not lost, and few lookups tell little. Lookups in bodies of If, Loop and Scan are not counted.

    It saves bytes and no time: each lookup costs a small product more. Tables are float32
    initializers of the main graph. One that others read as well, such as a projection onto the same
    words, would have to stay beside its factors: it is left alone, unless split-layers gave that
    factors of its own before. One whose rank would not save numbers is, too. Lossy: it cannot be
    proved.
    """

    name: ClassVar[str] = "split-embeddings"

    keep: float = 0.0
    energy: float = 0.0
    data: str = ""

    def run(self, model: Model, edit: Editor) -> None:
        """Split tables of the main graph, none without options. Raises UsageError for bad ones."""
        if not (self.keep or self.energy):
            return
        if self.keep and self.energy:
            raise UsageError("split-embeddings: say how far in one way: keep or energy")
        for option, share in (("keep", self.keep), ("energy", self.energy)):
            if not 0 <= share < 1:
                raise UsageError(f"{option} {share}: it is above 0 and below 1")
        found = [table for value in model.graph.initializers if (table := _table(value))]
        counts = _counts(model, found, self.data) if self.data and found else {}
        for table in found:
            if not edit.allows(RULE, table.root):
                continue
            array = np.asarray(table.weight.values)
            factors = self._factors(array, counts.get(table.value.name))
            if factors is not None:
                _split(edit, table, *factors)

    def _factors(self, table: Array, counts: Array | None) -> tuple[Array, Array] | None:
        """a [V, r] and b [r, D]; None where they would not be smaller."""
        from graphopt.kernels.lowrank import energy_rank

        most = (table.size - 1) // sum(table.shape)  # it is smaller up to this rank
        rank = int(self.keep * table.size / sum(table.shape))
        if (self.keep and not rank) or not np.isfinite(table).all():
            return None
        found = spectrum_of_rows(table, counts)
        if self.energy:
            rank = max(1, energy_rank(found.values, self.energy))
        if rank > most:
            return None
        directions = found.factors(rank)[1]
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        last = np.ascontiguousarray(directions, np.float32)
        return np.ascontiguousarray(table @ last.T, np.float32), last


def spectrum_of_rows(table: Array, counts: Array | None = None) -> Spectrum:
    """What a table [V, D] loses at each rank, its rows weighed by how often they are looked up.

    By one more than that: the mean of what a uniform prior makes of the counts [V]. The right
    factors are orthogonal; what they leave of a row is the nearest to it that is possible, so that
    every row has its best left factor whatever the weights.
    """
    from graphopt.kernels.lowrank import spectrum

    weights = np.ones(len(table)) if counts is None else counts + 1.0
    weights = weights / weights.sum()
    width = table.shape[1]
    if len(table) < width:
        return spectrum(np.asarray(table, np.float64) * np.sqrt(weights)[:, None])
    gram = np.zeros((width, width))
    for start in range(0, len(table), _ROWS):
        rows = np.asarray(table[start : start + _ROWS], np.float64)
        gram += rows.T @ (rows * weights[start : start + _ROWS, None])
    return spectrum(np.eye(width), gram)  # a layer that gives what it reads: the rows


@dataclass(frozen=True, eq=False)
class _Table:
    """An initializer [V, D] and the nodes that look rows of it up: nobody else reads it."""

    value: Value
    weight: Weight
    lookups: tuple[Node, ...]

    @property
    def root(self) -> str:
        """The name of what the first lookup gives."""
        result = self.lookups[0].outputs[0]
        assert result is not None
        return result.name


def _table(value: Value) -> _Table | None:
    weight = value.constant
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT or weight.is_sparse:
        return None
    if len(weight.shape) != 2 or weight.size < _SMALLEST or value.is_output:
        return None
    readers = list(value.consumers)
    if not readers or not all(_is_lookup(node, value) for node in readers):
        return None
    return _Table(value, weight, tuple(sorted(readers, key=lambda node: node.place)))


def _is_lookup(node: Node, table: Value) -> bool:
    axis = node.attribute("axis")
    along_rows = axis is None or axis.i in (0, -2)
    is_gather = node.op == "Gather" and not node.domain and along_rows
    return is_gather and node.inputs[0] is table and node.inputs[1] is not table


# -- how often rows are looked up ------------------------------------------------------------------


def _counts(model: Model, tables: list[_Table], data: str) -> dict[str, Array]:
    """Lookups of each row [V] on the feeds, by the name of the table."""
    found = {table.value.name: np.zeros(table.weight.shape[0]) for table in tables}
    with Copy(model, data) as copy:
        assert copy.feeds is not None
        indices = {
            table.value.name: [node.inputs[1].name for node in table.lookups if node.inputs[1]]
            for table in tables
        }
        wanted = dict.fromkeys(name for names in indices.values() for name in names)
        for name, array in _seen(copy.model(), list(wanted), copy.feeds):
            for table, names in indices.items():
                size = len(found[table])
                rows = np.where(array < 0, array + size, array).ravel()
                if name in names:
                    found[table] += names.count(name) * np.bincount(rows, minlength=size)
    return found


def _seen(
    model: Model, names: list[str], feeds: Callable[[], Iterator[Feed]]
) -> Iterator[tuple[str, Array]]:
    """Integers of the main graph by name, on each feed; constants once."""
    from graphopt.relay import Relay

    values = [model.graph.values[name] for name in names if name in model.graph.values]
    constants = {v: w for v in values if (w := constant_of(v, model.store)) is not None}
    yield from ((value.name, weight.values) for value, weight in constants.items())
    others = [v for v in values if v not in constants and (v.producer or v.weight is None)]
    if others:
        with Relay(model, feeds(), others) as relay:
            for value in others:
                yield from ((value.name, array) for array in relay.values(value))


# -- the edit --------------------------------------------------------------------------------------


def _split(edit: Editor, table: _Table, first: Array, last: Array) -> None:
    """Let lookups give products of rows of `first` and `last`, under the names that they have."""
    graph, factors = edit.model.graph, []
    for array in (first, last):
        name = edit.unique(f"{table.value.name}/factor")
        tensor = onnx.numpy_helper.from_array(array, name)
        factors.append(edit.add_constant(graph, name, tensor, -1.0))
    for node in table.lookups:
        _replace(edit, node, *factors)
    if table.value.is_input:  # as all initializers are before IR 4
        edit.freeze_input(table.value)
    edit.remove_value(table.value)
    times = f"{len(table.lookups)} x " if len(table.lookups) > 1 else ""
    said = f"{times}Gather {table.weight.shape}"
    edit.record(RULE, table.root, said, f"rank {len(last)}")


def _replace(edit: Editor, node: Node, first: Value, last: Value) -> None:
    indices, result = node.inputs[1], node.outputs[0]
    assert indices is not None
    assert result is not None
    edit.detach_node(node)
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    between = edit.unique(f"{result.name}{BETWEEN}")
    proto.name = between
    proto.input[:], proto.output[:] = [first.name, indices.name], [between]
    known = {value.name: value for value in (first, last, indices)}
    edit.add_node(node.graph, proto, known, {}, node.position, RULE)
    product = onnx.helper.make_node("MatMul", [between, last.name], [result.name], result.name)
    edit.add_node(node.graph, product, known, {result.name: result}, node.position, RULE)
