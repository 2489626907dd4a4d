"""The decisions file: every lossy choice that was made for a model, so that it can be made again.

Choices depend on measurements, which differ from run to run and from machine to machine; the file
says what was chosen and why, and holds every number that the result depends on, so that replaying
it gives the same bytes. Numbers are written such that they come back exactly: those of 32 bits with
as few digits as tell them from their neighbours. Keys have one order and entries one line each, so
that files can be compared as text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

import numpy as np
from pydantic import AfterValidator, Field, PlainSerializer, ValidationError, model_validator

from graphopt import output
from graphopt.codebook_report import CodebookDecision
from graphopt.errors import UsageError
from graphopt.low_rank_report import LowRankDecision
from graphopt.record import Record
from graphopt.report import Host, version

SCHEMA_VERSION: Final = 1
WEIGHTS: Final = ".npz"  # behind the name of a file: numbers that steps fitted, beside it
_CHUNK: Final = 1 << 20  # bytes that are hashed at a time
_ENTRIES: Final = frozenset({"regions", "tensors", "biases"})


def _nearest(value: float) -> float:
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not math.isfinite(rounded):
        raise ValueError(f"{value} is no finite number of 32 bits")
    return rounded


def _shortest(value: float) -> float:
    """The double with the fewest digits that rounds to this float32."""
    return float(str(np.float32(value)))


Float32 = Annotated[float, AfterValidator(_nearest), PlainSerializer(_shortest)]
"""A number that fits 32 bits; whatever is given is rounded to such."""


Scale = Annotated[Float32, Field(gt=0)]


class TensorQuantization(Record):
    """How the values of one tensor map to integers: real = scale * (integer - zero_point)."""

    scale: Scale | list[Scale] = Field(description="a list: one per channel along `axis`")
    zero_point: int | list[int] = Field(description="as many as there are scales")
    dtype: str = Field(description="element type as ONNX calls it, in lower case: uint8, int4")
    axis: int | None = Field(default=None, description="None: one scale for the whole tensor")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        scales, points = np.shape(self.scale), np.shape(self.zero_point)
        if scales != points:
            raise ValueError(f"{scales} scales and {points} zero points")
        if bool(scales) != (self.axis is not None):
            raise ValueError("scales per channel need an axis, and only they do")
        return self


class RegionDecision(Record):
    """What was chosen for one region, and what for."""

    root: str
    nodes: list[str] = Field(description="the first output of every node, in file order")
    signature: str = Field(description="equal for regions that cost the same")
    option: str = Field(description="what was chosen; 'original': the region is left as it is")
    reason: str
    ms_before: float | None = Field(default=None, description="of the region, as measured here")
    ms_after: float | None = None
    sqnr_db: float | None = Field(default=None, description="of the region's outputs")
    bytes_before: int | None = Field(default=None, description="of the weights")
    bytes_after: int | None = None


class PruningDecision(Record):
    """What was pruned; weights that were fitted lie in the file of weights."""

    candidate: str
    found: str
    zeros: bool = Field(description="single weights were set to zero")
    recovery: str
    importance: str
    groups: dict[str, int] = Field(description="units that were taken out, by group")


class Decisions(Record):
    """All choices made for one model."""

    schema_version: int = SCHEMA_VERSION
    graphopt: str = Field(description="the version that wrote it")
    created: str = Field(description="ISO 8601, UTC")
    source_sha256: str = Field(description="of the model file that the choices were made for")
    lossless_fingerprint: str = Field(description="of the graph after the lossless passes")
    host: Host
    versions: dict[str, str] = Field(description="of packages that the choices depend on")
    target: str
    features: list[str] = Field(description="of the CPU that the choices are for")
    options: dict[str, str | int | float | bool | None] = Field(
        description="what the user asked for"
    )
    candidate: str = Field(default="", description="what is kept, as the report calls it")
    found: str = Field(default="", description="how it compared with the original, in words")
    pruning: PruningDecision | None = Field(default=None, description="done after low rank")
    low_rank: LowRankDecision | None = Field(default=None, description="what is done first")
    codebook: CodebookDecision | None = Field(default=None, description="what is done last")
    weights: str = Field(
        default="", description="sha256 of the file of weights beside, .npz behind the name"
    )
    regions: list[RegionDecision]
    tensors: dict[str, TensorQuantization] = Field(default={}, description="by value name")
    biases: dict[str, list[Float32]] = Field(
        default={}, description="biases as corrected, by value name"
    )

    def to_json(self) -> str:
        """The file's text: one line per field, and per entry of a field that holds many."""
        content = json.loads(self.model_dump_json())  # where infinite numbers are texts
        for name in ("versions", "options", "tensors", "biases"):
            content[name] = dict(sorted(content[name].items()))
        return "".join(_lines(content))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises OutputError if it cannot be written."""
        with output.Target(path) as target, output.output_errors(path):
            target.staged.write_text(self.to_json(), encoding="utf-8")
            target.commit([target.staged])

    def check(self, source_sha256: str, path: Path | None = None) -> None:
        """Raise UsageError if the choices were made for another model."""
        if source_sha256 != self.source_sha256:
            raise UsageError(
                f"decisions {path or 'given'}: made for another model (sha256 "
                f"{self.source_sha256[:12]}..., this one has {source_sha256[:12]}...)"
            )


def load_decisions(path: Path, source_sha256: str | None = None) -> Decisions:
    """Read a decisions file, and `check` it where the model's hash is given.

    Raises UsageError, in one line, for a file that cannot be read, is no decisions file, was
    written by a newer graphopt, or was made for another model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"decisions {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"decisions {path}: not JSON: {error}") from None
    if not isinstance(content, dict) or "schema_version" not in content:
        raise UsageError(f"decisions {path}: JSON, but no decisions of graphopt")
    written = content["schema_version"]
    if isinstance(written, int) and written > SCHEMA_VERSION:
        raise UsageError(
            f"decisions {path}: format {written} of graphopt {content.get('graphopt')} is newer "
            f"than what graphopt {version()} reads, which is {SCHEMA_VERSION}"
        )
    try:
        decisions = Decisions.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"decisions {path}: {_first_error(error)}") from None
    if source_sha256 is not None:
        decisions.check(source_sha256, path)
    return decisions


def sha256(files: Iterable[Path]) -> str:
    """The hash of a model: of its file, followed by the external data beside it, if any."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place or 'the whole'}: {first['msg']}"


def _lines(content: Mapping[str, Any]) -> Iterator[str]:
    """JSON with one line per field; a field of many entries has one line for each of them."""
    yield "{\n"
    for number, (name, field) in enumerate(content.items()):
        end = ",\n" if number + 1 < len(content) else "\n"
        if name in _ENTRIES and field:
            entries = (
                [f"{_text(key)}: {_text(entry)}" for key, entry in field.items()]
                if isinstance(field, dict)
                else [_text(entry) for entry in field]
            )
            opened, closed = ("{", "}") if isinstance(field, dict) else ("[", "]")
            inner = ",\n".join(f"    {entry}" for entry in entries)
            yield f"  {_text(name)}: {opened}\n{inner}\n  {closed}{end}"
        else:
            yield f"  {_text(name)}: {_text(field)}{end}"
    yield "}\n"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
