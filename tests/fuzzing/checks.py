"""What must hold of a pipeline on a model: the first thing that does not, in one line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import onnx

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.errors import RuntimeFailure
from graphopt.fingerprint import fingerprint
from graphopt.ir import Model
from graphopt.judge import NOISE_FACTOR, TOLERANCES
from graphopt.manager import run_pipeline
from graphopt.nudge import nudged
from graphopt.oracle import narrowest_float
from graphopt.passes.pipelines import LEVELS, pipeline
from graphopt.runtime import Level, Session

Outputs = Mapping[str, Any]
_RECURRENT: Final = frozenset({"GRU", "LSTM", "RNN"})  # onnxruntime aborts on sequences of nothing
# Of the open dimensions, in the order of their names.
_SIZES: Final = ((2, 3), (1, 1), (3, 4), (0, 3), (2, 0), (1, 2))


def feeds(proto: onnx.ModelProto, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Values for the inputs at several sizes of the open dimensions, booleans both ways."""
    rng = np.random.default_rng(seed)
    stored = {tensor.name for tensor in proto.graph.initializer}
    ports = [info for info in proto.graph.input if info.name not in stored]
    dims = [d.dim_param for p in ports for d in p.type.tensor_type.shape.dim if d.dim_param]
    names = sorted(set(dims))
    drawn = set()
    hollow = {node.op_type for node in _nodes(proto.graph)}.isdisjoint(_RECURRENT)
    for number, sizes in enumerate(_SIZES):
        if 0 in sizes and not hollow:
            continue
        chosen = dict(zip(names, itertools.cycle(sizes), strict=False))
        if tuple(chosen.values()) in drawn and number > 1:
            continue
        drawn.add(tuple(chosen.values()))
        yield {port.name: _value(port, chosen, rng, number % 2 == 0) for port in ports}


def _value(
    port: onnx.ValueInfoProto, sizes: Mapping[str, int], rng: np.random.Generator, answer: bool
) -> Any:
    tensor = port.type.tensor_type
    shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in tensor.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if dtype.kind == "b":
        return np.array(answer) if not shape else rng.random(shape) < 0.5
    if dtype.kind in "iu":
        return rng.integers(0, 8, shape, dtype)
    return np.asarray(rng.normal(size=shape)).astype(dtype)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


