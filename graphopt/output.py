"""Writing: hollow models streamed to disk, and targets that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

import onnx
from google.protobuf.message import DecodeError

from graphopt import wire
from graphopt.errors import ModelError, OutputError
from graphopt.sources import MemorySource, write_all
from graphopt.storage import Store, StoredRange, contains, positions

ExternalPolicy = Literal["auto", "always", "never"]
PROTO_LIMIT: Final = 2**31 - 1  # bytes that protobuf can parse as one message
_SMALL_COPY: Final = 1 << 16  # below, one buffered write is cheaper than a copy in the kernel
_BUFFER: Final = 1 << 20
# Large tensors start on a page so that a runtime can map them, as onnxruntime's own writer does.
_PAGE: Final = 4096
_ALIGN_OVER: Final = 1 << 20


def write(
    model: onnx.ModelProto, store: Store, path: Path, external: ExternalPolicy = "auto"
) -> list[Path]:
    """Write a hollow model to `path`, its weights streamed from where they are; returns the files.

    With "auto" a tensor lies inside or beside the model as it did in the input, and all go beside
    it where the model would exceed protobuf's 2 GB. External tensors share one file, `path` with
    ".data" appended. Raises OSError as the file system does, ModelError over 2 GB with "never".
    """
    if external == "always":
        outside = _initializer_indices(model, store)
    elif external == "auto":
        outside = {i for i in _initializer_indices(model, store) if store[i].external}
    else:
        outside = set()
    pieces, data = _expand(model, store, outside, path.name + ".data")
    if wire.size(pieces) > PROTO_LIMIT:
        if external == "never":
            raise ModelError(
                f"{path}: the model has {wire.size(pieces):,} bytes, over the 2 GB that one file "
                "can hold; let weights be external"
            )
        outside = _initializer_indices(model, store)
        pieces, data = _expand(model, store, outside, path.name + ".data")
        if wire.size(pieces) > PROTO_LIMIT:
            raise ModelError(f"{path}: over 2 GB even with all initializers external")
    written = []
    if data.ranges:
        beside = path.with_name(path.name + ".data")
        _stream(beside, list(data.pieces()), store)
        written.append(beside)
    _stream(path, pieces, store)
    return [path, *written]


def serialize(model: onnx.ModelProto, store: Store) -> onnx.ModelProto:
    """The full ModelProto in memory. Raises ModelError where it would exceed 2 GB."""
    pieces, _ = _expand(model, store, set(), "")
    if wire.size(pieces) > PROTO_LIMIT:
        raise ModelError("the model exceeds the 2 GB of one ModelProto; save it to a file instead")
    content = []
    for piece in pieces:
        if isinstance(piece, wire.Payload):
            stored = store[piece.place]
            content.append(stored.source.view(stored.offset, stored.length).tobytes())
        else:
            content.append(_bytes(piece))
    try:
        return onnx.ModelProto.FromString(b"".join(content))
    except DecodeError:
        raise ModelError("the data of a tensor is malformed") from None


class _ExternalFile:
    """Layout of the file of external tensors: a range used twice lies there once."""

    def __init__(self, store: Store, location: str) -> None:
        self.location = location
        self.ranges: dict[int, int] = {}  # store index -> offset, in file order
        self._store = store
        self._end = 0

    def place(self, index: int) -> int:
        """Offset of the range in the file."""
        if index not in self.ranges:
            length = self._store[index].length
            align = _PAGE if length >= _ALIGN_OVER else 1
            self._end += -self._end % align
            self.ranges[index] = self._end
            self._end += length
        return self.ranges[index]

    def pieces(self) -> Iterator[wire.Piece]:
        at = 0
        for index, offset in self.ranges.items():
            if offset > at:
                yield bytes(offset - at)
            yield wire.Payload(index, self._store[index].length)
            at = offset + self._store[index].length


def _initializer_indices(model: onnx.ModelProto, store: Store) -> set[int]:
    """Ranges of initializers, bodies included: the tensors that runtimes read from other files."""
    found: set[int] = set()

    def visit(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if (index := store.reference(tensor)) is not None:
                found.add(index)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    visit(attribute.g)
                for body in attribute.graphs:
                    visit(body)

    visit(model.graph)
    return found


def _expand(
    model: onnx.ModelProto, store: Store, outside: set[int], location: str
) -> tuple[list[wire.Piece], _ExternalFile]:
    """The bytes of the full model as pieces, and the layout of what goes outside."""
    data = model.SerializeToString()
    layout = _ExternalFile(store, location)

    def tensor(buffer: wire.Buffer, start: int, end: int) -> Sequence[wire.Piece] | None:
        proto = onnx.TensorProto.FromString(buffer[start:end])
        index = store.reference(proto)
        if index is None:
            return None
        if index in outside:
            return [_external_tensor(proto, index, store, layout)]
        fields = wire.fields(buffer, start, end)
        return _inline_tensor(buffer, fields, index, store)

    places = positions(data, store.key.encode())
    pieces = wire.rewrite(data, wire.MODEL, contains(places), tensor)
    return [_materialise(piece, data) for piece in pieces], layout


def _materialise(piece: wire.Piece, data: bytes) -> wire.Piece:
    if isinstance(piece, wire.Slice):
        return data[piece.offset : piece.offset + piece.length]
    return piece


def _bytes(piece: wire.Piece) -> bytes:
    if not isinstance(piece, bytes):
        raise TypeError(f"{piece} was not materialised")
    return piece


def _inline_tensor(
    buffer: wire.Buffer, fields: list[wire.Field], index: int, store: Store
) -> list[wire.Piece]:
    """The tensor's fields with its data back, in the order of field numbers as protobuf writes."""
    stored, key = store[index], store.key.encode()
    content: list[wire.Piece] = [
        wire.header(stored.field, stored.length),
        wire.Payload(index, stored.length),
    ]
    pieces: list[wire.Piece] = []
    placed = False
    for field in fields:
        if field.number == wire.EXTERNAL_DATA and key in buffer[field.value : field.end]:
            continue
        if field.number > stored.field and not placed:
            pieces.extend(content)
            placed = True
        if field.number == wire.DATA_LOCATION:
            if stored.explicit_default:
                pieces.append(wire.varint(wire.DATA_LOCATION << 3) + b"\x00")
        else:
            pieces.append(buffer[field.start : field.end])
    return pieces if placed else pieces + content


