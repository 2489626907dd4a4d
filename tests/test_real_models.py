"""Real models, end to end: optimised ones are proved, and every kind of fault is found in each."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx
import pytest

from benchmarks.planted_faults import KINDS, Kind, Outcome, outcome
from graphopt.api import optimize
from models import digits, fetch

pytestmark = pytest.mark.slow

ARCHITECTURES = ("efficientnet_b0_ts", "mobilenetv3_large_dynamo")
NAMES = (*digits.FLOORS, *fetch.names(), *ARCHITECTURES)

# Seeds of faults that run in onnxruntime and change what the model computes; 0 where none is given.
# What seed 0 plants in these is refused by onnxruntime, or is no fault, such as the flattening of
# an axis of size 1.
SEEDS: dict[tuple[str, Kind], int] = {
    ("mlp", "attribute"): 2,
    ("cnn", "attribute"): 6,
    ("gru", "swap"): 1,
    ("vit", "attribute"): 7,
    ("vit", "swap"): 7,
    ("ppocr_det_v4", "attribute"): 1,
    ("ppocr_rec_v4", "swap"): 2,
    ("ppocr_cls_v2", "attribute"): 3,
    ("ppocr_cls_v2", "swap"): 10,
    ("silero_vad", "attribute"): 9,
    ("silero_vad", "swap"): 9,
    ("silero_vad_16k_op15", "attribute"): 9,
    ("silero_vad_16k_op15", "swap"): 4,
    ("silero_vad_ifless_op18", "attribute"): 2,
    ("silero_vad_ifless_op18", "swap"): 11,
    ("silero_vad_half", "attribute"): 2,
    ("silero_vad_half", "swap"): 1,
    ("magika_v3_3", "attribute"): 4,
    ("magika_v3_3", "swap"): 10,
    ("nudenet_yolov8n", "swap"): 3,
    ("paraphrase_minilm_l3", "attribute"): 2,
    ("paraphrase_minilm_l3", "swap"): 4,
    ("ddddocr_common", "swap"): 2,
    ("open_nsfw", "swap"): 1,
    ("mobilenetv3_large_dynamo", "attribute"): 4,
}

# Models in which hardly any fault of the kind runs: onnxruntime refuses them.
REFUSED: frozenset[tuple[str, Kind]] = frozenset(
    {
        ("mlp", "swap"),
        ("cnn", "swap"),
        ("gru", "attribute"),
        ("nudenet_yolov8n", "attribute"),
        ("ddddocr_common", "attribute"),
        ("open_nsfw", "attribute"),
        ("basic_pitch", "attribute"),
        ("basic_pitch", "swap"),
        ("efficientnet_b0_ts", "swap"),
        ("mobilenetv3_large_dynamo", "swap"),
    }
)


@functools.cache
def path(name: str) -> Path:
    if name in digits.FLOORS:
        return digits.path(name)
    if name in ARCHITECTURES:
        return fetch.architecture(name)
    try:
        return fetch.fetch(name)
    except fetch.UnreachableError as error:
        pytest.skip(f"NOT TESTED, {name} cannot be fetched: {error}")


def ports(model: onnx.ModelProto) -> list[tuple[str, bytes]]:
    """Inputs without a default and outputs, in order, with their types."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    required = [info for info in model.graph.input if info.name not in defaults]
    return [(p.name, p.type.SerializeToString()) for p in (*required, *model.graph.output)]


@pytest.mark.parametrize("name", NAMES)
def test_optimised_models_are_proved_and_keep_their_interface(name: str, tmp_path: Path) -> None:
    report = optimize(path(name), tmp_path / "out.onnx", level=2).report
    assert report.validation.verdict == "proved"
    assert all(output.verdict == "proved" for output in report.validation.outputs)
    assert report.warnings == []
    original, written = onnx.load(path(name)), onnx.load(tmp_path / "out.onnx")
    assert ports(written) == ports(original)
    assert written.ir_version == original.ir_version
    assert report.after.nodes <= report.before.nodes


@pytest.mark.parametrize("name", NAMES)
def test_level_0_loses_nothing(name: str, tmp_path: Path) -> None:
    optimize(path(name), tmp_path / "out.onnx", level=0, validate=False)
    original, written = onnx.load(path(name)), onnx.load(tmp_path / "out.onnx")
    assert written.SerializeToString(deterministic=True) == original.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_planted_faults_are_found(name: str, kind: Kind) -> None:
    found = outcome(name, path(name), kind, SEEDS.get((name, kind), 0))
    assert isinstance(found, Outcome), "there is no place for such a fault"
    expected = "refused" if (name, kind) in REFUSED else "caught"
    assert found.verdict == expected, f"{found.what}: {found.record.reason}"
