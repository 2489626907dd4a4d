"""ONNX files as bytes: weights stay byte ranges of the file they came from until a pass reads them.

`read` gives a hollow ModelProto, in which every tensor over 1 KB is a reference into a `Store`,
and `write` streams the ranges into the output. Nothing in between parses, copies or hashes a
weight that nobody asked for. In a hollow tensor the reference stands as an `external_data` entry
whose key is the store's own, so that no content of a file can be mistaken for one.
"""

from __future__ import annotations

import bisect
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray

from graphopt import wire
from graphopt.errors import ModelError
from graphopt.sources import FileSource, MemorySource, Source, shown

HOLLOW_OVER: Final = 1024  # bytes; smaller tensors stay in the proto (shapes, scales, axes)
_LOCATION_ENTRY: Final = b"\x0a\x08location"  # how an external_data entry with that key starts
_EXTERNAL: Final = wire.varint(wire.DATA_LOCATION << 3) + b"\x01"

_FLAT_TYPES: Final = {
    wire.FLOAT_DATA: (onnx.TensorProto.FLOAT, onnx.TensorProto.COMPLEX64),
    wire.DOUBLE_DATA: (onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX128),
}


@dataclass(frozen=True, slots=True)
class StoredRange:
    """Where one tensor's data lies and how it is encoded there."""

    source: Source
    offset: int
    length: int
    field: int = wire.RAW_DATA  # the TensorProto field whose content this is
    external: bool = False  # it came from a file beside the model
    explicit_default: bool = False  # the tensor said data_location = DEFAULT in so many words

    def flat(self, data_type: int) -> bool:
        """True where the bytes are the little-endian array itself."""
        return self.field == wire.RAW_DATA or data_type in _FLAT_TYPES.get(self.field, ())


