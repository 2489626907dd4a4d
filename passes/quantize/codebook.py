"""Weights as indices into a table of their own: smaller files, neither faster nor less memory.

Gather(table, Cast(indices)) computes the weight. onnxruntime folds that as it loads a model, so
that operators see float weights and run as they did: what is saved is bytes of the file alone. A
session that may not optimize looks weights up in every run. `fold-constants` leaves such weights
as they are from 88 KB on, and makes smaller ones floats again: lossless passes go before.

One table of 256 or 16 floats serves a whole tensor, placed where its numbers are (k-means): at 8
bits some 43 dB of a network's weights are left, at 4 bits 17 to 20, 2 to 5 dB more than with
integers of as many bits and a scale for each channel. A table for each 2048 weights would add 1 dB
at 4 bits and take a sixteenth more, which is no better than what more bits give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.errors import ModelError, UsageError
from graphopt.ir import Graph, Model, Node, Value
from graphopt.kernels.codebook import codebook, nearest
from graphopt.operators import QUANTIZERS

RULE: Final = "store-codebook"
LEAST: Final = 1024  # elements; of fewer little is saved
BITS: Final = (4, 8)
# What a layer multiplies or looks up, by operator; no biases, states or scales.
_SLOTS: Final[Mapping[str, frozenset[int]]] = {
    "Conv": frozenset({1}),
    "ConvTranspose": frozenset({1}),
    "Gather": frozenset({0}),
    "Gemm": frozenset({0, 1}),
    "GRU": frozenset({1, 2}),
    "LSTM": frozenset({1, 2}),
    "MatMul": frozenset({0, 1}),
    "RNN": frozenset({1, 2}),
}
_SINCE: Final = 6  # opset of a Cast that states its type as a number
_SINCE_FOUR: Final = 21  # opset that casts integers of 4 bits
_FRAME: Final = 220  # bytes of two nodes and two tensors around their data, but for names
_NAMES: Final = 10  # times that the weight's name is in those
_ZEROS: Final = 0.05  # share of zeros that are no accident, and stay zeros

Array = NDArray[Any]
Bits = Literal[4, 8]


@dataclass(frozen=True)
class CodebookWeights:
    """A float32 weight of a layer => Gather(table, Cast(indices)), the table of 2^bits floats.

    Weights of fewer than `least` elements stay, and those that would not be smaller. Makes files
    smaller: nothing is faster, as onnxruntime looks all weights up as it loads a model. Lossy: it
    cannot be proved.
    """

    name: ClassVar[str] = "codebook-weights"

    bits: int = 8
    least: int = LEAST

    def run(self, model: Model, edit: Editor) -> None:
        """Restate all weights that can be. Raises UsageError for bits that no table has."""
        if self.bits not in BITS:
            raise UsageError(f"codebook-weights: bits are 4 or 8, not {self.bits}")
        for value in coded_weights(model):
            reason = refusal(value, edit, self.bits, least=self.least)
            if reason is None:
                store_codebook(edit, value, self.bits)
            else:
                edit.rejections.append((RULE, value.name, reason))


@dataclass(frozen=True)
class CodebookRecipe:
    """Bits by weight. Tables follow from the weights: a recipe gives the same bytes each time."""

    bits: Mapping[str, Bits]

    def apply(self, base: Path, tables: Mapping[tuple[str, int], Array] | None = None) -> Model:
        """The model with these weights restated; `tables` are those that are known, by name and
        bits. Raises LookupError for weights that it does not have, ValueError for what cannot be.
        """
        model = Model.load(base)
        edit = Editor(model)
        found = [value for value in coded_weights(model) if value.name in self.bits]
        if missing := sorted(set(self.bits) - {value.name for value in found}):
            raise LookupError(f"the model has no weight {missing[0]!r} of a layer")
        for value in found:
            bits = self.bits[value.name]
            store_codebook(edit, value, bits, table=(tables or {}).get((value.name, bits)))
        edit.settle()
        return model

    def write(
        self, base: Path, target: Path, tables: Mapping[tuple[str, int], Array] | None = None
    ) -> None:
        """Write the model. Raises as `apply` does."""
        exporter.save(self.apply(base, tables), target)


def coded_weights(model: Model) -> Iterator[Value]:
    """Initializers, of bodies too, that a layer multiplies or looks up, in the file's order."""
    for graph in model.graphs():
        for value in list(graph.initializers):
            if any(_is_weight_of(value, node, model) for node in value.consumers):
                yield value


def refusal(value: Value, edit: Editor, bits: int, *, least: int = LEAST) -> str | None:
    """None where `store_codebook` takes the weight, else the reason why not."""
    found = weight_of(value, edit, bits, least=least)
    return found if isinstance(found, str) else None


def weight_of(value: Value, edit: Editor, bits: int, *, least: int = LEAST) -> Array | str:
    """The numbers of a weight that `store_codebook` takes, or why it does not."""
    if (reason := no_bits(edit.model, bits)) is not None:
        return reason
    weight = value.constant
    if weight is None or value.producer is not None:
        return "it is no initializer, or a caller may replace it"
    if weight.is_sparse:
        return "it is sparse"
    if weight.data_type != onnx.TensorProto.FLOAT:
        return f"it is {onnx.TensorProto.DataType.Name(weight.data_type).lower()}"
    if weight.size < least:
        return f"it has fewer than {least} elements"
    if value.is_output or value in value.graph.pinned:
        return "it is an output, or annotations name it"
    if any(reader.op in QUANTIZERS for reader in value.consumers):
        return "it is quantized, or holds scales"
    try:
        array: Array = weight.values
    except ModelError:
        return "the model has no weights"
    if not np.isfinite(array).all():
        return "it is not finite"
    return _too_large(value.name, array, bits) or array


