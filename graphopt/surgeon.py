"""onnx-graphsurgeon in and out: scripts written for it run as passes. The only importer of it.

graphsurgeon's own round trip loses node documentation and metadata, the model's metadata and
version, quantization annotations, attributes of several kinds, and inputs that have a default.
Here whatever a script leaves alone is written back from the original protos, and weights stay
byte ranges of the file until the script asks for their values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import Message
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphopt import exporter
from graphopt.errors import ModelError
from graphopt.importer import build
from graphopt.ir import Model
from graphopt.storage import Store

Script = Callable[[Any], Any]
"""Edits the `onnx_graphsurgeon.Graph` it is given, or returns another one."""

_Proto = TypeVar("_Proto", bound=Message)


def operate(model: Model, script: Script) -> Model:
    """The model after a graphsurgeon script; `model` itself is left as it was.

    Raises ModelError where graphsurgeon cannot hold the model (optional and sequence types of
    some kinds) or the script leaves a broken graph; what the script raises passes through.
    """
    original = onnx.ModelProto()
    original.CopyFrom(exporter.to_hollow(model))
    with _quiet():
        graph, baseline = _import(original, model)
        result = script(graph)
        exported = gs.export_onnx(graph if result is None else result)
    return build(_restored(original, baseline, exported), model.store, model.label)


class _StoredValues(LazyValues):  # type: ignore[misc]  # graphsurgeon has no types
    """Values that come from the store when a script first reads them."""

    def __init__(self, tensor: onnx.TensorProto, store: Store) -> None:
        super().__init__(tensor)
        self._store = store

    def load(self) -> Any:
        return self._store.array(self.tensor).copy()


def _import(proto: onnx.ModelProto, model: Model) -> tuple[Any, onnx.ModelProto]:
    """The graph for the script, and what graphsurgeon writes where nobody edits it."""
    copy = onnx.ModelProto()  # graphsurgeon renames tensors in the protos that it was given
    copy.CopyFrom(proto)
    try:
        graph = gs.import_onnx(copy)
        baseline = onnx.ModelProto.FromString(gs.export_onnx(graph).SerializeToString())
    except Exception as error:  # it raises whatever its internals run into
        raise ModelError(
            f"{model.label}: onnx-graphsurgeon cannot hold this model: {error}"
        ) from None
    for part in (graph, *graph.subgraphs(recursive=True)):
        for tensor in _constants(part):
            if isinstance(tensor._values, LazyValues) and isinstance(
                tensor._values.tensor, onnx.TensorProto
            ):
                tensor._values = _StoredValues(tensor._values.tensor, model.store)
                tensor.data_location = None  # true of the hollow tensor, not of new values
    return graph, baseline


def _constants(graph: Any) -> Iterator[Any]:
    yield from (t for t in graph.tensors().values() if isinstance(t, gs.Constant))
    for node in graph.nodes:
        yield from (value for value in node.attrs.values() if isinstance(value, gs.Constant))


def _restored(
    original: onnx.ModelProto, baseline: onnx.ModelProto, exported: onnx.ModelProto
) -> onnx.ModelProto:
    """`exported`, with what equals the untouched `baseline` taken from the original instead."""
    proto = onnx.ModelProto()
    proto.CopyFrom(original)
    before, plain, after = original.graph, baseline.graph, exported.graph
    for field in ("node", "initializer", "sparse_initializer", "value_info", "input", "output"):
        proto.graph.ClearField(field)
    proto.graph.node.extend(_same(before.node, plain.node, after.node))
    proto.graph.initializer.extend(after.initializer)
    proto.graph.sparse_initializer.extend(after.sparse_initializer)
    names = {tensor.name for tensor in after.initializer}
    names |= {tensor.values.name for tensor in after.sparse_initializer}
    alive = names | {name for node in after.node for name in node.output}
    for field, kept in (("input", names), ("output", set()), ("value_info", alive)):
        infos = _merged(getattr(before, field), getattr(plain, field), getattr(after, field), kept)
        getattr(proto.graph, field).extend(infos)
    for field in ("functions", "opset_import"):
        if list(getattr(exported, field)) != list(getattr(baseline, field)):
            proto.ClearField(field)
            getattr(proto, field).extend(getattr(exported, field))
    return proto


def _same(
    before: Iterable[_Proto], plain: Iterable[_Proto], after: Iterable[_Proto]
) -> Iterator[_Proto]:
    """`after`, each element that the script left alone as it was `before`."""
    known = {
        other.SerializeToString(deterministic=True): proto
        for proto, other in zip(before, plain, strict=True)
    }
    return (known.get(node.SerializeToString(deterministic=True), node) for node in after)


def _merged(
    before: Iterable[onnx.ValueInfoProto],
    plain: Iterable[onnx.ValueInfoProto],
    after: Iterable[onnx.ValueInfoProto],
    kept: set[str],
) -> Iterator[onnx.ValueInfoProto]:
    """`after` with what the script left alone as it was, and those `kept` that graphsurgeon lost.

    Those are inputs with a default, which graphsurgeon takes for mere initializers, and types it
    does not write.
    """
    originals = {info.name: info for info in before}
    known = {info.name: info for info in plain}
    found = {info.name: info for info in after}
    for name, info in originals.items():
        if name not in found:
            if name in kept:
                yield info
        elif known.get(name) == found[name]:
            yield info
        else:
            yield found[name]
    yield from (info for name, info in found.items() if name not in originals)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """graphsurgeon prints its warnings to stdout, where a report may be on its way."""
    logger = gs.logger.G_LOGGER
    severity = logger.severity
    logger.severity = logger.CRITICAL
    try:
        yield
    finally:
        logger.severity = severity
