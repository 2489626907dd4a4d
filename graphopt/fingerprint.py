"""One short text that stands for a whole graph."""

from __future__ import annotations

import hashlib

import onnx

from graphopt.ir import Graph, Model
from graphopt.storage import Store


def fingerprint(model: Model) -> str:
    """A hash of operators, edges, attributes and constants, 32 hex digits.

    Equal fingerprints mean the same graph under the same names, nodes in the same order. Constants
    count by where their bytes lie, not by what these are: two copies of a weight differ.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(sorted(model.opsets.items())).encode())
    _digest_graph(model.graph, model.store, digest)
    return digest.hexdigest()


def _digest_graph(graph: Graph, store: Store, digest: hashlib.blake2b) -> None:
    interface = [[value.name for value in side] for side in (graph.inputs, graph.outputs)]
    digest.update(_bytes(interface))
    for value in sorted(graph.initializers, key=lambda value: value.name):
        if value.weight is not None:
            digest.update(_bytes(value.name) + _constant_bytes(value.weight.proto, store))
    for node in sorted(graph.nodes, key=lambda node: node.place):
        edges = [[v.name if v else "" for v in side] for side in (node.inputs, node.outputs)]
        digest.update(_bytes((node.domain, node.op, node.overload, edges)))
        for attribute in node.proto.attribute:
            digest.update(_bytes(attribute.name))
            if attribute.name in node.bodies:
                for body in node.bodies[attribute.name]:
                    _digest_graph(body, store, digest)
            elif attribute.HasField("t"):
                digest.update(_constant_bytes(attribute.t, store))
            else:
                digest.update(attribute.SerializeToString(deterministic=True))


def _constant_bytes(proto: onnx.TensorProto | onnx.SparseTensorProto, store: Store) -> bytes:
    """The constant, its data by place where it is a byte range: keys of stores are random."""
    if isinstance(proto, onnx.SparseTensorProto):
        parts = [_constant_bytes(tensor, store) for tensor in (proto.values, proto.indices)]
        return _bytes(list(proto.dims)) + b"".join(parts)
    index = store.reference(proto)
    if index is None:
        return bytes(proto.SerializeToString(deterministic=True))
    stored = store[index]
    return _bytes((proto.data_type, list(proto.dims), index, stored.offset, stored.length))


def _bytes(value: object) -> bytes:
    return repr(value).encode("utf-8", "backslashreplace")
