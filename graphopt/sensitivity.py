"""What static int8 does to a model, block by block: noise that comes in, and time that goes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from graphopt import api
from graphopt.compress import Compression, Request
from graphopt.errors import UsageError
from graphopt.int8 import NEEDED_OPSET
from graphopt.ir import Model
from graphopt.prover import Progress
from graphopt.record import Record
from graphopt.report import SCHEMA_VERSION, FileInfo, Host, file_info, host
from graphopt.targets import OPSETS


class BlockRecord(Record):
    """A product or convolution with what stands behind it, up to the next."""

    root: str = Field(description="the value it is called after")
    operators: str
    noise: float = Field(
        description="1 - agreement of the model's outputs when this alone is on integers; small "
        "ones add up"
    )
    sqnr_db: float | None = Field(description="of its result when everything is on integers")
    gain_ms: float = Field(description="what it saves on integers, as profiled here")


class SensitivityRecord(Record):
    """What `graphopt sensitivity` found: of the model after the lossless passes of level 2."""

    schema_version: int = SCHEMA_VERSION
    host: Host
    model: FileInfo
    opset: int = Field(description="of the standard operators, after those passes")
    threads: int = Field(description="0: onnxruntime's default, all cores")
    blocks: list[BlockRecord] = Field(description="the one that adds most noise first")
    seconds: float


def sensitivity(
    model: Path,
    *,
    data: str | None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    custom_ops: Sequence[Path] = (),
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> SensitivityRecord:
    """Quantize each block of the model alone, and all of them together.

    `data` is calibrated on and compared on. Raises UsageError where there is none or it does not
    fit, RuntimeFailure where onnxruntime fails.
    """
    started = time.perf_counter()
    tell: Progress = progress or (lambda what, share: None)
    if data is None:
        raise UsageError("sensitivity has to be measured on data: --data with some inputs")
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        lossless = Path(folder) / "lossless.onnx"
        original = model
        if shapes:
            original = Path(folder) / "original.onnx"
            api.optimize(model, original, level=0, shapes=shapes, validate=False)
        result = api.optimize(
            original, lossless, opset=_opset(original), validate=False, progress=tell
        )
        request = Request(
            mode="static", data=data, threads=threads, seed=seed, custom_ops=tuple(custom_ops)
        )
        candidates = Path(folder) / "candidates"
        candidates.mkdir()
        found = Compression(original, lossless, request, candidates, tell).sensitivity()
    blocks = [
        BlockRecord(
            root=each.root,
            operators=each.operators,
            noise=each.noise,
            sqnr_db=each.sqnr_db,
            gain_ms=each.gain_ms,
        )
        for each in sorted(found, key=lambda each: -each.noise)
    ]
    return SensitivityRecord(
        host=host(),
        model=file_info(model, [model, *Model.load(model).store.files()]),
        opset=result.report.opsets.get("", 0),
        threads=threads,
        blocks=blocks,
        seconds=time.perf_counter() - started,
    )


def _opset(model: Path) -> int | None:
    own = Model.load(model).opsets.get("")
    return NEEDED_OPSET if own is not None and own < OPSETS[0] else None
