"""Models made static, what onnxruntime runs of them, and what quantization may cost at most."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.kernels.affine import Affine
from graphopt.passes.canonicalize.remove_dead import RemoveDead
from graphopt.passes.quantize.emission import Emitter, Options
from graphopt.passes.quantize.parameters import Method, Ranges, affines, usable, wanted
from graphopt.passes.quantize.units import Unit, Units
from graphopt.runtime import Session
from graphopt.statistics import sweep
from graphopt.targets import has_vnni
from tests import graphs
from tests.optimized import Level, applied

Array = NDArray[Any]
Choose = Callable[[list[Unit]], Iterable[Unit]]

BITS: Final = 8 if has_vnni() else 7
SIZES: Final = {"m": 6, "a": 2, "b": 3}  # of open axes
LAYOUT: Final = frozenset({"Transpose", "ReorderInput", "ReorderOutput"})
BOUNDARY: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})


def constant(name: str, array: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    values = np.asarray(array, dtype)
    return numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)


def integers(name: str, *values: int) -> onnx.TensorProto:
    return constant(name, values, np.int64)


def normal(name: str, *shape: int, scale: float = 1.0, seed: int = 0) -> onnx.TensorProto:
    """Normal numbers, others for each name."""
    rng = np.random.default_rng([seed, *name.encode()])
    return constant(name, rng.normal(size=shape) * scale)


@dataclass(frozen=True)
class Small:
    """A small model: nodes, inputs by shape, names of outputs, and initializers."""

    nodes: Sequence[onnx.NodeProto]
    inputs: Mapping[str, Sequence[int | str]]
    outputs: Sequence[str]
    held: Sequence[onnx.TensorProto] = ()
    opset: int = 17
    spread: float = 1.0  # standard deviation of the inputs

    def feeds(self, count: int = 3) -> list[dict[str, Array]]:
        rng = np.random.default_rng(1)
        shapes = {n: [SIZES.get(str(d), d) for d in s] for n, s in self.inputs.items()}
        return [
            {
                name: (rng.normal(size=shape) * self.spread).astype(np.float32)  # type: ignore[arg-type]
                for name, shape in shapes.items()
            }
            for _ in range(count)
        ]

    def proto(self) -> onnx.ModelProto:
        """The model; its outputs have as many axes as a run gives, of any size."""
        inputs = [graphs.value(name, shape) for name, shape in self.inputs.items()]
        outputs = [graphs.value(name, None) for name in self.outputs]
        made = graphs.model(self.nodes, inputs, outputs, self.held, opset=self.opset)
        for name, found in run(made, "off", self.feeds(1)[0]).items():
            info = made.graph.output[list(self.outputs).index(name)]
            info.CopyFrom(graphs.value(name, [f"{name}{axis}" for axis in range(found.ndim)]))
        return made


def run(proto: onnx.ModelProto, level: Level, feed: Mapping[str, Array]) -> dict[str, Array]:
    with Session(proto.SerializeToString(), optimizations=level, threads=1) as session:
        return session.run(feed)


@dataclass(frozen=True)
class Static:
    """A model with units on integers. `units` are those of the model before, by name."""

    before: onnx.ModelProto
    after: onnx.ModelProto
    feeds: list[dict[str, Array]]
    tensors: Mapping[str, Affine]
    chosen: list[str]
    found: list[str]
    executed: onnx.ModelProto = field(repr=False)

    @property
    def units(self) -> list[Unit]:
        """The chosen units, of the model as it was."""
        fresh = Units(Editor(Model.load(self.before)))
        return [unit for unit in fresh if unit.root in self.chosen]

    @property
    def counts(self) -> Counter[str]:
        """Operators of the graph that onnxruntime runs."""
        return Counter(node.op_type for node in self.executed.graph.node)

    @property
    def kernels(self) -> dict[str, int]:
        """The same but for what converts layouts and types."""
        return {op: n for op, n in self.counts.items() if op not in LAYOUT | BOUNDARY}

    @property
    def dequantized(self) -> list[str]:
        """Constants that are dequantized on every run."""
        held = {tensor.name for tensor in self.executed.graph.initializer}
        nodes = (n for n in self.executed.graph.node if n.op_type == "DequantizeLinear")
        return [node.input[0] for node in nodes if node.input[0] in held]


def everything(units: list[Unit]) -> list[Unit]:
    return units


def without(*roots: str) -> Choose:
    return lambda units: [unit for unit in units if unit.root not in roots]


def make_static(
    small: Small | onnx.ModelProto,
    feeds: list[dict[str, Array]] | None = None,
    *,
    choose: Choose = everything,
    method: Method = "min-max",
    options: Options | None = None,
    corrections: Mapping[str, Array] | None = None,
    checked: bool = True,
) -> Static:
    """All usable units, or those chosen among them, calibrated on the feeds themselves."""
    if isinstance(small, Small):
        before, feeds = small.proto(), small.feeds()
    else:
        before = small
    assert feeds is not None
    model = Model.load(before)
    units = Units(Editor(model)).all
    ranges = Ranges(units, sweep(model, feeds, wanted(units)), method)
    chosen = list(choose(usable(units, ranges)))
    tensors = affines(chosen, ranges)
    roots = [unit.root for unit in chosen]

    def change(edit: Editor) -> None:
        again = [unit for unit in Units(edit) if unit.root in roots]
        weights = options or Options(BITS, "max")
        Emitter(edit, tensors, weights, corrections).emit(again)
        edit.settle()
        RemoveDead().run(edit.model, edit)

    after, edit = applied(before, change, checked=checked)
    assert [c.root for c in edit.changes if c.rule == "quantize-static"] == roots
    found = [unit.root for unit in units]
    return Static(before, after, feeds, tensors, roots, found, executed(after))


def executed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that onnxruntime makes of the model."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        Session(proto.SerializeToString(), optimized_model=file, threads=1).close()
        return onnx.load(file)


def values_of(proto: onnx.ModelProto, feed: Mapping[str, Array]) -> dict[str, Array]:
    """All floats that nodes of the model compute, without onnxruntime's optimisations."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    known = {info.name for info in exposed.graph.output}
    for node in proto.graph.node:
        for name in node.output:
            if name and name not in known:
                info = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                exposed.graph.output.append(info)
    return {**feed, **run(exposed, "off", feed)}