class Subject:
    """A model with what onnxruntime makes of it, to compare optimised ones with."""

    def __init__(self, proto: onnx.ModelProto, seed: int = 0) -> None:
        """Raises RuntimeFailure where onnxruntime refuses the model or none of the feeds."""
        self.proto = proto
        self.tolerance = TOLERANCES[narrowest_float(Model.load(proto))]
        self.runs: list[tuple[dict[str, Any], Outputs, Outputs | None, Outputs | None]] = []
        with _session(proto, "off") as off, _session(proto, "default") as default:
            for feed in feeds(proto, seed):
                try:
                    expected = off.run(feed)
                except RuntimeFailure:
                    continue
                moved = _tried(off, nudged(feed, 0))
                self.runs.append((feed, expected, _tried(default, feed), moved))
        if not self.runs:
            raise RuntimeFailure("the original runs on no feed")

    def problem(self, text: str, *, settles: bool = True) -> str:
        """What is wrong with the result of a pipeline, "" if nothing; `settles` if it must be
        done in one go."""
        made, found = _optimized(self.proto, text)
        if made is None or found:
            return found
        checks = [self._static(made, text, settles), self._undone(text)]
        found = next(filter(None, checks), "")
        return found or self._compared(made, "off") or self._compared(made, "default")

    def _static(self, made: onnx.ModelProto, text: str, settles: bool) -> str:
        try:
            onnx.checker.check_model(made)
        except onnx.checker.ValidationError as error:
            return f"invalid: {str(error).strip().splitlines()[0]}"
        if list(made.graph.input) != list(self.proto.graph.input):
            return "interface: the inputs changed"
        if list(made.graph.output) != list(self.proto.graph.output):
            return "interface: the outputs changed"
        if (more := count(made) - count(self.proto)) > 0:
            return f"nodes: {more} more than before"
        if _optimized(self.proto, text)[0] != made:
            return "deterministic: not the same twice"
        if settles and _optimized(made, text)[0] != made:
            return "idempotent: not done in one go"
        return ""

    def _undone(self, text: str) -> str:
        loaded = Model.load(self.proto)
        edit, before = Editor(loaded), fingerprint(loaded)
        for step in pipeline(0, text):
            edit.settle()
            step.run(loaded, edit)
        edit.undo_to((0, 0))
        if fingerprint(loaded) != before or exporter.to_proto(loaded) != self.proto:
            return "undone: not without a trace"
        return ""

    def _compared(self, made: onnx.ModelProto, level: Level) -> str:
        try:
            with _session(made, level) as session:
                for feed, expected, default, moved in self.runs:
                    if level == "default" and default is None:
                        continue  # onnxruntime itself breaks the original
                    others = [run for run in (default, moved) if run is not None]
                    try:
                        result = session.run(feed)
                    except RuntimeFailure:
                        if level == "default" and _is_empty(feed):
                            continue  # its own optimisations put a -1 beside a 0 into a Reshape
                        raise
                    if found := self._differs(expected, result, others):
                        shapes = {name: np.shape(value) for name, value in feed.items()}
                        return f"differs: {found} at {shapes}, optimisations {level}"
        except RuntimeFailure as failure:
            if level == "default" and not _loads(self.proto, level):
                return ""
            return f"runs: not where the original does, optimisations {level}: {failure}"
        return ""

    def _differs(self, expected: Outputs, found: Outputs, others: list[Outputs]) -> str:
        for name, value in expected.items():
            other = found[name]
            if (value.dtype, value.shape) != (other.dtype, other.shape):
                return f"{name} is {other.dtype}{other.shape}, not {value.dtype}{value.shape}"
            noise = max((_distance(value, run[name]) for run in others), default=0.0)
            finite = np.abs(value[np.isfinite(value)]) if value.dtype.kind == "f" else value
            scale = float(np.max(finite, initial=0)) if value.dtype.kind == "f" else 0.0
            error = _distance(value, other)
            if error > max(self.tolerance * scale, NOISE_FACTOR * noise):
                return f"{name} by {error:.2g} of {scale:.2g}, noise {noise:.2g}"
        return ""


def _is_empty(feed: Mapping[str, Any]) -> bool:
    return any(0 in np.shape(value) for value in feed.values())


def _distance(a: Any, b: Any) -> float:
    """The largest difference; infinite where the forms differ, or what is not finite."""
    if a.shape != b.shape:
        return np.inf
    if a.dtype.kind != "f":
        return 0.0 if np.array_equal(a, b) else np.inf
    there = np.isfinite(a)
    if not np.array_equal(a[~there], b[~there], equal_nan=True) or not np.isfinite(b[there]).all():
        return np.inf
    wide = a[there].astype(np.float64), b[there].astype(np.float64)
    return float(np.abs(wide[0] - wide[1]).max(initial=0))


def _session(proto: onnx.ModelProto, level: Level) -> Session:
    return Session(proto.SerializeToString(), optimizations=level, threads=1)


def _loads(proto: onnx.ModelProto, level: Level) -> bool:
    try:
        _session(proto, level).close()
    except RuntimeFailure:
        return False
    return True


def _tried(session: Session, feed: Mapping[str, Any]) -> Outputs | None:
    try:
        return session.run(feed)
    except RuntimeFailure:
        return None


def _optimized(proto: onnx.ModelProto, text: str) -> tuple[onnx.ModelProto | None, str]:
    """The model after the passes, each verified; or what one of them did wrong."""
    loaded = Model.load(proto)
    runs = run_pipeline(loaded, pipeline(0, text), verify_each=True)
    error = next((f"pass: {run.text}: {run.error}" for run in runs if run.error), "")
    return (None, error) if error else (exporter.to_proto(loaded), "")


def count(proto: onnx.ModelProto) -> int:
    """Nodes but for Constant ones, those of bodies and of each call of a function included."""
    bodies = {(f.domain, f.name): f.node for f in proto.functions}

    def of(nodes: Any) -> int:
        total = 0
        for one in nodes:
            if (one.domain, one.op_type) in bodies:
                total += of(bodies[one.domain, one.op_type])
            elif one.op_type != "Constant":
                total += 1 + sum(of(a.g.node) for a in one.attribute if a.HasField("g"))
        return total

    return of(proto.graph.node)


def level_text(level: int) -> str:
    """The pipeline of a level."""
    return LEVELS[level]
