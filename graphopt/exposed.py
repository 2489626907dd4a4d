"""Values inside a model as further outputs, so that a run returns them.

An exposed value keeps its name and its meaning: onnxruntime may fuse around an output, never over
it. Values in the bodies of If, Loop and Scan are out of reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import onnx

from graphopt import exporter, output
from graphopt.errors import RuntimeFailure, UsageError
from graphopt.ir import Model, Weight
from graphopt.runtime import Array, Feed, Level, Port, Session, limits

# Not "default": its blocked layouts must be undone for every value that is read, which is no
# faster where many are. With all of a model's values exposed, "extended" gives the very numbers
# of "off".
LEVEL: Final[Level] = "extended"


def write_exposed(
    model: Model,
    path: Path,
    exposed: Iterable[str] = (),
    external: output.ExternalPolicy = "auto",
) -> Path:
    """Write the model as onnxruntime reads it, values inside it as further outputs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(exporter.to_hollow(model))
    proto.ir_version = min(proto.ir_version, limits().ir)
    _expose(proto.graph, exposed)
    return output.write(proto, model.store, path, external)[0]


class Exposure:
    """Values of a model, feed by feed, so many bytes of them at a time.

    Names may be those of inputs, outputs, constants and all that the main graph computes.
    `written` is the model by `write_exposed` with external weights, which sessions map and share.
    `refused` says of every value that cannot be had why: what lies in a body, and what is no
    tensor of floats (of numbers, where it is an input). Raises UsageError for a name that the
    model does not have, RuntimeFailure if onnxruntime refuses the model itself.
    """

    def __init__(
        self,
        model: Model,
        written: Path,
        names: Sequence[str],
        *,
        budget: int,
        threads: int = 0,
        custom_ops: Sequence[Path] = (),
    ) -> None:
        self.refused: dict[str, str] = {}
        self._written = written
        self._budget = budget
        self._threads = threads
        self._custom_ops = custom_ops
        self._constants: dict[str, Weight] = {}
        self._inputs: dict[str, Weight | None] = {}  # with the default, where there is one
        self._item_bytes: dict[str, int] = {}  # of what is computed
        self._groups: list[list[str]] | None = None  # of names, one for each run of a feed
        self._session: Session | None = None  # of the only group
        computed = self._sort(model, names)
        if computed:
            self._open([]).close()  # a model that does not load is no fault of any value
        for name, port in self._ports(computed).items():
            if port.dtype is not None and ("float" in port.type or "double" in port.type):
                self._item_bytes[name] = port.dtype.itemsize
            else:
                self.refused[name] = f"its type is {port.type}"

    def constants(self) -> Iterator[tuple[str, Array]]:
        """The constants among the values: the same whatever the feed."""
        for name, weight in self._constants.items():
            yield name, weight.values

    def values(self, feed: Feed) -> Iterator[tuple[str, Array]]:
        """Inputs and what is computed of one feed; optional values left empty are left out.

        What was handed out is not kept: at most `budget` bytes are held, or one value. The sizes
        of the first feed decide how the values are split over several runs, each of which then
        loads the model anew.
        """
        for name, weight in self._inputs.items():
            given = feed.get(name, None if weight is None else weight.values)
            if given is None:
                continue
            if isinstance(given, list) or np.asarray(given).dtype.kind in "OUS":
                self.refused[name] = "it is no tensor of numbers"
            else:
                yield name, np.asarray(given)
        if self._groups is None:
            self._groups = self._planned(feed)
        for names in self._groups:
            found = self._run(feed, names)
            for name in names:
                if (value := found.pop(name)) is not None:
                    yield name, value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            self._session.close()

    def _sort(self, model: Model, names: Sequence[str]) -> list[str]:
        """Tell inputs and constants from what is computed, and refuse what cannot be had."""
        inner = {name for graph in model.graphs() if graph.owner for name in graph.values}
        computed = []
        for name in names:
            value = model.graph.values.get(name)
            if value is None and name not in inner:
                raise UsageError(f"{model.label}: there is no value {name!r} to observe")
            if value is None:
                self.refused[name] = "it lies in the body of an If, Loop or Scan"
            elif value.is_input and value.constant is None:
                self._inputs[name] = value.weight
            elif value.weight is None:
                computed.append(name)
            elif value.weight.is_float:
                self._constants[name] = value.weight
            else:
                kind = onnx.TensorProto.DataType.Name(value.weight.data_type)
                self.refused[name] = f"it is a constant of type {kind.lower()}"
        return computed

    # -- sessions ------------------------------------------------------------------------------

    def _ports(self, names: list[str]) -> dict[str, Port]:
        """What onnxruntime declares of the values; those that cannot be outputs are refused."""
        if not names:
            return {}
        try:
            with self._open(names) as session:
                ports = {port.name: port for port in session.outputs}
        except RuntimeFailure as failure:
            if len(names) == 1:
                self.refused[names[0]] = f"it cannot be an output: {failure}"
                return {}
            half = len(names) // 2
            return self._ports(names[:half]) | self._ports(names[half:])
        return {name: ports[name] for name in names}

    def _run(self, feed: Feed, names: list[str]) -> dict[str, Any]:
        # Of several sessions only one is ever open: each keeps in its arena all that it gave out,
        # and its own packed weights, which would add up to what the budget is there to avoid.
        if self._groups != [names]:
            with self._open(names) as session:
                return session.run(feed, names)
        if self._session is None:
            self._session = self._open(names)
        return self._session.run(feed, names)

    def _planned(self, feed: Feed) -> list[list[str]]:
        """The values in groups, each as many as the budget holds on this feed."""
        groups: list[list[str]] = []
        room = 0
        for name, size in self._sizes(feed).items():
            if not groups or size > room:
                groups.append([])
                room = self._budget
            groups[-1].append(name)
            room -= size
        return groups

    def _sizes(self, feed: Feed) -> dict[str, int]:
        """Bytes of the values on a feed, found without holding them: only shapes are outputs."""
        if not self._item_bytes:
            return {}
        proto = self._proto()
        shapes = _add_shapes(proto, list(self._item_bytes))
        with self._load(proto) as session:
            found = session.run(feed, list(shapes.values()))
        return {
            name: self._item_bytes[name] * math.prod(found[shape].tolist())
            for name, shape in shapes.items()
        }

    def _open(self, names: Sequence[str]) -> Session:
        proto = self._proto()
        _expose(proto.graph, names)
        return self._load(proto)

    def _proto(self) -> onnx.ModelProto:
        return onnx.load(self._written, load_external_data=False)

    def _load(self, proto: onnx.ModelProto) -> Session:
        return Session(
            proto.SerializeToString(),
            folder=self._written.parent,
            optimizations=LEVEL,
            threads=self._threads,
            custom_ops=self._custom_ops,
        )


def _expose(graph: onnx.GraphProto, names: Iterable[str]) -> None:
    present = {info.name for info in graph.output}
    for name in names:
        if name not in present:
            graph.output.add(name=name)


def _add_shapes(proto: onnx.ModelProto, names: Sequence[str]) -> dict[str, str]:
    """Make the shapes of values outputs (int64 vectors); which output is the shape of which."""
    graph = proto.graph
    taken = {name for node in graph.node for name in node.output}
    taken.update(info.name for info in graph.input)
    taken.update(tensor.name for tensor in graph.initializer)
    shapes = {}
    for name in names:
        shape = f"{name}.shape"
        while shape in taken:
            shape += "'"
        taken.add(shape)
        graph.node.add(op_type="Shape", input=[name], output=[shape])
        shapes[name] = shape
    _expose(graph, shapes.values())
    return shapes
