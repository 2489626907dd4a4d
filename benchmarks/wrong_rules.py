"""Is a wrong rule found? Plants one among the right ones, runs `optimize`, looks at who is blamed.

    python benchmarks/wrong_rules.py [NAME ...] [--verbose]

Twenty rules, each wrong in its own way, are planted one at a time in front of the right ones of
their pass, in real models where they fire. `optimize` has to notice, to blame that rule and no
other, and to write a result that is proved and has the right rules' changes. The exit code is 1
where fewer than 19 of 20 are blamed correctly.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from graphopt.api import optimize
from graphopt.errors import RefusedError
from graphopt.passes.pipelines import pipeline  # which registers the right rules
from graphopt.report import Report
from graphopt.rules import RULES, Const, Ops, Rewrite, RuleFunction, Var, compile_rule, require
from models import fetch

WANTED: Final = 19
_PREFIX: Final = "planted-"


@dataclass(frozen=True)
class Wrong:
    """A wrong rule and the model it is planted in."""

    name: str
    model: str
    function: RuleFunction
    min_opset: int


WRONG: Final[dict[str, Wrong]] = {}


def wrong(name: str, model: str, min_opset: int = 1) -> Callable[[RuleFunction], RuleFunction]:
    """Register a generator function as a wrong rule for a model."""

    def register(function: RuleFunction) -> RuleFunction:
        WRONG[name] = Wrong(name, model, function, min_opset)
        return function

    return register


# -- ppocr_rec_v4 ----------------------------------------------------------------------------------


@wrong("batchnorm-sign", "ppocr_rec_v4", 9)
def batchnorm_sign(
    op: Ops, x: Var, w: Const, gamma: Const, beta: Const, mean: Const, var: Const
) -> Rewrite:
    """BatchNormalization(Conv(x, w)) => Conv(x, w*k, beta + mean*k): the sign is wrong."""
    conv = op.Conv(x, w)
    bn = op.BatchNormalization(conv, gamma, beta, mean, var)
    yield bn
    k = gamma.values / np.sqrt(var.values + bn.attr("epsilon"))
    return op.Conv(
        x, w.values * k.reshape(-1, 1, 1, 1), beta.values + mean.values * k, **conv.attrs
    )


@wrong("batchnorm-no-root", "ppocr_rec_v4", 9)
def batchnorm_no_root(
    op: Ops, x: Var, w: Const, gamma: Const, beta: Const, mean: Const, var: Const
) -> Rewrite:
    """BatchNormalization(Conv(x, w)) => Conv(x, w*k, beta - mean*k), k without the root."""
    conv = op.Conv(x, w)
    bn = op.BatchNormalization(conv, gamma, beta, mean, var)
    yield bn
    k = gamma.values / (var.values + bn.attr("epsilon"))
    return op.Conv(
        x, w.values * k.reshape(-1, 1, 1, 1), beta.values - mean.values * k, **conv.attrs
    )


@wrong("clip-bounds", "ppocr_rec_v4", 11)
def clip_bounds(op: Ops, x: Var, low: Const, high: Const) -> Rewrite:
    """Clip(x, low, high) => Min(Max(x, low), high - 1): a bound is wrong."""
    yield op.Clip(x, low, high)
    return op.Min(op.Max(x, low.values), high.values - 1)


@wrong("sub-operands", "ppocr_rec_v4")
def sub_operands(op: Ops, x: Var, y: Var) -> Rewrite:
    """Sub(x, y) => Add(Neg(x), y): the operands are swapped."""
    yield op.Sub(x, y)
    return op.Add(op.Neg(x), y)


@wrong("layernorm-no-epsilon", "ppocr_rec_v4")
def layernorm_no_epsilon(op: Ops, x: Var, eps: Const) -> Rewrite:
    """Sqrt(Add(x, eps)) => Pow(x, 0.5): the epsilon is lost."""
    yield op.Sqrt(op.Add(x, eps))
    require(eps.scalar() < 1e-3, "no epsilon")
    return op.Pow(x, np.float32(0.5))


@wrong("mul-1.001", "ppocr_rec_v4")
def mul_1001(op: Ops, x: Var, c: Const) -> Rewrite:
    """Mul(x, c) => Div(x, 1/(1.001*c)): a thousandth too much."""
    yield op.Mul(x, c)
    require((c.values != 0).all() and c.values.dtype.kind == "f", "cannot be divided by")
    return op.Div(x, 1 / (1.001 * c.values))


# -- silero_vad: all of it in bodies of If ---------------------------------------------------------


@wrong("relu-identity", "silero_vad")
def relu_identity(op: Ops, x: Var) -> Rewrite:
    """Relu(x) => x: it is no identity."""
    yield op.Relu(x)
    return x


@wrong("conv-no-bias", "silero_vad")
def conv_no_bias(op: Ops, x: Var, w: Const, b: Const) -> Rewrite:
    """Conv(x, w, b) => Conv(x, w): the bias is lost."""
    conv = op.Conv(x, w, b)
    yield conv
    return op.Conv(x, w, **conv.attrs)


@wrong("pow-sign", "silero_vad")
def pow_sign(op: Ops, x: Var) -> Rewrite:
    """Pow(x, 2) => Mul(x, Abs(x)): wrong below zero."""
    yield op.Pow(x, 2.0)
    return op.Mul(x, op.Abs(x))


@wrong("sigmoid-hard", "silero_vad")
def sigmoid_hard(op: Ops, x: Var) -> Rewrite:
    """Sigmoid(x) => HardSigmoid(x): near it, but not it."""
    yield op.Sigmoid(x)
    return op.HardSigmoid(x, alpha=0.25, beta=0.5)


@wrong("gather-shift", "silero_vad")
def gather_shift(op: Ops, x: Var, i: Const) -> Rewrite:
    """Gather(x, i) => Gather(x, i - 1): off by one."""
    gather = op.Gather(x, i)
    yield gather
    require((i.values >= 0).all(), "from the end")
    return op.Gather(x, i.values - 1, **gather.attrs)


# -- nudenet_yolov8n -------------------------------------------------------------------------------


@wrong("silu-hard", "nudenet_yolov8n")
def silu_hard(op: Ops, x: Var) -> Rewrite:
    """Mul(x, Sigmoid(x)) => Mul(x, HardSigmoid(x)): HardSwish is not SiLU."""
    yield op.Mul(x, op.Sigmoid(x))
    return op.Mul(x, op.HardSigmoid(x, alpha=1 / 6, beta=0.5))


@wrong("concat-order", "nudenet_yolov8n", 13)
def concat_order(op: Ops, x: Var, y: Var, z: Var) -> Rewrite:
    """Concat(x, y, z) => Concat(x, z, y, nothing): the order is wrong."""
    concat = op.Concat(x, y, z)
    yield concat
    require(x.dtype.kind == "f", "a shape, which would not fit")
    axis = np.array([concat.attr("axis")])
    nothing = op.Slice(x, np.array([0]), np.array([0]), axis)
    return op.Concat(x, z, y, nothing, **concat.attrs)


@wrong("maxpool-average", "nudenet_yolov8n")
def maxpool_average(op: Ops, x: Var) -> Rewrite:
    """MaxPool(x) => AveragePool(x): another pooling."""
    pool = op.MaxPool(x)
    yield pool
    kept = {name: pool.attrs[name] for name in ("kernel_shape", "pads", "strides")}
    return op.AveragePool(x, **kept)


@wrong("add-dropped", "nudenet_yolov8n")
def add_dropped(op: Ops, x: Var, y: Var) -> Rewrite:
    """Add(x, y) => Identity(x): the skip connection is lost."""
    yield op.Add(x, y)
    require(x.dtype.kind == "f", "a shape, which would not fit")
    return op.Identity(x)


# -- bert_base_ts ----------------------------------------------------------------------------------


@wrong("matmul-transposed", "bert_base_ts")
def matmul_transposed(op: Ops, x: Var, w: Const, b: Const) -> Rewrite:
    """Add(MatMul(x, w), b) => Sub(MatMul(x, transposed w), -b): the weights are transposed."""
    yield op.Add(op.MatMul(x, w), b)
    require(len(w.shape) == 2 and w.shape[0] == w.shape[1], "the shapes tell")
    return op.Sub(op.MatMul(x, w.values.T), -b.values)


@wrong("softmax-axis", "bert_base_ts", 13)
def softmax_axis(op: Ops, x: Var) -> Rewrite:
    """Softmax(x, axis=-1) => Softmax(x, axis=-2): the wrong axis."""
    yield op.Softmax(x, axis=-1)
    return op.Softmax(x, axis=-2)


@wrong("layernorm-axis", "bert_base_ts", 17)
def layernorm_axis(op: Ops, x: Var, gamma: Const, beta: Const) -> Rewrite:
    """LayerNormalization(x, gamma, beta) => one over two axes, each feature alike."""
    yield op.LayerNormalization(x, gamma, beta, axis=-1)
    mean = op.ReduceMean(x, axes=[-2, -1], keepdims=1)
    centred = op.Sub(x, mean)
    square = op.ReduceMean(op.Mul(centred, centred), axes=[-2, -1], keepdims=1)
    normed = op.Div(centred, op.Sqrt(op.Add(square, np.float32(1e-5))))
    return op.Add(op.Mul(normed, gamma.values), beta.values)


@wrong("erf-tanh", "bert_base_ts", 13)
def erf_tanh(op: Ops, x: Var) -> Rewrite:
    """Erf(x) => Tanh(1.128*x): close around zero only."""
    yield op.Erf(x)
    return op.Tanh(op.Mul(x, np.float32(1.128379)))


@wrong("div-operands", "bert_base_ts")
def div_operands(op: Ops, x: Var, y: Const) -> Rewrite:
    """Div(x, y) => Mul(x, y): the reciprocal is forgotten."""
    yield op.Div(x, y)
    return op.Mul(x, y.values)


# -- runs ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted(fault: Wrong, pass_name: str = "canonicalize") -> Iterator[str]:
    """The wrong rule stands in front of all right ones, as long as this lasts; gives its name."""
    name = _PREFIX + fault.name
    family = {"canonicalize": "canonicalize", "fuse": "fusion"}[pass_name]
    fault.function.__module__ = f"graphopt.passes.{family}.planted"
    pipeline(2, None)
    right = dict(RULES)
    RULES.clear()
    RULES[name] = compile_rule(name, fault.function, fault.min_opset)
    RULES.update(right)
    try:
        yield name
    finally:
        del RULES[name]


@dataclass(frozen=True)
class Found:
    """What `optimize` made of one wrong rule."""

    fault: Wrong
    report: Report
    reproduces: bool
    right: int  # changes of right rules without the planted one
    seconds: float

    @property
    def blamed(self) -> list[str]:
        return [record.rule for record in self.report.blame]

    @property
    def kept(self) -> int:
        """Changes in the result that right rules made."""
        changes = (change for step in self.report.passes for change in step.changes)
        return sum(not change.rule.startswith(_PREFIX) for change in changes)

    @property
    def planted_kept(self) -> int:
        """Changes of the wrong rule that are in the result: those that do no harm."""
        changes = (change for step in self.report.passes for change in step.changes)
        return sum(change.rule.startswith(_PREFIX) for change in changes)

    @property
    def is_right(self) -> bool:
        return (
            set(self.blamed) == {_PREFIX + self.fault.name}
            and self.report.validation.verdict == "proved"
            and self.report.target is not None
            and self.reproduces
        )


def path_of(model: str) -> Path:
    """The model's file, fetched or filled if need be."""
    return fetch.fetch(model) if model in fetch.names() else fetch.architecture(model)


