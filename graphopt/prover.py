"""What stands between a rewritten model and its place on disk: the proof, and mending for it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import onnx

from graphopt import exporter
from graphopt.ir import Model
from graphopt.manager import Pass, PassRun, to_text
from graphopt.output import ExternalPolicy, Target, output_errors
from graphopt.report import ValidationRecord

if TYPE_CHECKING:
    from graphopt.blame import Blame, Fault

_MOST_RESCUES: Final = 4  # a further fault may show only on feeds that the last did not fail on

Progress = Callable[[str, float | None], None]
"""Told what is going on and the share of it that is done (None: unknown)."""


@contextlib.contextmanager
def staging(output: Path | None) -> Iterator[tuple[Target | None, Path]]:
    """Where the candidate lies while it is examined: beside its target, else in a temp folder."""
    if output is not None:
        with Target(output) as target:
            yield target, target.staged
    else:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            yield None, Path(folder) / "candidate.onnx"


@dataclass
class Candidate:
    """What may become the result, as it lies in memory and on disk."""

    model: Model
    runs: list[PassRun]
    staged: Path
    target: Target | None
    external: ExternalPolicy
    files: list[Path] = field(default_factory=list)

    def write(self, tell: Progress) -> None:
        """Write it where it is examined. Raises OutputError, which names the target."""
        tell("writing", None)
        with output_errors(self.target.path if self.target else self.staged):
            self.files = exporter.save(self.model, self.staged, self.external)


@dataclass(frozen=True)
class Prover:
    """Compares candidates with the source, and takes out of them what breaks them.

    `load` gives the model that the passes ran on: the source, with what was `requested` of it.
    """

    source: Path | onnx.ModelProto
    load: Callable[[], Model]
    requested: Sequence[Pass]
    shapes: Mapping[str, Sequence[int]]
    data: str | None
    custom_ops: Sequence[str | Path]
    seed: int
    tell: Progress

    def prove(
        self, candidate: Candidate, steps: Sequence[Pass]
    ) -> tuple[ValidationRecord, list[Fault]]:
        """The verdict on the candidate, which has lost the faults that were found."""
        with contextlib.ExitStack() as stack:
            original = self._file(stack)
            candidate.write(self.tell)
            proof = self._compare(original, candidate.staged)
            blame = self._blame(original, steps, candidate.target)
            if proof.verdict == "failed" and any(run.changes for run in candidate.runs):
                proof = self._rescued(candidate, proof, blame, original)
            if proof.verdict == "failed" and self.requested and not blame.faults:
                proof = self._explained(candidate, proof, original)
            return proof, blame.faults

    def _rescued(
        self, candidate: Candidate, proof: ValidationRecord, blame: Blame, original: Path
    ) -> ValidationRecord:
        for _ in range(_MOST_RESCUES):
            rescued = blame.rescue(candidate.model, candidate.runs)
            if rescued is None:
                break
            candidate.model, candidate.runs = rescued
            candidate.write(self.tell)
            proof = self._compare(original, candidate.staged)
            if proof.verdict != "failed":
                break
        return proof

    def _explained(
        self, candidate: Candidate, proof: ValidationRecord, original: Path
    ) -> ValidationRecord:
        """The verdict, saying so where what was asked for fails before any pass has run."""
        candidate.model, candidate.runs = self.load(), []
        candidate.write(self.tell)
        alone = self._compare(original, candidate.staged)
        if alone.verdict != "failed":
            return proof
        asked = ", ".join(to_text(step) for step in self.requested)
        reason = f"{alone.reason}; that is what {asked} does, without any further pass"
        return alone.model_copy(update={"reason": reason})

    def _file(self, stack: contextlib.ExitStack) -> Path:
        if isinstance(self.source, Path):
            return self.source
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-"))
        original = Path(folder) / "original.onnx"
        exporter.save(Model.load(self.source), original)
        return original

    def _compare(self, original: Path, candidate: Path) -> ValidationRecord:
        from graphopt.validate import validate_files

        return validate_files(
            original,
            candidate,
            data=self.data,
            custom_ops=[Path(library) for library in self.custom_ops],
            seed=self.seed,
            shapes=self.shapes,
            progress=self.tell,
        )

    def _blame(self, original: Path, steps: Sequence[Pass], place: Target | None) -> Blame:
        from graphopt.blame import Blame

        return Blame(
            original,
            self.load,
            steps,
            lambda: _blame_folder(place),
            data=self.data,
            custom_ops=[Path(library) for library in self.custom_ops],
            seed=self.seed,
            shapes=self.shapes,
            tell=lambda what: self.tell(what, None),
        )


def _blame_folder(place: Target | None) -> Path:
    """Where reproducers go: beside the output, else into a temporary folder that stays."""
    if place is None:
        return Path(tempfile.mkdtemp(prefix="graphopt-blame-"))
    return place.path.with_name(f"{place.path.name}.blame")
