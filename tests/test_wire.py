"""The protobuf wire format: fields, limits, and rewriting without a change elsewhere."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import wire
from tests import graphs


@given(st.integers(0, 2**64 - 1))
def test_varint_round_trip(number: int) -> None:
    encoded = wire.varint(number)
    assert wire.read_varint(encoded, 0, len(encoded)) == (number, len(encoded))


@given(st.integers(0, 2**63 - 1), st.integers(1, 2**28))
def test_varint_is_what_protobuf_writes(dim: int, field: int) -> None:
    expected = wire.varint(1 << 3) + wire.varint(dim) + wire.varint(2 << 3) + wire.varint(field)
    assert onnx.TensorProto(dims=[dim], data_type=field).SerializeToString() == expected


def test_fields_cover_every_wire_type() -> None:
    data = (
        wire.varint(1 << 3) + wire.varint(300)
        + wire.varint(2 << 3 | 1) + bytes(8)
        + wire.header(200, 3) + b"abc"
        + wire.varint(4 << 3 | 5) + bytes(4)
    )  # fmt: skip
    found = wire.fields(data, 0, len(data))
    assert [(f.number, f.wire_type, f.end - f.value) for f in found] == [
        (1, 0, 2),
        (2, 1, 8),
        (200, 2, 3),
        (4, 5, 4),
    ]
    assert [f.start for f in found[1:]] == [f.end for f in found[:-1]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x0a\x05abc", "a field of 5 bytes reaches past the end at byte 0"),
        (b"\x08", "the file ends inside a number at byte 1"),
        (b"\x08" + b"\xff" * 11, "a varint is longer than 10 bytes at byte 11"),
        (b"\x0b", "this is no protobuf field at byte 0"),
        (b"\x00\x00", "this is no protobuf field at byte 0"),
        (b"\x09\x01\x02", "a field of 8 bytes reaches past the end at byte 0"),
        (b"\x08\x01\x0d\x01", "a field of 4 bytes reaches past the end at byte 2"),
    ],
)
def test_malformed_bytes_are_told_with_their_place(data: bytes, reason: str) -> None:
    with pytest.raises(wire.WireError, match=reason):
        wire.fields(data, 0, len(data))


@given(st.binary(max_size=200))
def test_fields_never_read_past_the_end(data: bytes) -> None:
    try:
        found = wire.fields(data + b"\x01" * 20, 0, len(data))
    except wire.WireError:
        return
    assert sum(f.end - f.start for f in found) == len(data)


def test_rewrite_that_changes_nothing_is_one_slice() -> None:
    data = graphs.matmul().SerializeToString()
    pieces = wire.rewrite(data, wire.MODEL, lambda start, end: True, lambda *_: None)
    assert pieces == [wire.Slice(0, len(data))]
    assert wire.join(data, pieces) == data


def test_rewrite_recomputes_the_lengths_of_every_message_around() -> None:
    body = graphs.graph(
        [graphs.node("Constant", [], ["r"], value=graphs.weight("inner"))], (), ["r"]
    )
    proto = graphs.model([graphs.if_node(body, body)], [graphs.CONDITION])
    data = proto.SerializeToString()
    seen = []

    def shrink(buffer: wire.Buffer, start: int, end: int) -> list[wire.Piece]:
        tensor = onnx.TensorProto.FromString(buffer[start:end])
        seen.append(tensor.name)
        tensor.raw_data = b"\x01\x02\x03\x04"
        return [tensor.SerializeToString()]

    pieces = wire.rewrite(data, wire.MODEL, lambda start, end: True, shrink)
    assert seen == ["inner", "inner"]
    assert wire.size(pieces) == len(wire.join(data, pieces))
    changed = onnx.ModelProto.FromString(wire.join(data, pieces))
    for attribute in changed.graph.node[0].attribute:
        assert attribute.g.node[0].attribute[0].t.raw_data == b"\x01\x02\x03\x04"
        attribute.g.node[0].attribute[0].t.CopyFrom(graphs.weight("inner"))
    assert changed == proto


def test_every_place_of_a_tensor_is_found() -> None:
    """Initializers, sparse ones, all tensor attributes, bodies, functions, training information."""
    names = iter(f"t{i}" for i in range(100))

    def tensor() -> onnx.TensorProto:
        return graphs.weight(next(names))

    def sparse() -> onnx.SparseTensorProto:
        return onnx.SparseTensorProto(values=tensor(), indices=tensor(), dims=[1])

    attributes = [
        onnx.AttributeProto(name="t", t=tensor()),
        onnx.AttributeProto(name="ts", tensors=[tensor(), tensor()]),
        onnx.AttributeProto(name="s", sparse_tensor=sparse()),
        onnx.AttributeProto(name="ss", sparse_tensors=[sparse()]),
        onnx.AttributeProto(name="g", g=onnx.GraphProto(initializer=[tensor()])),
        onnx.AttributeProto(name="gs", graphs=[onnx.GraphProto(initializer=[tensor()])]),
    ]
    content = onnx.GraphProto(
        node=[onnx.NodeProto(attribute=attributes)],
        initializer=[tensor()],
        sparse_initializer=[sparse()],
    )
    training = onnx.TrainingInfoProto(
        initialization=onnx.GraphProto(initializer=[tensor()]),
        algorithm=onnx.GraphProto(initializer=[tensor()]),
    )
    function = onnx.FunctionProto(
        node=[onnx.NodeProto(attribute=[onnx.AttributeProto(t=tensor())])],
        attribute_proto=[onnx.AttributeProto(t=tensor())],
    )
    proto = onnx.ModelProto(graph=content, training_info=[training], functions=[function])
    made = int(next(names)[1:])
    data = proto.SerializeToString()
    seen: list[str] = []

    def collect(buffer: wire.Buffer, start: int, end: int) -> None:
        seen.append(onnx.TensorProto.FromString(buffer[start:end]).name)

    wire.rewrite(data, wire.MODEL, lambda start, end: True, collect)
    assert sorted(seen) == sorted(f"t{i}" for i in range(made))


def test_nesting_ends_where_protobuf_ends() -> None:
    def nested(depth: int) -> bytes:
        data = b""
        for _ in range(depth):
            attribute = wire.header(6, len(data)) + data
            message = wire.header(5, len(attribute)) + attribute
            data = wire.header(1, len(message)) + message
        return wire.header(7, len(data)) + data

    deepest = nested(33)  # 33 bodies are 100 messages: the model's graph and three a body
    wire.rewrite(deepest, wire.MODEL, lambda start, end: True, lambda *_: None)
    with pytest.raises(wire.WireError, match="nested more than 100 deep"):
        wire.rewrite(nested(40), wire.MODEL, lambda start, end: True, lambda *_: None)


def test_a_payload_cannot_be_joined() -> None:
    with pytest.raises(TypeError, match="payload"):
        wire.join(b"", [wire.Payload(0, 4)])
