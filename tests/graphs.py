"""Builders of small models and of everything that tests run over: cases, architectures, digits."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

from graphopt import exporter
from graphopt.ir import Model

ROOT = Path(__file__).parents[1]
ARCHITECTURES = sorted((ROOT / "models" / "architectures").glob("*.onnx"))
DIGITS = sorted((ROOT / "models" / "digits").glob("*.onnx"))
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")

node = helper.make_node


def value(
    name: str, shape: Sequence[int | str] | None = (4,), element: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def weight(name: str, shape: Sequence[int] = (16, 32), seed: int = 0) -> onnx.TensorProto:
    """Normal float32 values as raw_data; the default is 2 KB, more than stays in a hollow model."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def graph(
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto | str] = (),
    outputs: Iterable[onnx.ValueInfoProto | str] = (),
    initializers: Iterable[onnx.TensorProto] = (),
    name: str = "g",
) -> onnx.GraphProto:
    """A graph; inputs and outputs given by name only are float[4]."""
    described = [
        [value(info) if isinstance(info, str) else info for info in infos]
        for infos in (inputs, outputs)
    ]
    return helper.make_graph(list(nodes), name, *described, initializer=list(initializers))


def wrap(
    content: onnx.GraphProto, opset: int = 17, ir: int = 10, domains: Sequence[str] = ()
) -> onnx.ModelProto:
    """A model around a graph."""
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    made = helper.make_model(content, opset_imports=imports)
    made.ir_version = ir
    return made


def model(
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto | str] = ("x",),
    outputs: Iterable[onnx.ValueInfoProto | str] = ("y",),
    initializers: Iterable[onnx.TensorProto] = (),
    opset: int = 17,
    ir: int = 10,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model of these nodes."""
    return wrap(graph(nodes, inputs, outputs, initializers), opset, ir, domains)


def matmul(weights: onnx.TensorProto | None = None) -> onnx.ModelProto:
    """y = x w with a w of 2 KB."""
    weights = weights if weights is not None else weight("w")
    inputs, outputs = [value("x", (1, 16))], [value("y", (1, 32))]
    return model([node("MatMul", ["x", "w"], ["y"])], inputs, outputs, [weights])


def if_node(
    then_branch: onnx.GraphProto, else_branch: onnx.GraphProto, outputs: Sequence[str] = ("y",)
) -> onnx.NodeProto:
    """An If on the value "c"."""
    return node("If", ["c"], list(outputs), then_branch=then_branch, else_branch=else_branch)


CONDITION = value("c", (), TensorProto.BOOL)


def parsed(text: str) -> onnx.ModelProto:
    """A model in ONNX's text syntax; the header (IR 10, opset 17) may be left out."""
    header = '<ir_version: 10, opset_import: ["": 17]>'
    return onnx.parser.parse_model(text if text.lstrip().startswith("<") else f"{header}\n{text}")


def exported(source: onnx.ModelProto | Model) -> onnx.ModelProto:
    """The model as graphopt gives it back in memory."""
    return exporter.to_proto(source if isinstance(source, Model) else Model.load(source))


def forced(source: onnx.ModelProto | Path) -> Model:
    """A model loaded such that export rebuilds every graph and every node of it."""
    loaded = Model.load(source)
    for inner in loaded.graphs():
        inner.edited = True
    for inner_node in loaded.nodes():
        inner_node.rewired = True
    return loaded


def save(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


@dataclass(frozen=True)
class Case:
    """One of ONNX's own backend tests, which loads its data only when asked."""

    name: str
    kind: str
    test: object

    @property
    def source(self) -> onnx.ModelProto | Path:
        held = self.test.model  # type: ignore[attr-defined]
        return held if held is not None else Path(self.test.model_dir) / "model.onnx"  # type: ignore[attr-defined]

    def proto(self) -> onnx.ModelProto:
        source = self.source
        return onnx.load(source) if isinstance(source, Path) else source


@functools.cache
def onnx_cases() -> tuple[Case, ...]:
    """The node cases and whole models that come with onnx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases overflow on purpose while they are made
        return tuple(Case(t.name, kind, t) for kind in KINDS for t in load_model_tests(kind=kind))