def _external_tensor(
    proto: onnx.TensorProto, index: int, store: Store, layout: _ExternalFile
) -> bytes:
    """The tensor as a reference to the external file, whose data must be the flat array."""
    stored = store[index]
    if not stored.flat(proto.data_type):
        packed = bytes(onnx.numpy_helper.from_array(store.array(proto)).raw_data)
        index = store.add(StoredRange(MemorySource(packed), 0, len(packed), external=True))
        stored = store[index]
    del proto.external_data[:]
    entries = {
        "location": layout.location,
        "offset": str(layout.place(index)),
        "length": str(stored.length),
    }
    for key, value in entries.items():
        proto.external_data.add(key=key, value=value)
    proto.data_location = onnx.TensorProto.EXTERNAL
    return proto.SerializeToString()


def _stream(path: Path, pieces: Sequence[wire.Piece], store: Store) -> None:
    """Write the pieces, small ones gathered; large ranges go from file to file in the kernel."""
    pending = bytearray()
    with path.open("wb", buffering=0) as stream:
        descriptor = stream.fileno()
        _reserve(descriptor, wire.size(pieces))
        for piece in pieces:
            if isinstance(piece, wire.Payload) and piece.length > _SMALL_COPY:
                write_all(descriptor, pending)
                pending = bytearray()
                stored = store[piece.place]
                stored.source.copy_to(descriptor, stored.offset, stored.length)
                continue
            if isinstance(piece, wire.Payload):
                stored = store[piece.place]
                pending += stored.source.view(stored.offset, stored.length).tobytes()
            else:
                pending += _bytes(piece)
            if len(pending) > _BUFFER:
                write_all(descriptor, pending)
                pending = bytearray()
        write_all(descriptor, pending)
        os.fsync(descriptor)


def _reserve(descriptor: int, length: int) -> None:
    """Find the room first: a full disk shows at once, and writing takes a quarter less time."""
    if length < _BUFFER or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


class Target:
    """A path that gets its new content at `commit`, whole, or keeps what it has.

    Files are made in a hidden folder beside the target, so that moving them is a rename on one
    file system. As a context manager: what was not committed is removed, whatever happened.
    """

    def __init__(self, path: Path) -> None:
        with output_errors(path):
            self.path = _behind_links(path)
            if self.path.exists() and not self.path.is_file():
                kind = "a directory" if self.path.is_dir() else "not a regular file"
                raise OutputError(f"{path}: cannot be written: it is {kind}")
            if self.path.exists() and not os.access(self.path, os.W_OK):
                raise OutputError(f"{path}: cannot be written: the file is read-only")
            self._staging = self.path.parent / f".graphopt-{secrets.token_hex(4)}.tmp"
            self._staging.mkdir()
        self.staged = self._staging / self.path.name

    def commit(self, files: Sequence[Path]) -> list[Path]:
        """Move staged files into place, the model last: it is the name that people open.

        Files beside it step aside first, and come back if the model cannot be replaced after all:
        nobody must ever read old weights with a new model, or the reverse.
        """
        final_paths = [self.path.with_name(staged.name) for staged in files]
        with output_errors(self.path):
            placed: list[tuple[Path, Path | None]] = []
            try:
                for staged in sorted(files, key=lambda file: file.name == self.path.name):
                    final = self.path.with_name(staged.name)
                    backup = None
                    if final.exists():
                        shutil.copymode(final, staged)
                        if final != self.path:
                            backup = self._staging / f"{staged.name}.before"
                            final.replace(backup)
                    placed.append((final, backup))
                    staged.replace(final)
            except BaseException:
                for final, backup in placed:
                    if backup is not None:
                        backup.replace(final)
                    elif final != self.path:
                        final.unlink(missing_ok=True)
                raise
            _sync_directory(self.path.parent)
        return final_paths

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)


def _behind_links(path: Path) -> Path:
    """The file that a symbolic link leads to, the path itself where it is none."""
    if not path.is_symlink():
        return path
    with contextlib.suppress(RuntimeError):  # how pathlib reported a loop before Python 3.13
        path = path.resolve()
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return path


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into one line about the target."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written: {reason}") from None


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
