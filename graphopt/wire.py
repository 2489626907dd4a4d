"""The protobuf wire format of ONNX, walked without parsing: where the data of tensors lies.

A message is a sequence of fields, each a varint tag (field number << 3 | wire type) and a value
(https://protobuf.dev/programming-guides/encoding/). The walker descends only into messages that
can hold a tensor worth moving and passes everything else on as one slice, so its cost is about a
microsecond a node and it never touches the pages of a weight.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

Buffer: TypeAlias = bytes | mmap.mmap

MODEL: Final = "model"
TENSOR: Final = "tensor"

# message kind -> {field number: kind of the message in it}, only the paths that lead to tensors
_CHILDREN: Final[dict[str, dict[int, str]]] = {
    MODEL: {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: TENSOR, 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: TENSOR, 6: "graph", 10: TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: TENSOR, 2: TENSOR},
}

# TensorProto fields that hold data; string_data (6) is no flat array and always stays in place.
FLOAT_DATA: Final = 4
RAW_DATA: Final = 9
DOUBLE_DATA: Final = 10
DATA_FIELDS: Final = frozenset({FLOAT_DATA, 5, 7, RAW_DATA, DOUBLE_DATA, 11})
EXTERNAL_DATA: Final = 13
DATA_LOCATION: Final = 14

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
MAX_DEPTH: Final = 100  # of nested messages, as in protobuf itself


class WireError(ValueError):
    """The bytes are not a well-formed protobuf message; `offset` is where that shows."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} at byte {offset:,}")
        self.offset = offset


class Slice(NamedTuple):
    """`length` bytes of the walked buffer, to be passed on as they are."""

    offset: int
    length: int


class Payload(NamedTuple):
    """A tensor's data elsewhere: its place in the store and its length."""

    place: int
    length: int


Piece: TypeAlias = bytes | Slice | Payload


class Field(NamedTuple):
    """One field of a message: `[start, end)` with its tag, `[value, end)` without."""

    number: int
    wire_type: int
    start: int
    value: int
    end: int


TensorRewriter: TypeAlias = Callable[[Buffer, int, int], Sequence[Piece] | None]
Predicate: TypeAlias = Callable[[int, int], bool]


def read_varint(buffer: Buffer, at: int, end: int) -> tuple[int, int]:
    """The varint at `at` and the offset behind it."""
    result = shift = 0
    while at < end:
        byte = buffer[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
        if shift > 63:
            raise WireError("a varint is longer than 10 bytes", at)
    raise WireError("the file ends inside a number", at)


def varint(value: int) -> bytes:
    """`value` >= 0 as a varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def header(number: int, length: int) -> bytes:
    """Tag and length in front of a length-delimited field."""
    return varint(number << 3 | _LEN) + varint(length)


def next_field(buffer: Buffer, at: int, end: int) -> Field:
    """The field that starts at `at`; WireError where it is malformed or reaches past `end`."""
    start = at
    tag = buffer[at]
    if tag < 0x80:
        at += 1
    else:
        tag, at = read_varint(buffer, at, end)
    wire_type = tag & 7
    if wire_type == _LEN:
        length, at = read_varint(buffer, at, end)
        stop = at + length
    elif wire_type == _VARINT:
        stop = read_varint(buffer, at, end)[1]
    elif wire_type == _I32:
        stop = at + 4
    elif wire_type == _I64:
        stop = at + 8
    else:
        raise WireError("this is no protobuf field", start)
    if stop > end:
        raise WireError(f"a field of {stop - at:,} bytes reaches past the end", start)
    if tag >> 3 == 0:
        raise WireError("this is no protobuf field", start)
    return Field(tag >> 3, wire_type, start, at, stop)


def fields(buffer: Buffer, start: int, end: int) -> list[Field]:
    """Every field of the message in `[start, end)`."""
    found = []
    at = start
    while at < end:
        field = next_field(buffer, at, end)
        found.append(field)
        at = field.end
    return found


def size(pieces: Sequence[Piece]) -> int:
    """Bytes that the pieces take when written."""
    return sum(len(piece) if isinstance(piece, bytes) else piece.length for piece in pieces)


def rewrite(
    buffer: Buffer,
    kind: str,
    wanted: Predicate,
    tensor: TensorRewriter,
    start: int = 0,
    end: int | None = None,
    depth: int = 0,
) -> list[Piece]:
    """The message as pieces, with every tensor in it that `tensor` rewrites replaced.

    `wanted(start, end)` says whether a nested message is worth a look; `tensor(buffer, start, end)`
    returns the new content of a TensorProto, or None to leave it. Lengths of the messages around
    a rewritten tensor are recomputed.
    """
    end = len(buffer) if end is None else end
    if depth > MAX_DEPTH:
        raise WireError(f"messages are nested more than {MAX_DEPTH} deep", start)
    children = _CHILDREN[kind]
    pieces: list[Piece] = []
    pending = at = start  # [pending, at) is passed on unchanged
    while at < end:
        field = next_field(buffer, at, end)
        at = field.end
        child = children.get(field.number) if field.wire_type == _LEN else None
        if child is None or not wanted(field.value, field.end):
            continue
        if child == TENSOR:
            inner = tensor(buffer, field.value, field.end)
        else:
            inner = rewrite(buffer, child, wanted, tensor, field.value, field.end, depth + 1)
            if len(inner) == 1 and isinstance(inner[0], Slice):
                inner = None  # nothing below changed: keep the original bytes, header included
        if inner is None:
            continue
        if field.start > pending:
            pieces.append(Slice(pending, field.start - pending))
        pieces.append(header(field.number, size(inner)))
        pieces.extend(inner)
        pending = at
    if at > pending or not pieces:
        pieces.append(Slice(pending, at - pending))
    return pieces


def join(buffer: Buffer, pieces: Sequence[Piece]) -> bytes:
    """The pieces as bytes; there must be no Payload among them."""
    out = []
    for piece in pieces:
        if isinstance(piece, Payload):
            raise TypeError("a payload cannot be joined")
        out.append(
            piece
            if isinstance(piece, bytes)
            else buffer[piece.offset : piece.offset + piece.length]
        )
    return b"".join(out)