def no_bits(model: Model, bits: int) -> str | None:
    """Why a model cannot have indices of so many bits; None where it can."""
    opset = model.opsets.get("", 1)
    if model.graph.inputs_are_frozen:
        return "this IR version wants every initializer among the inputs"
    if bits == 4 and opset < _SINCE_FOUR:
        return f"4 bits take opset {_SINCE_FOUR}, not {opset}"
    return f"it takes opset {_SINCE}" if opset < _SINCE else None


def table_of(array: Array, bits: int) -> NDArray[np.float32]:
    """The table of a weight; zeros that are no accident keep an entry of their own."""
    return codebook(array, 1 << bits, keep_zero=_has_zeros(array)).table


def store_codebook(
    edit: Editor, value: Value, bits: int, *, table: Array | None = None, least: int = 1
) -> bool:
    """Store a weight as indices into a table; False where that change is not allowed.

    The weight keeps its name, and with it all that read it. `table`, ascending float32, stands for
    that of `table_of`. Raises ValueError for a weight that `refusal` has a reason against.
    """
    array = weight_of(value, edit, bits, least=least)
    if isinstance(array, str):
        raise ValueError(f"{value.name!r} cannot be a table of {1 << bits} numbers: {array}")
    if not edit.allows(RULE, value.name):
        return False
    used = table_of(array, bits) if table is None else np.asarray(table, np.float32)
    _restate(edit, value, used, nearest(array, used), bits)
    return True


def _is_weight_of(value: Value, node: Node, model: Model) -> bool:
    if node.domain:
        return False
    if node.op == "Transpose":  # of weights as they are stored
        turned = node.outputs[0]
        readers = turned.consumers if turned is not None else ()
        return any(not reader.domain and turned in _read(reader) for reader in readers)
    if node.op == "Gather" and _is_settled(node.inputs[1], model):
        return False  # a part of a constant, or such a table
    return value in _read(node)


def _read(node: Node) -> list[Value | None]:
    """What a node multiplies by, or looks up."""
    slots = _SLOTS.get(node.op, frozenset())
    return [value for slot, value in enumerate(node.inputs) if slot in slots and value is not None]


def _is_settled(indices: Value | None, model: Model) -> bool:
    """True where indices are constant, though they may be stored as another type."""
    cast = indices.producer if indices is not None else None
    if cast is not None and cast.op == "Cast" and not cast.domain:
        indices = cast.inputs[0]
    return constant_of(indices, model.store) is not None


def _has_zeros(array: Array) -> bool:
    return bool(np.count_nonzero(array) < (1 - _ZEROS) * array.size)


def _too_large(name: str, array: Array, bits: int) -> str | None:
    """Why a table and indices would save nothing."""
    stored = array.size * bits / 8 + (4 << bits) + _FRAME + _NAMES * len(name.encode())
    if stored >= array.nbytes:
        return "it would not be smaller"
    index_bytes = max(1, -(-(array.size - 1).bit_length() // 7))  # as varints, at most
    if np.count_nonzero(array) * (array.itemsize + index_bytes) <= stored:
        return "it is smaller as a sparse tensor"
    return None


def _restate(edit: Editor, value: Value, table: Array, indices: Array, bits: int) -> None:
    """Let Gather compute what was an initializer; it keeps its name, its readers change hands."""
    graph, name, known = value.graph, value.name, edit.types[value]
    assert known is not None
    readers = [
        (node, slot)
        for node in list(value.consumers)
        for slot, read in enumerate(node.inputs)
        if read is value
    ]
    for node, slot in readers:
        edit.set_input(node, slot, None)
    edit.remove_value(value)
    stored = indices if bits == 8 else indices.astype(ml_dtypes.uint4)
    looked_up = _constant(edit, graph, f"{name}/table", table)
    coded = _constant(edit, graph, f"{name}/indices", stored)
    wide = _add(
        edit, graph, "Cast", [coded], edit.unique(f"{name}/wide"), to=onnx.TensorProto.INT32
    )
    made = _add(edit, graph, "Gather", [looked_up, wide], name)
    for node, slot in readers:
        edit.set_input(node, slot, made)
    edit.types[made] = known
    after = f"{name} = Gather({looked_up.name} [{len(table)}], {coded.name} uint{bits})"
    edit.record(RULE, name, f"{name} = {known}", after)


def _constant(edit: Editor, graph: Graph, base: str, array: Array) -> Value:
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), edit.unique(base))
    return edit.add_constant(graph, tensor.name, tensor, -1.0)


def _add(
    edit: Editor, graph: Graph, op: str, inputs: list[Value], output: str, **attributes: Any
) -> Value:
    read = [value.name for value in inputs]
    label = edit.unique(f"{output}/{op}")
    proto = onnx.helper.make_node(op, read, [output], label, **attributes)
    known = dict(zip(read, inputs, strict=True))
    edit.add_node(graph, proto, known, {}, -1.0, RULE)
    return known[output]
