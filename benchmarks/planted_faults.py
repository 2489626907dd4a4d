"""Does validation see small faults? Plants them in real models and counts those that get through.

    python benchmarks/planted_faults.py [--models NAME ...] [--per-kind 4] [--seed 0]

Each fault is planted in a copy of a model, bodies of If and Loop included, and the copy is compared
with the original as `optimize` does. There are three kinds: one weight tensor times 1.001, one
attribute changed, two inputs of a node swapped. Those that onnxruntime refuses to load or to run
are `refused` and do not count among the faults per kind. One that is not caught has

* `no effect` where both models give the same bits on every feed: it may be no fault at all;
* `below noise` where on no feed its effect exceeds what onnxruntime's own optimisations do to the
  original;
* `in tolerance` where it does, but stays below what the element type is allowed;
* and else is `missed`, which is a failure (exit 1).

Models are digits, the catalogue (see models/fetch.py) and six architectures unless named.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from graphopt import output
from graphopt.ir import Model
from graphopt.judge import NOISE_FACTOR
from graphopt.report import ValidationRecord
from graphopt.validate import validate_files
from models import digits, fetch

Kind = Literal["weight", "attribute", "swap"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
ARCHITECTURES: Final = (
    "efficientnet_b0_ts",
    "mobilenetv3_large_dynamo",
    "mobilenetv3_large_ts",
    "resnet50_dynamoopt",
    "convnext_tiny_ts",
    "distilbert_ts",
)

# Effect and noise of a feed together are at most twice the noise, where 4 times is allowed. The
# largest effect and the largest noise of a record may be of different feeds.
_USED_BY_NOISE: Final = 2 / NOISE_FACTOR
_TRIES: Final = 4  # for each fault wanted: many are refused, which is no test of validation
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
_COMMUTATIVE: Final = frozenset(
    {"Add", "And", "Equal", "Max", "Mean", "Min", "Mul", "Or", "Sum", "Xor"}
)
# Attributes without a meaning at inference, or in the mode that the models use.
_INERT: Final = frozenset(
    {
        "allowzero",
        "cubic_coeff_a",
        "exclude_outside",
        "extrapolation_value",
        "momentum",
        "noop_with_empty_axes",
        "storage_order",
    }
)
_FLAGS: Final = frozenset(
    {
        "batch_first",
        "ceil_mode",
        "count_include_pad",
        "fmod",
        "keepdims",
        "largest",
        "linear_before_reset",
        "reverse",
        "select_last_index",
        "sorted",
        "transA",
        "transB",
    }
)
_OPERATORS_LEFT_OUT: Final = frozenset({"Cast", "Constant"})  # their attributes are types, values


@dataclass(frozen=True)
class Outcome:
    """What validation made of one fault."""

    model: str
    kind: Kind
    what: str
    record: ValidationRecord
    seconds: float

    @property
    def effect(self) -> float:
        """The largest error with optimisations off, relative to how much an output varies."""
        return max((o.error_off for o in self.record.outputs), default=0.0)

    @property
    def used(self) -> float:
        """The largest share of the allowed error on any feed."""
        return max((o.used for o in self.record.outputs), default=0.0)

    @property
    def verdict(self) -> str:
        if self.record.verdict == "failed":
            return "caught" if self.record.outputs else "refused"
        if self.record.verdict == "unproven":
            return "unproven"
        if self.effect == 0:
            return "no effect"
        if self.effect <= self.record.noise and self.used <= _USED_BY_NOISE:
            return "below noise"
        return "in tolerance" if self.effect <= self.record.tolerance else "missed"


def plant(original: Path, kind: Kind, seed: int, target: Path) -> str | None:
    """Write a copy of the model with one fault; says what it is, None where there is no place."""
    model = Model.load(original)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    rng = random.Random(f"{kind} {seed}")
    nodes = list(_needed(proto.graph))
    if kind == "weight":
        what = _scale_weight(proto, nodes, model, rng)
    elif kind == "attribute":
        what = _change_attribute(nodes, _kernels(proto), rng)
    else:
        what = _swap_inputs(nodes, rng)
    if what is not None:
        output.write(proto, model.store, target)
    return what


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for body in _bodies(node):
        yield from (info.name for info in body.output)
        for inner in body.node:
            yield from _reads(inner)


def _needed(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes that an output depends on, with those in their bodies."""
    producers = {name: node for node in graph.node for name in node.output if name}
    pending = [info.name for info in graph.output]
    seen: set[int] = set()
    while pending:
        node = producers.get(pending.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        pending.extend(_reads(node))
    for node in graph.node:
        if id(node) in seen:
            yield node
            for body in _bodies(node):
                yield from _needed(body)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body)


def _kernels(proto: onnx.ModelProto) -> dict[str, Sequence[int]]:
    """Shapes of initializers, by name: a dilation of a 1x1 kernel means nothing."""
    return {t.name: t.dims for graph in _graphs(proto.graph) for t in graph.initializer}


def _scale_weight(
    proto: onnx.ModelProto, nodes: list[onnx.NodeProto], model: Model, rng: random.Random
) -> str | None:
    read = {name for node in nodes for name in node.input}
    places = [
        tensor
        for graph in _graphs(proto.graph)
        for tensor in graph.initializer
        if tensor.data_type in _FLOATS and tensor.name in read
    ]
    for node in nodes:
        stated = (a for a in node.attribute if node.op_type == "Constant" and a.name == "value")
        places += [a.t for a in stated if a.t.data_type in _FLOATS]
    rng.shuffle(places)
    for tensor in places:
        values = model.store.array(tensor)
        scaled = (values.astype(np.float64) * 1.001).astype(values.dtype)
        # zeros, infinities and what is too coarse to change would be no fault
        if np.isfinite(values).all() and (scaled != values).any():
            what = f"{tensor.name or 'Constant'} {list(tensor.dims)}"
            tensor.CopyFrom(onnx.numpy_helper.from_array(scaled, tensor.name))
            return what
    return None


