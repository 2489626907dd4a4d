"""A copy of a model whose nodes can be told again in the graph that onnxruntime makes of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import onnx
from google.protobuf.message import DecodeError

from graphopt.errors import ModelError, RuntimeFailure
from graphopt.executed import Executed
from graphopt.exposed import write_exposed
from graphopt.ir import Model, Node
from graphopt.runtime import Level, Session

_MARK: Final = re.compile(r"@(\d+)@")
_BESIDE: Final = {  # so that models over 2 GB can be written, and only structure is parsed
    "session.optimized_model_external_initializers_file_name": "weights",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


class MarkedCopy:
    """A copy of a model, in a temporary folder, in which every node is called by its number.

    `source` is a path, or the bytes of a ModelProto with external data in `folder`; `file` is the
    copy. Takes disk space of the model's size, and of as much again while it is being optimised.
    Raises ModelError for what is no model.
    """

    def __init__(self, source: Path | bytes, folder: Path | None = None) -> None:
        if isinstance(source, bytes):
            try:
                proto = onnx.ModelProto.FromString(source)
            except DecodeError as error:
                raise ModelError(f"not an ONNX model: {error}") from None
            self.model = Model.load(proto, folder)
        else:
            self.model = Model.load(source)
        self.nodes = list(self.model.nodes())
        self._names = {node: node.name or node.label for node in self.nodes}
        for number, node in enumerate(self.nodes):
            node.proto.name = f"@{number}@"
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        self.file = write_exposed(self.model, Path(self._folder.name) / "marked.onnx")

    def find(self, name: str) -> list[Node]:
        """The nodes whose marks a name is made of."""
        numbers = (int(number) for number in _MARK.findall(name))
        return [self.nodes[number] for number in numbers if number < len(self.nodes)]

    def unmarked(self, failure: RuntimeFailure) -> RuntimeFailure:
        """What onnxruntime said, with the names of the model."""
        said = str(failure).replace(str(self.file), self.model.label)
        found = {node: node.proto.name for node in self.find(said)}
        for node, mark in found.items():
            said = said.replace(mark, self._names[node])
        return RuntimeFailure(said)

    def executed(
        self,
        *,
        optimizations: Level = "default",
        threads: int = 0,
        custom_ops: Sequence[Path] = (),
    ) -> Executed:
        """The graph after onnxruntime's optimisations. Raises RuntimeFailure if it refuses."""
        file = self.file.with_name("optimized.onnx")
        try:
            Session(
                self.file,
                optimizations=optimizations,
                threads=threads,
                custom_ops=custom_ops,
                optimized_model=file,
                config=_BESIDE,
            ).close()
        except RuntimeFailure as failure:
            raise self.unmarked(failure) from failure
        return Executed(self.model, Model.load(file), self.find)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.cleanup()
