"""What a model is made of and what about it cannot be proved. Static: the model is never run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import onnx
from pydantic import Field

from graphopt import exporter, macs
from graphopt.assumptions import choose_sizes
from graphopt.ir import STANDARD_DOMAINS, Model, Value, Weight
from graphopt.operators import RANDOM, RUNTIME_DOMAINS, is_random
from graphopt.record import Record
from graphopt.report import FileInfo, GraphStats, file_info, stats

SCHEMA_VERSION: Final = 1


class OperatorRecord(Record):
    """One operator of the graph."""

    operator: str = Field(description="with its domain, where that is not the standard one")
    nodes: int = Field(description="bodies included, functions not")
    share: float = Field(description="of all nodes, 0 to 1")
    macs: int = Field(description="multiply-accumulates of those nodes whose shapes are known")


class WeightRecord(Record):
    """All constant tensors of one element type."""

    type: str
    tensors: int
    elements: int
    bytes: int


class PortRecord(Record):
    """An input or output of the model."""

    name: str
    type: str = Field(description="as declared: float32, seq(float32), ...")
    shape: list[int | str | None] | None = Field(
        description="as declared: sizes, names of free dims, None for a nameless one; None without"
    )
    is_tensor: bool


class MacRecord(Record):
    """Multiply-accumulates at one choice of shapes."""

    total: int
    shapes: dict[str, list[int]] = Field(description="of the inputs, at which the rest holds")
    assumed: list[str] = Field(description="inputs whose free dims were filled with usual sizes")
    nodes: int = Field(description="nodes that have multiply-accumulates")
    unknown: int = Field(description="how many of them have shapes that could not be inferred")
    once_per_loop: bool = Field(description="bodies of Loop or Scan were counted for one iteration")


class Doubt(Record):
    """Something about the model that a proof by running it cannot cover."""

    kind: Literal["random", "foreign-domain", "opset", "ir-version", "input-type"]
    subject: str
    reason: str


class Inspection(Record):
    """What `graphopt inspect` finds out."""

    schema_version: int = SCHEMA_VERSION
    file: FileInfo
    external_files: list[str] = Field(description="files that hold weights beside the model")
    ir_version: int
    opsets: dict[str, int] = Field(description="by domain; '' is the standard one")
    producer: str
    stats: GraphStats
    operators: list[OperatorRecord] = Field(description="most frequent first")
    weights: list[WeightRecord] = Field(description="largest first")
    macs: MacRecord
    inputs: list[PortRecord]
    overridable: list[PortRecord] = Field(description="inputs with a default")
    outputs: list[PortRecord]
    free_dims: list[str] = Field(description="names of dims, or input[axis] where nameless")
    functions: list[str] = Field(description="functions that the model defines")
    sparse_initializers: int
    foreign_domains: list[str] = Field(description="without kernels in onnxruntime itself")
    doubts: list[Doubt]


def inspect(path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> Inspection:
    """Inspect a model file; `shapes` fixes shapes of inputs for the count of MACs.

    Raises ModelError for a file that is no ONNX model, UsageError for shapes that do not fit.
    """
    model = Model.load(path)
    sizes = stats(model)
    required = [value for value in model.graph.inputs if not _is_overridable(value)]
    counted, record = _macs(model, required, shapes or {})
    foreign = _foreign_domains(model)
    files = model.store.files()
    inputs = [_port(value) for value in required]
    return Inspection(
        file=file_info(path, [path, *files]),
        external_files=[str(file) for file in files],
        ir_version=model.proto.ir_version,
        opsets=model.opsets,
        producer=f"{model.proto.producer_name} {model.proto.producer_version}".strip(),
        stats=sizes,
        operators=_operators(sizes, counted),
        weights=_weights(model),
        macs=record,
        inputs=inputs,
        overridable=[_port(v) for v in model.graph.inputs if _is_overridable(v)],
        outputs=[_port(value) for value in model.graph.outputs],
        free_dims=_free_dims(inputs),
        functions=["::".join(filter(None, key)) for key in model.functions],
        sparse_initializers=sum(
            value.weight is not None and value.weight.is_sparse
            for graph in model.graphs()
            for value in graph.initializers
        ),
        foreign_domains=foreign,
        doubts=[*_randomness(model), *_no_kernels(foreign), *_versions(model), *_no_feeds(inputs)],
    )


def _is_overridable(value: Value) -> bool:
    return value.weight is not None


def _macs(
    model: Model, required: Sequence[Value], shapes: Mapping[str, Sequence[int]]
) -> tuple[macs.Macs, MacRecord]:
    inputs = [model.graph.value_info[v.name] for v in required if v.name in model.graph.value_info]
    chosen = choose_sizes(inputs, shapes)
    counted = macs.count(exporter.to_hollow(model), chosen.inputs, chosen.symbols)
    return counted, MacRecord(
        total=counted.total,
        shapes={name: list(size) for name, size in chosen.inputs.items()},
        assumed=chosen.assumed,
        nodes=counted.nodes,
        unknown=counted.unknown,
        once_per_loop=counted.has_loop,
    )


def _operators(sizes: GraphStats, counted: macs.Macs) -> list[OperatorRecord]:
    """Operators of the graph; those that only functions contain come last, without nodes."""
    names = [
        *sizes.operators,
        *(name for name in counted.by_operator if name not in sizes.operators),
    ]
    return [
        OperatorRecord(
            operator=name,
            nodes=sizes.operators.get(name, 0),
            share=sizes.operators.get(name, 0) / max(sizes.nodes, 1),
            macs=counted.by_operator[name],
        )
        for name in names
    ]


def _weights(model: Model) -> list[WeightRecord]:
    tensors: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for weight in _all_weights(model):
        kind = _element(weight.data_type)
        tensors[kind] += 1
        elements[kind] += weight.size
        sizes[kind] += weight.nbytes
    return [
        WeightRecord(type=kind, tensors=tensors[kind], elements=elements[kind], bytes=size)
        for kind, size in sizes.most_common()
    ]


def _all_weights(model: Model) -> Iterator[Weight]:
    """Initializers and the tensors of constant nodes, bodies included."""
    for graph in model.graphs():
        for value in graph.initializers:
            if value.weight is not None:
                yield value.weight
    for node in model.nodes():
        for attribute in node.proto.attribute if not node.inputs else ():
            if attribute.HasField("t"):
                yield Weight(attribute.t, model.store)
            elif attribute.HasField("sparse_tensor"):
                yield Weight(attribute.sparse_tensor, model.store)


def _port(value: Value) -> PortRecord:
    kind = value.declared_type or onnx.TypeProto()
    shape: list[int | str | None] | None = None
    if kind.tensor_type.HasField("shape"):
        shape = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in kind.tensor_type.shape.dim
        ]
    is_tensor = kind.HasField("tensor_type")
    return PortRecord(name=value.name, type=_type_text(kind), shape=shape, is_tensor=is_tensor)


def _type_text(kind: onnx.TypeProto) -> str:
    if kind.HasField("tensor_type"):
        return _element(kind.tensor_type.elem_type)
    if kind.HasField("sparse_tensor_type"):
        return f"sparse({_element(kind.sparse_tensor_type.elem_type)})"
    if kind.HasField("sequence_type"):
        return f"seq({_type_text(kind.sequence_type.elem_type)})"
    if kind.HasField("optional_type"):
        return f"optional({_type_text(kind.optional_type.elem_type)})"
    if kind.HasField("map_type"):
        key, value = kind.map_type.key_type, kind.map_type.value_type
        return f"map({_element(key)}, {_type_text(value)})"
    return "untyped"


def _element(data_type: int) -> str:
    names = onnx.TensorProto.DataType
    if data_type not in names.values():
        return f"type{data_type}"
    name = names.Name(data_type).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _free_dims(inputs: Sequence[PortRecord]) -> list[str]:
    found: dict[str, None] = {}
    for port in inputs:
        for axis, dim in enumerate(port.shape or ()):
            if not isinstance(dim, int):
                found[dim if dim not in (None, "?", "-1") else f"{port.name}[{axis}]"] = None
    return list(found)


def _foreign_domains(model: Model) -> list[str]:
    """Domains of nodes that neither onnxruntime nor a function of the model can run."""
    used = {(node.domain, node.op, node.overload) for node in model.nodes()}
    for function in model.functions.values():
        used |= {(node.domain, node.op_type, node.overload) for node in _inner(function.node)}
    known = RUNTIME_DOMAINS | STANDARD_DOMAINS
    return sorted({key[0] for key in used if key[0] not in known and key not in model.functions})


def _inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their bodies."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _inner(body.node)


def _randomness(model: Model) -> Iterator[Doubt]:
    counts = Counter(node.op for node in model.nodes() if is_random(node))
    for function in model.functions.values():
        counts.update(
            node.op_type
            for node in _inner(function.node)
            if node.domain in STANDARD_DOMAINS and node.op_type in RANDOM
        )
    for operator, nodes in counts.items():
        reason = f"{nodes} random node{'s' * (nodes > 1)}: two runs never agree"
        yield Doubt(kind="random", subject=operator, reason=reason)


def _no_kernels(domains: Sequence[str]) -> Iterator[Doubt]:
    for domain in domains:
        reason = "operators that onnxruntime does not have; name their library with --custom-ops"
        yield Doubt(kind="foreign-domain", subject=domain, reason=reason)


def _versions(model: Model) -> Iterator[Doubt]:
    from graphopt.runtime import limits  # loads onnxruntime, which the rest does without

    newest = limits()
    if model.proto.ir_version > newest.ir:
        subject = f"IR version {model.proto.ir_version}"
        reason = f"newer than onnxruntime here reads (up to {newest.ir})"
        yield Doubt(kind="ir-version", subject=subject, reason=reason)
    if model.opsets.get("", 0) > newest.opset:
        reason = f"newer than onnxruntime here reads (up to {newest.opset})"
        yield Doubt(kind="opset", subject=f"opset {model.opsets['']}", reason=reason)


def _no_feeds(inputs: Sequence[PortRecord]) -> Iterator[Doubt]:
    for port in inputs:
        if not port.is_tensor:
            reason = f"{port.type}: no values are proposed for such an input; give --data"
            yield Doubt(kind="input-type", subject=port.name, reason=reason)
