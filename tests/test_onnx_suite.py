"""ONNX's own backend tests: what holds of the original in onnxruntime holds of the result.

Every case goes through `optimize` at levels 0 and 2. Cases that onnxruntime does not run, or on
which the original itself misses the expected outputs (random ones), only have to come through
without an exception.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import graphopt
from graphopt.errors import GraphoptError, RuntimeFailure
from graphopt.judge import TOLERANCES
from graphopt.runtime import Level, Session, limits
from tests import graphs

CHUNKS = 8
NODE_CASES_AT_LEAST = 1300  # that onnxruntime runs with the expected outputs, of 1,884
RUNS: tuple[Level, ...] = ("off", "default")
DataSet = tuple[list[Any], list[Any]]


def data_sets(case: graphs.Case, model: onnx.ModelProto) -> list[DataSet]:
    test: Any = case.test
    if test.data_sets is not None:
        return list(test.data_sets)
    folders = sorted(Path(test.model_dir).glob("test_data_set_*"))
    defaults = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in defaults]
    return [
        (list(_read(f, "input", inputs)), list(_read(f, "output", list(model.graph.output))))
        for f in folders
    ]


def _read(folder: Path, kind: str, infos: list[onnx.ValueInfoProto]) -> Iterator[Any]:
    for index, info in enumerate(infos):
        data = (folder / f"{kind}_{index}.pb").read_bytes()
        if info.type.HasField("sequence_type"):
            yield numpy_helper.to_list(onnx.SequenceProto.FromString(data))
        elif info.type.HasField("optional_type"):
            yield numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
        else:
            yield numpy_helper.to_array(onnx.TensorProto.FromString(data))


def same(expected: Any, found: Any, rtol: float, atol: float) -> bool:
    if expected is None or found is None:
        return expected is found
    if isinstance(expected, list | tuple):
        return len(expected) == len(found) and all(
            same(e, f, rtol, atol) for e, f in zip(expected, found, strict=True)
        )
    if isinstance(expected, dict):
        return bool(expected == found)
    expected, found = np.asarray(expected), np.asarray(found)
    if expected.shape != found.shape:
        return False
    if expected.dtype.kind in "OSU":
        return [_text(e) for e in expected.flat] == [_text(f) for f in found.flat]
    if expected.dtype != found.dtype:
        return False
    if (
        expected.dtype == np.float16
    ):  # ONNX's 1e-3 is one unit in the last place: less than rounding
        rtol = max(rtol, TOLERANCES["float16"])
    if expected.dtype.kind == "V" or expected.dtype.isbuiltin != 1:  # ml_dtypes
        expected, found = expected.astype(np.float64), found.astype(np.float64)
    return bool(np.allclose(expected, found, rtol=rtol, atol=atol, equal_nan=True))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class Judge:
    """Whether a model gives a case's expected outputs, asked once for equal bytes."""

    def __init__(self, case: graphs.Case, original: onnx.ModelProto) -> None:
        self.test: Any = case.test
        self.data = data_sets(case, original)
        defaults = {tensor.name for tensor in original.graph.initializer}
        self.inputs = [i.name for i in original.graph.input if i.name not in defaults]
        self.known: dict[bytes, dict[Level, bool | None]] = {}

    def __call__(self, model: onnx.ModelProto) -> dict[Level, bool | None]:
        """By onnxruntime's level: True or False, None where it does not run the model."""
        key = model.SerializeToString(deterministic=True)
        if key not in self.known:
            copy = onnx.ModelProto.FromString(key)
            copy.ir_version = min(copy.ir_version, limits().ir)
            data = copy.SerializeToString()
            self.known[key] = {level: self.gives_expected(data, level) for level in RUNS}
        return self.known[key]

    def gives_expected(self, model: bytes, level: Level) -> bool | None:
        try:
            with Session(model, optimizations=level, threads=1) as session:
                for inputs, outputs in self.data:
                    feed = dict(zip(self.inputs, inputs, strict=False))
                    found = list(session.run(feed).values())
                    if len(found) != len(outputs) or not all(
                        same(e, f, self.test.rtol, self.test.atol)
                        for e, f in zip(outputs, found, strict=True)
                    ):
                        return False
        except RuntimeFailure:
            return None
        return True


def check(cases: list[graphs.Case]) -> Counter[str]:
    """Counts what held before and after; fails with the name of every case that broke."""
    counts: Counter[str] = Counter(cases=len(cases))
    broken: list[str] = []
    for case in cases:
        original = case.proto()
        judge = Judge(case, original)
        before = judge(original)
        counts["before"] += before["off"] is True
        counts["not run by onnxruntime"] += before["off"] is None
        held = before["off"] is True
        for optimisation in (0, 2):
            try:
                result = graphopt.optimize(case.source, level=optimisation, validate=False)
                made = result.proto()
            except GraphoptError as error:
                broken.append(f"{case.name}, level {optimisation}: refused: {error}")
                held = False
                continue
            except Exception:
                broken.append(f"{case.name}, level {optimisation}: {traceback.format_exc()}")
                held = False
                continue
            if optimisation == 0 and made != original:
                broken.append(f"{case.name}: level 0 is no round trip")
            broken += [
                f"{case.name}, level {optimisation}: pass {run.text} failed: {run.error}"
                for run in result.report.passes
                if run.error
            ]
            after = judge(made)
            for level in RUNS:
                if before[level] is True and after[level] is not True:
                    broken.append(f"{case.name}, level {optimisation}, onnxruntime {level}")
                    held = False
            counts["changed"] += optimisation == 2 and made != original
        counts["after"] += held
    print(dict(counts))
    assert not broken, "\n".join(broken)
    assert counts["after"] == counts["before"]
    return counts


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_node_cases(chunk: int) -> None:
    """Every eighth case, so that each chunk has its share of what onnxruntime runs."""
    cases = sorted((c for c in graphs.onnx_cases() if c.kind == "node"), key=lambda c: c.name)
    counts = check(cases[chunk::CHUNKS])
    assert counts["after"] >= NODE_CASES_AT_LEAST / CHUNKS


@pytest.mark.parametrize(
    ("kind", "least"), [("simple", 17), ("pytorch-converted", 59), ("pytorch-operator", 24)]
)
def test_whole_models(kind: str, least: int) -> None:
    """onnxruntime refuses 40 of the 140: opset 6 and older, training, locales it does not find."""
    counts = check([case for case in graphs.onnx_cases() if case.kind == kind])
    assert counts["after"] >= least


def test_the_judge_sees_a_difference() -> None:
    """Else the tests above would prove nothing."""
    case = next(c for c in graphs.onnx_cases() if c.name == "test_relu")
    original = case.proto()
    judge = Judge(case, original)
    assert judge(original) == {"off": True, "default": True}
    wrong = onnx.ModelProto()
    wrong.CopyFrom(original)
    wrong.graph.node[0].op_type = "Abs"
    assert judge(wrong) == {"off": False, "default": False}
    wrong.graph.node[0].domain = "nobody"
    assert judge(wrong) == {"off": None, "default": None}
