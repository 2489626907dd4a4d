"""The decisions file: exact numbers, one text for one content, and clear errors."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import decisions as module
from graphopt.decisions import (
    Decisions,
    RegionDecision,
    TensorQuantization,
    load_decisions,
    sha256,
)
from graphopt.errors import OutputError, UsageError
from graphopt.report import host

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
HOST = host()


def made(**fields: Any) -> Decisions:
    content: dict[str, Any] = {
        "graphopt": "0.1.0",
        "created": "2026-01-01T00:00:00Z",
        "source_sha256": "ab" * 32,
        "lossless_fingerprint": "cd" * 16,
        "host": HOST,
        "versions": {"onnxruntime": "1.32.0", "onnx": "1.23.2"},
        "target": "ort-cpu",
        "features": ["avx2"],
        "options": {"max_drop": 0.01, "data": "x.npz"},
        "regions": [],
    }
    return Decisions(**(content | fields))


REGION = RegionDecision(
    root="y",
    nodes=["c", "y"],
    signature="12",
    option="int8",
    reason="1.8x",
    ms_before=0.1 + 0.2,
    ms_after=1 / 3,
    sqnr_db=math.inf,
    bytes_before=400,
    bytes_after=100,
)
FULL = made(
    regions=[REGION, REGION.model_copy(update={"root": "z", "option": "original"})],
    tensors={
        "b": TensorQuantization(scale=0.1, zero_point=128, dtype="uint8"),
        'a\n"ü': TensorQuantization(scale=[0.1, 2.0], zero_point=[0, -1], dtype="int8", axis=1),
    },
    biases={"bias": [1e-45, -0.0, 3.4028235e38]},
)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    for content in (made(), FULL):
        content.save(file)
        assert load_decisions(file) == content
        assert load_decisions(file, "ab" * 32) == content
    assert list(tmp_path.iterdir()) == [file]


@given(st.lists(FLOATS, max_size=8), st.floats(allow_nan=False))
def test_numbers_come_back_bit_for_bit(values: list[float], number: float) -> None:
    region = REGION.model_copy(update={"ms_before": number})
    text = made(biases={"b": values}, regions=[region]).to_json()
    back = Decisions.model_validate(json.loads(text))
    assert struct.pack(f"{len(values)}f", *back.biases["b"]) == struct.pack(
        f"{len(values)}f", *values
    )
    assert all(float(np.float32(value)) == value for value in back.biases["b"])
    found = back.regions[0].ms_before
    assert found is not None
    assert struct.pack("d", found) == struct.pack("d", number)


def test_float32_is_written_short() -> None:
    value = float(np.float32(0.1))
    assert value != 0.1
    text = made(
        tensors={"t": TensorQuantization(scale=value, zero_point=0, dtype="int8")}
    ).to_json()
    assert '"t": {"scale": 0.1, "zero_point": 0' in text
    rounded = TensorQuantization(scale=0.1, zero_point=0, dtype="int8")
    assert rounded.scale == value  # what fits no float32 becomes one at once


def test_the_text_does_not_depend_on_the_order_of_dicts() -> None:
    tensors = list(FULL.tensors.items())
    other = FULL.model_copy(
        update={
            "tensors": dict(reversed(tensors)),
            "options": dict(reversed(FULL.options.items())),
            "versions": dict(reversed(FULL.versions.items())),
        }
    )
    assert other.to_json() == FULL.to_json()


def test_one_changed_entry_is_one_changed_line() -> None:
    tensors = dict(FULL.tensors)
    tensors["b"] = TensorQuantization(scale=0.2, zero_point=128, dtype="uint8")
    before = FULL.to_json().splitlines()
    after = FULL.model_copy(update={"tensors": tensors}).to_json().splitlines()
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert json.loads(FULL.to_json())["regions"][0]["sqnr_db"] == "Infinity"


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": math.nan},
        {"scale": 1e39},
        {"scale": 1e-60},  # no float32 but zero
        {"scale": [1.0], "zero_point": [0]},
        {"scale": [1.0, 2.0], "zero_point": [0], "axis": 0},
        {"scale": [1.0, 2.0], "zero_point": 0, "axis": 0},
        {"axis": 0},
        {"zero_point": 0.5},
        {"colour": "red"},
    ],
)
def test_quantizations_that_make_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        TensorQuantization(**({"scale": 1.0, "zero_point": 0, "dtype": "int8"} | fields))


# ---------------------------------------------------------------------------------- errors


def refused(file: Path, *arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_decisions(file, *arguments)
    said = str(caught.value)
    assert said.startswith(f"decisions {file}: ")
    assert "\n" not in said
    return said.removeprefix(f"decisions {file}: ")


def test_files_that_are_no_decisions(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    assert refused(file) == "No such file or directory"
    assert refused(tmp_path) == "Is a directory"
    for content, said in (
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "JSON, but no decisions of graphopt"),
        (b"{}", "JSON, but no decisions of graphopt"),
        (b'{"schema_version": 1}', "graphopt: Field required"),
        (b'{"schema_version": "one"}', "schema_version: "),
    ):
        file.write_bytes(content)
        assert refused(file).startswith(said)
    content = json.loads(FULL.to_json())
    content["tensors"]["b"]["scale"] = "wide"
    file.write_text(json.dumps(content))
    assert refused(file).startswith("tensors.b.scale")
    content = json.loads(FULL.to_json()) | {"colour": "red"}
    file.write_text(json.dumps(content))
    assert refused(file) == "colour: Extra inputs are not permitted"


def test_newer_files_and_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "d.json"
    FULL.save(file)
    assert refused(file, "00" * 32) == (
        "made for another model (sha256 abababababab..., this one has 000000000000...)"
    )
    content = json.loads(FULL.to_json()) | {"schema_version": 2, "graphopt": "9.9", "later": 1}
    file.write_text(json.dumps(content))
    assert refused(file) == (
        f"format 2 of graphopt 9.9 is newer than what graphopt {module.version()} reads, which is 1"
    )


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        FULL.save(tmp_path)
    with pytest.raises(OutputError):
        FULL.save(tmp_path / "missing" / "d.json")


def test_the_hash_is_of_all_files_in_turn(tmp_path: Path) -> None:
    import hashlib

    one, two = tmp_path / "a", tmp_path / "b"
    one.write_bytes(b"x" * 3_000_000)
    two.write_bytes(b"y")
    assert sha256([one]) == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert sha256([one, two]) == hashlib.sha256(b"x" * 3_000_000 + b"y").hexdigest()