def _change_attribute(
    nodes: list[onnx.NodeProto], kernels: dict[str, Sequence[int]], rng: random.Random
) -> str | None:
    places = [
        (node, attribute)
        for node in nodes
        if node.op_type not in _OPERATORS_LEFT_OUT
        for attribute in node.attribute
        if attribute.name not in _INERT and not _is_inert_dilation(node, attribute, kernels)
    ]
    kinds = (AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.FLOATS, AttributeProto.INTS)
    places = [
        (node, a)
        for node, a in places
        if a.type in kinds[:2] or (a.type in kinds and (a.ints or a.floats))
    ]
    if not places:
        return None
    node, attribute = rng.choice(places)
    if attribute.type == AttributeProto.FLOAT:
        attribute.f = attribute.f * 1.5 + 0.1
    elif attribute.type == AttributeProto.INT:
        attribute.i = 1 - attribute.i if attribute.name in _FLAGS else attribute.i + 1
    elif attribute.type == AttributeProto.INTS:
        attribute.ints[0] += 1
    else:
        attribute.floats[0] += 0.1
    return f"{_label(node)}.{attribute.name}"


def _is_inert_dilation(
    node: onnx.NodeProto, attribute: onnx.AttributeProto, kernels: dict[str, Sequence[int]]
) -> bool:
    if attribute.name != "dilations" or len(node.input) < 2:
        return False
    stated = [a.ints for a in node.attribute if a.name == "kernel_shape"]
    sizes = stated[0] if stated else kernels.get(node.input[1], ())[2:]
    return bool(sizes) and sizes[0] == 1


def _swap_inputs(nodes: list[onnx.NodeProto], rng: random.Random) -> str | None:
    places = [
        node
        for node in nodes
        if node.op_type not in _COMMUTATIVE
        and len(node.input) >= 2
        and node.input[0]
        and node.input[1]
        and node.input[0] != node.input[1]
    ]
    if not places:
        return None
    node = rng.choice(places)
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return _label(node)


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def outcome(name: str, path: Path, kind: Kind, seed: int) -> Outcome | None:
    """Plant one fault and validate; None where the model has no place for it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "faulty.onnx"
        what = plant(path, kind, seed, target)
        if what is None:
            return None
        started = time.perf_counter()
        record = validate_files(path, target)
        return Outcome(name, kind, what, record, time.perf_counter() - started)


def outcomes_of(name: str, path: Path, kind: Kind, wanted: int, seed: int) -> list[Outcome]:
    """Faults until `wanted` of them run in onnxruntime, or as many as the model gives."""
    found: list[Outcome] = []
    for number in range(_TRIES * wanted):
        one = outcome(name, path, kind, seed * 1000 + number)
        if one is not None and all(one.what != other.what for other in found):
            found.append(one)
        if sum(one.verdict != "refused" for one in found) == wanted:
            break
    return found


def paths(names: Sequence[str]) -> dict[str, Path]:
    """Where the named models are, fetched if need be; all of the default ones without names."""
    chosen = list(names) or [*digits.FLOORS, *fetch.names(), *ARCHITECTURES]
    found = {}
    for name in chosen:
        if name in digits.FLOORS:
            found[name] = digits.path(name)
        elif name in fetch.names():
            found[name] = fetch.fetch(name)
        else:
            found[name] = fetch.architecture(name)
    return found


COLUMNS: Final = (
    "caught",
    "refused",
    "unproven",
    "no effect",
    "below noise",
    "in tolerance",
    "missed",
)


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One line per model and kind, and one per kind for all."""
    yield f"{'model':26}{'kind':11}{'planted':>8}" + "".join(f"{c:>13}" for c in COLUMNS)
    rows: dict[tuple[str, str], Counter[str]] = {}
    for one in outcomes:
        for model in (one.model, "all"):
            rows.setdefault((model, one.kind), Counter())[one.verdict] += 1
    for model, kind in sorted(rows, key=lambda row: row[0] == "all"):
        counts = rows[model, kind]
        cells = "".join(f"{counts[column] or '-':>13}" for column in COLUMNS)
        yield f"{model:26}{kind:11}{counts.total():>8}{cells}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME")
    parser.add_argument(
        "--per-kind", type=int, default=4, help="faults that run, of each kind in each model"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes = []
    for name, path in paths(options.models).items():
        for kind in KINDS:
            found = outcomes_of(name, path, kind, options.per_kind, options.seed)
            outcomes += found
            counts = Counter(one.verdict for one in found)
            told = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
            print(f"{name} {kind}: {told or 'no place'}", file=sys.stderr, flush=True)
    print("\n".join(table(outcomes)))
    escaped = [one for one in outcomes if one.verdict not in ("caught", "refused")]
    if escaped:
        print("\nnot caught:")
        print("\n".join(map(_line, escaped)))
    return 1 if any(one.verdict == "missed" for one in outcomes) else 0


def _line(one: Outcome) -> str:
    return (
        f"  {one.verdict}: {one.model} {one.kind} {one.what}: error {one.effect:.2g}, "
        f"noise {one.record.noise:.2g}, {one.used:.2f} of what is allowed, {one.seconds:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
