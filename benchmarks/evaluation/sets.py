"""Calibration and evaluation sets: a folder for each model with calib.npz and eval.npz.

calib.npz holds inputs alone: an array of an input's rank has a sample in every row, one axis more
enumerates whole feeds. eval.npz holds what the model's metric in `scores.py` reads. Further files,
where they are there: chars.json, the recogniser's characters by class, and eval.py, a script that
prints a score of its own for `eval.py MODEL.onnx`.

This module needs numpy alone, since OpenVINO's own environment imports it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class EvaluationSet:
    """The files of one model."""

    folder: Path

    @property
    def calibration(self) -> Path:
        return self.folder / "calib.npz"

    @property
    def script(self) -> Path:
        return self.folder / "eval.py"

    def digest(self) -> str:
        """A hash of what the set holds."""
        content = hashlib.sha256()
        for name in ("calib.npz", "eval.npz", "chars.json"):
            if (self.folder / name).exists():
                content.update((self.folder / name).read_bytes())
        return content.hexdigest()[:12]

    def evaluation(self) -> dict[str, Array]:
        """The arrays of eval.npz."""
        with np.load(self.folder / "eval.npz") as archive:
            found = dict(archive)
        characters = self.folder / "chars.json"
        if characters.exists():
            found["characters"] = np.array(json.loads(characters.read_text()))
        return found

    def feeds(self, ranks: Mapping[str, int]) -> Iterator[dict[str, Array]]:
        """The calibration samples as feeds, given the rank of every input."""
        with np.load(self.calibration) as archive:
            arrays = {name: archive[name] for name in archive.files}
        count = len(next(iter(arrays.values())))
        for index in range(count):
            yield {
                name: array[index : index + 1] if array.ndim == ranks[name] else array[index]
                for name, array in arrays.items()
            }


def write_feeds(feeds: Iterator[dict[str, Array]], folder: Path) -> int:
    """Write every feed as an .npz of its own, in order of their names; how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for feed in feeds:
        np.savez(folder / f"{count:05}.npz", **feed)  # type: ignore[arg-type]
        count += 1
    return count
