"""Are our decompositions of kernels as good as the best of ten of tensorly's, and how fast?

    OPENBLAS_NUM_THREADS=1 python benchmarks/decompositions.py [--starts 10] [--large]

Kernels of models, of noise, and of planted terms with noise, in the plain norm. Per kernel and
rank: the error |W - V| / |W| of ours, the least of tensorly's `parafac` (500 iterations, random
starts) or of its `tucker` (tolerance 1e-8, singular vectors and random starts), their ratio, how
much the terms cancel (their squares over those of the weights; ours, and of tensorly's best), and
seconds of one thread, of ours and of all of tensorly's starts. A ratio above 1.01 is a failure
(exit 1). Writes benchmarks/results/decompositions.md. `--large` adds layers of 128 and 256
channels, which takes about ten minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from tensorly import cp_to_tensor, tucker_to_tensor
from tensorly.decomposition import parafac
from tensorly.decomposition import tucker as their_tucker

from graphopt.kernels.multilinear import CP, TUCKER, cp, tucker

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.fetch import fetch

Array = NDArray[Any]
ALLOWED = 1.01
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "decompositions.md"
HEAD = """# Decompositions of convolution kernels, compared with tensorly's best of {starts}

Errors are |W - V| / |W| without data; "terms" are the squares of all rank-one terms over those of
the weights; seconds are of one thread, tensorly's of all its starts together. Written by
`OPENBLAS_NUM_THREADS=1 python benchmarks/decompositions.py{flags}`.

| kernel | form | rank | ours | tensorly | ratio | our terms | its terms | our s | its s |
|---|---|---|---|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    kernel: str
    form: str
    rank: str
    ours: float
    theirs: float
    terms: tuple[float, float] | None
    seconds: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    def __str__(self) -> str:
        terms = " | ".join(f"{t:.1f}" for t in self.terms) if self.terms else " | "
        cells = f"{self.ours:.4f} | {self.theirs:.4f} | {self.ratio:.3f}"
        times = " | ".join(f"{s:.2f}" for s in self.seconds)
        return f"| {self.kernel} | {self.form} | {self.rank} | {cells} | {terms} | {times} |"


def of_model(path: Path, name: str) -> Array:
    """A kernel [M, C, taps] of a model."""
    model = onnx.load(str(path))
    found = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    w = np.asarray(numpy_helper.to_array(found), np.float64)
    return w.reshape(*w.shape[:2], -1)


def planted(outputs: int, channels: int, rank: int, noise: float) -> Array:
    """Rank-one terms [M, C, 9], and a share of noise."""
    rng = np.random.default_rng(0)
    terms = np.einsum(
        "mr,cr,tr->mct", *(rng.standard_normal((n, rank)) for n in (outputs, channels, 9))
    )
    other = rng.standard_normal(terms.shape)
    return np.asarray(terms + noise * np.linalg.norm(terms) / np.linalg.norm(other) * other)


def cases(large: bool) -> Iterator[tuple[str, Array, list[int], list[tuple[int, int]]]]:
    """Names, kernels [M, C, taps], ranks of CP and pairs of ranks of Tucker."""
    digits = HERE.parent / "models" / "digits" / "cnn.onnx"
    detector = fetch("nudenet_yolov8n")
    rng = np.random.default_rng(1)
    yield "digits 16x16x9", of_model(digits, "2.0.weight"), [8, 16, 32], [(4, 4), (8, 8)]
    name = "detector 64x32x9"
    yield name, of_model(detector, "model.3.conv.weight"), [16, 48], [(16, 8), (32, 16)]
    name = "detector 64x64x9"
    yield (
        name,
        of_model(detector, "model.6.m.0.cv1.conv.weight"),
        [32, 64, 128],
        [(16, 16), (32, 32)],
    )
    yield "32 terms + 30 % noise 64x48x9", planted(64, 48, 32, 0.3), [16, 32], [(16, 12)]
    yield "noise 64x48x9", rng.standard_normal((64, 48, 9)), [64, 128], [(16, 12), (32, 24)]
    if large:
        name = "detector 256x128x9"
        yield name, of_model(detector, "model.7.conv.weight"), [64, 128], [(64, 32), (128, 64)]
        yield "noise 256x256x9", rng.standard_normal((256, 256, 9)), [256], [(64, 64)]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the processor's seconds."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def error(w: Array, near: Array) -> float:
    return float(np.linalg.norm(w - near) / np.linalg.norm(w))


def compared_cp(name: str, w: Array, rank: int, starts: int) -> Row:
    def theirs(seed: int) -> tuple[float, float]:
        found = parafac(w, rank, n_iter_max=500, init="random", random_state=seed)
        squares = np.prod([np.square(f).sum(0) for f in found.factors], axis=0) @ found.weights**2
        return error(w, cp_to_tensor(found)), float(squares / np.square(w).sum())

    (factors, degeneracy), seconds = timed(lambda: cp(w, None, rank))
    (least, terms), their_seconds = timed(lambda: min(theirs(seed) for seed in range(starts)))
    ours = error(w, np.einsum(CP, *factors, optimize=True))
    both = (degeneracy, terms)
    return Row(name, "CP", str(rank), ours, least, both, (seconds, their_seconds))


def compared_tucker(name: str, w: Array, ranks: tuple[int, int], starts: int) -> Row:
    def theirs(seed: int) -> float:
        start = "random" if seed else "svd"
        whole = [*ranks, w.shape[2]]
        found = their_tucker(w, whole, n_iter_max=200, init=start, random_state=seed, tol=1e-8)
        return error(w, tucker_to_tensor(found))

    factors, seconds = timed(lambda: tucker(w, None, ranks))
    least, their_seconds = timed(lambda: min(theirs(seed) for seed in range(starts)))
    ours = error(w, np.einsum(TUCKER, *factors, optimize=True))
    rank = f"{ranks[0]}, {ranks[1]}"
    return Row(name, "Tucker", rank, ours, least, None, (seconds, their_seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--large", action="store_true")
    given = parser.parse_args()
    text = HEAD.format(starts=given.starts, flags=" --large" if given.large else "")
    print(text, end="", flush=True)
    worst = 0.0
    for name, w, ranks, pairs in cases(given.large):
        asked: list[int | tuple[int, int]] = [*ranks, *pairs]
        for rank in asked:
            if isinstance(rank, int):
                found = compared_cp(name, w, rank, given.starts)
            else:
                found = compared_tucker(name, w, rank, given.starts)
            print(found, flush=True)
            text += f"{found}\n"
            worst = max(worst, found.ratio)
    RESULTS.write_text(text)
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