def run(fault: Wrong, source: Path, right: int) -> Found:
    """Plant the rule, optimise, and try the reproducer."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, planted(fault):
        out = Path(folder) / "out.onnx"
        try:
            report = optimize(source, out).report
        except RefusedError as error:
            if error.report is None:
                raise
            report = error.report
        return Found(fault, report, _reproduces(report), right, time.perf_counter() - started)


def _reproduces(report: Report) -> bool:
    """True where the saved pass on the saved model makes the change that was blamed."""
    if not report.blame:
        return False
    first = report.blame[0]
    words = (Path(first.reproducer) / "pipeline.txt").read_text("utf-8").split("'")
    passes = words[1] if len(words) > 1 else words[0].split()[-1]
    before = Path(first.reproducer) / "before.onnx"
    again = optimize(before, passes=passes, validate=False).report
    changes = (change for step in again.passes for change in step.changes)
    return any((c.rule, c.root) == (first.rule, first.root) for c in changes)


COLUMNS: Final = "rule", "model", "blamed", "scope", "verdict", "kept", "error", "seconds"


def table(outcomes: list[Found]) -> Iterator[str]:
    """One line a rule: who was blamed, what was denied, what was kept of the right changes."""
    yield "{:22}{:17}{:>7}  {:18}{:10}{:>11}{:>10}{:>9}".format(*COLUMNS)
    for one in outcomes:
        records = one.report.blame
        scopes = Counter(record.scope for record in records)
        said = ", ".join(f"{n} {scope}" for scope, n in scopes.items()) or "-"
        verdict = "right" if one.is_right else "WRONG"
        error = max((record.error for record in records), default=0.0)
        yield (
            f"{one.fault.name:22}{one.fault.model:17}{verdict:>7}  {said:18}"
            f"{one.report.validation.verdict:10}{one.kept:>5}/{one.right:<5}"
            f"{error:>10.2g}{one.seconds:>9.1f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(WRONG))
    parser.add_argument("--verbose", action="store_true", help="print what was said of each")
    options = parser.parse_args()
    chosen = [WRONG[name] for name in options.names or WRONG]
    right: dict[str, int] = {}
    outcomes = []
    for fault in chosen:
        source = path_of(fault.model)
        if fault.model not in right:
            clean = optimize(source, validate=False).report
            right[fault.model] = sum(len(step.changes) for step in clean.passes)
        outcomes.append(run(fault, source, right[fault.model]))
        print(f"{fault.name}: done", file=sys.stderr, flush=True)
        if options.verbose:
            for record in outcomes[-1].report.blame:
                print(f"  {record.message}", file=sys.stderr, flush=True)
            print(f"  {outcomes[-1].report.validation.reason}", file=sys.stderr, flush=True)
    print("\n".join(table(outcomes)))
    found = sum(one.is_right for one in outcomes)
    print(f"\n{found} of {len(outcomes)} blamed correctly, the rest kept and proved")
    return 0 if found >= min(WANTED, len(outcomes)) else 1


if __name__ == "__main__":
    sys.exit(main())