class Store:
    """The byte ranges that hollow tensors refer to."""

    def __init__(self) -> None:
        self.key = f"graphopt-{secrets.token_hex(8)}"
        self._ranges: list[StoredRange] = []

    def __getitem__(self, index: int) -> StoredRange:
        return self._ranges[index]

    def add(self, stored: StoredRange) -> int:
        """Keep a range; the index is what a hollow tensor carries."""
        self._ranges.append(stored)
        return len(self._ranges) - 1

    def files(self) -> list[Path]:
        """The files beside the model that external data came from."""
        sources = {id(r.source): r.source for r in self._ranges if r.external}
        return [source.path for source in sources.values() if isinstance(source, FileSource)]

    def reference(self, tensor: onnx.TensorProto) -> int | None:
        """Index of the range that a hollow tensor refers to, None for a tensor with its data."""
        for entry in tensor.external_data:
            if entry.key == self.key:
                return int(entry.value)
        return None

    def refer(self, tensor: onnx.TensorProto, index: int) -> None:
        """Make `tensor` a hollow one that refers to the range."""
        for name in ("raw_data", "external_data", "float_data", "double_data"):
            tensor.ClearField(name)
        for name in ("int32_data", "int64_data", "uint64_data"):
            tensor.ClearField(name)
        tensor.external_data.add(key=self.key, value=str(index))
        tensor.data_location = onnx.TensorProto.EXTERNAL

    def kept(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """The tensor, its data moved into the store where it is large."""
        if len(tensor.raw_data) <= HOLLOW_OVER:
            return tensor
        data = tensor.raw_data
        hollow = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        self.refer(hollow, self.add(StoredRange(MemorySource(data), 0, len(data))))
        return hollow

    def marker(self, index: int) -> bytes:
        """The reference as the `external_data` field of a hollow tensor, in wire format."""
        key, value = self.key.encode(), str(index).encode()
        entry = wire.header(1, len(key)) + key + wire.header(2, len(value)) + value
        return wire.header(wire.EXTERNAL_DATA, len(entry)) + entry

    def full(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """A copy of the tensor that holds its data, in the encoding it had in its file."""
        index = self.reference(tensor)
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        if index is None:
            return copy
        stored = self._ranges[index]
        entries = [entry for entry in tensor.external_data if entry.key != self.key]
        copy.ClearField("external_data")
        copy.external_data.extend(entries)
        copy.ClearField("data_location")
        if stored.explicit_default:
            copy.data_location = onnx.TensorProto.DEFAULT
        if stored.field == wire.RAW_DATA:
            copy.raw_data = stored.source.view(stored.offset, stored.length).tobytes()
        else:
            content = stored.source.view(stored.offset, stored.length).tobytes()
            copy.MergeFromString(wire.header(stored.field, stored.length) + content)
        return copy

    def array(self, tensor: onnx.TensorProto) -> NDArray[np.generic]:
        """The tensor's values; a read-only view of the file where the encoding allows it.

        Raises ModelError where the data does not fit type and shape.
        """
        index = self.reference(tensor)
        if index is None and tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(f"tensor {tensor.name!r} does not say where its data is")
        if index is not None and self._ranges[index].flat(tensor.data_type):
            stored = self._ranges[index]
            dtype = _dtype(tensor.data_type)
            shape = tuple(tensor.dims)
            if stored.length == dtype.itemsize * math.prod(shape) and min(shape, default=0) >= 0:
                data = stored.source.view(stored.offset, stored.length)
                return data.view(dtype).reshape(shape)
        try:
            values: NDArray[np.generic] = onnx.numpy_helper.to_array(self.full(tensor))
        except (ValueError, TypeError, KeyError, OverflowError, DecodeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"tensor {tensor.name!r} cannot be decoded: {reason}") from None
        return values

    def listed(self, array: NDArray[Any]) -> onnx.TensorProto:
        """A float32, float64 or int64 tensor [n] in the field of its type, not as raw data.

        Floats take the same bytes there; integers are varints, 1 byte below 2^7, 2 below 2^14.
        """
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = onnx.TensorProto(data_type=kind, dims=array.shape)
        if kind == onnx.TensorProto.INT64:
            content = onnx.TensorProto(int64_data=array.tolist()).SerializeToString()
        else:
            field = next(f for f, kinds in _FLAT_TYPES.items() if kind in kinds)
            content = wire.header(field, array.nbytes) + array.tobytes()
        if len(content) <= HOLLOW_OVER:
            tensor.MergeFromString(content)
            return tensor
        (data,) = wire.fields(content, 0, len(content))
        stored = StoredRange(MemorySource(content), data.value, data.end - data.value, data.number)
        self.refer(tensor, self.add(stored))
        return tensor

    def stored_bytes(self, tensor: onnx.TensorProto) -> int:
        """Bytes that the tensor's data takes as it is encoded."""
        if (index := self.reference(tensor)) is not None:
            return self._ranges[index].length
        if tensor.int64_data:
            return onnx.TensorProto(int64_data=tensor.int64_data).ByteSize()
        return tensor_bytes(tensor.data_type, tensor.dims)

    def data_bytes(self, tensor: onnx.TensorProto) -> int | None:
        """Bytes that the tensor's data has as a flat array; None where there is no data (a
        weightless model), where only decoding would tell, and for strings."""
        if (index := self.reference(tensor)) is not None:
            stored = self._ranges[index]
            return stored.length if stored.flat(tensor.data_type) else None
        if tensor.HasField("raw_data"):
            return len(tensor.raw_data)
        if tensor.float_data or tensor.double_data:
            return 4 * len(tensor.float_data) + 8 * len(tensor.double_data)
        numbers = len(tensor.int32_data) or len(tensor.int64_data) or len(tensor.uint64_data)
        if tensor.data_type in _SIX_BIT:  # one a number here, unlike the smaller types
            return tensor_bytes(tensor.data_type, [numbers]) if numbers else None
        return numbers * _dtype(tensor.data_type).itemsize if numbers else None


def read(source: Path | onnx.ModelProto, base: Path | None = None) -> tuple[onnx.ModelProto, Store]:
    """The hollow model and the store behind it.

    `base` is the folder that external data is relative to: by default the file's own, and the
    working folder for a ModelProto, as in onnxruntime. A ModelProto given is left untouched.
    Raises ModelError for what is no ONNX model, is truncated, or lacks external data.
    """
    store = Store()
    if isinstance(source, onnx.ModelProto):
        label, base = "the given ModelProto", base or Path()
    else:
        label, base = shown(source), base or source.parent
    try:
        if isinstance(source, onnx.ModelProto):
            model = _read_proto(source, store)
        else:
            file = FileSource(source)
            model = _parse(_hollow(file, file.map, wire.MODEL, store, label), label)
        if not model.HasField("graph") or not (model.ir_version or model.opset_import):
            raise ModelError(f"{label}: not an ONNX model")
        return _attach_external(model, store, base, label), store
    except (DecodeError, EncodeError):
        reason = "nested deeper, or larger, than protobuf allows"
        raise ModelError(f"{label}: {reason}") from None


def _read_proto(source: onnx.ModelProto, store: Store) -> onnx.ModelProto:
    try:
        data = source.SerializeToString()
    except (EncodeError, ValueError):
        return _read_large_proto(source, store)
    memory = MemorySource(data)
    return _parse(_hollow(memory, data, wire.MODEL, store, "model"), "model")


def _read_large_proto(source: onnx.ModelProto, store: Store) -> onnx.ModelProto:
    """Like `_read_proto` for models over 2 GB, which protobuf cannot serialise in one piece."""
    model = onnx.ModelProto()
    for field, value in source.ListFields():
        if field.name != "graph":
            _copy_field(model, field.name, value)
    for field, value in source.graph.ListFields():
        if field.name != "initializer":
            _copy_field(model.graph, field.name, value)
    for tensor in source.graph.initializer:
        data = tensor.SerializeToString()
        hollow = _hollow(MemorySource(data), data, wire.TENSOR, store, "model")
        model.graph.initializer.append(onnx.TensorProto.FromString(hollow))
    return model


def _copy_field(target: onnx.ModelProto | onnx.GraphProto, name: str, value: object) -> None:
    if isinstance(value, str | bytes | int | float):
        setattr(target, name, value)
    elif hasattr(value, "ListFields"):
        getattr(target, name).CopyFrom(value)
    else:
        getattr(target, name).extend(value)


def _parse(data: bytes, label: str) -> onnx.ModelProto:
    try:
        return onnx.ModelProto.FromString(data)
    except DecodeError:
        raise ModelError(f"{label}: not an ONNX model") from None


def _hollow(source: Source, buffer: wire.Buffer, kind: str, store: Store, label: str) -> bytes:
    """The message without the data of its large tensors, which the store refers to instead."""

    def tensor(buffer: wire.Buffer, start: int, end: int) -> list[wire.Piece] | None:
        fields = wire.fields(buffer, start, end)
        data = [f for f in fields if f.number in wire.DATA_FIELDS and f.end - f.value > 0]
        if len(data) != 1 or data[0].wire_type != 2 or data[0].end - data[0].value <= HOLLOW_OVER:
            return None
        where = [f for f in fields if f.number == wire.DATA_LOCATION]
        if any(buffer[f.value] != 0 for f in where):
            return None  # claims to lie elsewhere as well: left to `_attach_external`
        (content,) = data
        stored = StoredRange(
            source,
            content.value,
            content.end - content.value,
            content.number,
            explicit_default=bool(where),
        )
        kept: list[wire.Piece] = [
            wire.Slice(f.start, f.end - f.start) for f in fields if f not in (content, *where)
        ]
        return [*kept, store.marker(store.add(stored)), _EXTERNAL]

    try:
        if kind == wire.TENSOR:
            pieces = tensor(buffer, 0, len(buffer))
            return bytes(buffer) if pieces is None else wire.join(buffer, pieces)
        large = HOLLOW_OVER
        pieces = wire.rewrite(buffer, kind, lambda start, end: end - start > large, tensor)
    except wire.WireError as error:
        raise ModelError(f"{label}: truncated, or not an ONNX model ({error})") from None
    return wire.join(buffer, pieces)


def _attach_external(
    model: onnx.ModelProto, store: Store, base: Path, label: str
) -> onnx.ModelProto:
    """Turn references to files beside the model into references to the store."""
    data = model.SerializeToString()
    places = positions(data, _LOCATION_ENTRY)
    if not places:
        return model
    files: dict[str, FileSource] = {}

    def tensor(buffer: wire.Buffer, start: int, end: int) -> list[wire.Piece] | None:
        proto = onnx.TensorProto.FromString(buffer[start:end])
        if proto.data_location != onnx.TensorProto.EXTERNAL or store.reference(proto) is not None:
            return None
        store.refer(proto, store.add(_external_range(proto, files, base, label)))
        return [proto.SerializeToString()]

    pieces = wire.rewrite(data, wire.MODEL, contains(places), tensor)
    return onnx.ModelProto.FromString(wire.join(data, pieces))


def _external_range(
    tensor: onnx.TensorProto, files: dict[str, FileSource], base: Path, label: str
) -> StoredRange:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    name = tensor.name or "(unnamed)"
    if isinstance(location, bytes):
        raise ModelError(
            f"{label}: tensor {name!r} has its data at {location!r}, which is no UTF-8"
        )
    if not location or PurePosixPath(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(
            f"{label}: tensor {name!r} has its data at {location!r}, outside of the model's folder"
        )
    if location not in files:
        try:
            files[location] = FileSource(base / location)
        except ModelError as error:
            raise ModelError(f"{label}: external data of tensor {name!r}: {error}") from None
    source = files[location]
    try:
        offset = int(entries.get("offset", "0") or 0)
        length = int(entries.get("length") or tensor_bytes(tensor.data_type, tensor.dims))
    except ValueError:
        raise ModelError(f"{label}: tensor {name!r} has a malformed offset or length") from None
    if offset < 0 or length < 0 or offset + length > source.nbytes:
        raise ModelError(
            f"{label}: tensor {name!r} needs bytes {offset:,} to {offset + length:,} of "
            f"{location!r}, which has {source.nbytes:,}"
        )
    return StoredRange(source, offset, length, external=True)


def tensor_bytes(data_type: int, dims: Sequence[int]) -> int:
    """Size in bytes of a dense tensor as raw_data; 0 for strings and undefined types.

    Raises ModelError for an element type that ONNX does not define.
    """
    count = math.prod(dims)
    if data_type in _PACKED_BITS:
        return (count * _PACKED_BITS[data_type] + 7) // 8
    if data_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        return 0
    return count * _dtype(data_type).itemsize


def _dtype(data_type: int) -> np.dtype[np.generic]:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type))
    except KeyError:
        raise ModelError(f"a tensor has the unknown element type {data_type}") from None


def _types(*names: str) -> frozenset[int]:
    known = dict(onnx.TensorProto.DataType.items())
    return frozenset(known[name] for name in names if name in known)


_SIX_BIT: Final = _types("FLOAT6E2M3", "FLOAT6E3M2")
# Bits of an element in raw_data, of the types that fill no byte.
_PACKED_BITS: Final = {
    **dict.fromkeys(_types("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(_types("INT2", "UINT2"), 2),
    **dict.fromkeys(_SIX_BIT, 6),
}


def positions(data: bytes, pattern: bytes) -> list[int]:
    """Every offset of the pattern, ascending."""
    found = []
    at = data.find(pattern)
    while at >= 0:
        found.append(at)
        at = data.find(pattern, at + 1)
    return found


def contains(places: list[int]) -> wire.Predicate:
    """True for a range that holds one of the places."""

    def wanted(start: int, end: int) -> bool:
        at = bisect.bisect_left(places, start)
        return at < len(places) and places[at] < end

    return wanted
