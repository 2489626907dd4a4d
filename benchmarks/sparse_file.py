"""How small does `sparsify` make a file, by the share of zeros in its weights?

    python benchmarks/sparse_file.py [MODEL.onnx | NAME ...] [--share 0.9 ...]

NAME is one of models/catalog.toml. Of every float weight of two or more axes the elements of
smallest magnitude are set to zero: only the file is looked at, not what the model still knows. All
sizes are shares of the dense file of the same zeros, structure and small tensors included:

    sparse      what sparsify writes: linear indices as varints
    8 B         the same with indices of 8 bytes, as most writers have them
    zip         the dense file, deflated at level 6
    sparse zip  the sparse file, deflated

The bar is 0.31 at 90 % zeros; exit code 1 for a model of more than 1 MB that misses it, or for one
that comes back with another bit.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from graphopt import exporter
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.prune.sparse import Densify, Sparsify
from models import fetch

DEFAULT = ("models/digits/cnn.onnx", "paraphrase_minilm_l3")
SHARES = (0.5, 0.67, 0.7, 0.8, 0.9, 0.95)
BAR, BAR_AT = 0.31, 0.9
LARGE = 1_000_000  # bytes; below, structure is most of what is left


@dataclass(frozen=True)
class Sizes:
    """Bytes of one model at one share of zeros, and seconds of `sparsify`."""

    dense: int
    sparse: int
    wide: int
    zipped: int
    sparse_zipped: int
    seconds: float
    is_exact: bool


def pruned(path: Path, share: float) -> onnx.ModelProto:
    """The model, that share of zeros in every float weight of two or more axes."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim < 2 or array.dtype != np.float32:
            continue
        flat = array.reshape(-1).copy()
        count = round(share * flat.size)
        flat[np.argpartition(np.abs(flat), max(count - 1, 0))[:count]] = 0
        tensor.CopyFrom(numpy_helper.from_array(flat.reshape(array.shape), tensor.name))
    return proto


def measured(path: Path, share: float) -> Sizes:
    """Sparsify the pruned model, and make it dense again."""
    proto = pruned(path, share)
    model = Model.load(proto)
    started = time.perf_counter()
    run_pipeline(model, [Sparsify()])
    seconds = time.perf_counter() - started
    made = exporter.to_proto(model)
    back = Model.load(made)
    run_pipeline(back, [Densify()])
    dense, sparse = proto.SerializeToString(), made.SerializeToString()
    return Sizes(
        len(dense),
        len(sparse),
        _with_wide_indices(made),
        len(zlib.compress(dense, 6)),
        len(zlib.compress(sparse, 6)),
        seconds,
        _bits(proto).items() <= _bits(exporter.to_proto(back)).items(),  # Constants join them
    )


def _with_wide_indices(proto: onnx.ModelProto) -> int:
    """Bytes where indices take 8, and a weight that this makes larger than dense stays dense."""
    total = proto.ByteSize()
    for sparse in proto.graph.sparse_initializer:
        count, size = sparse.values.dims[0], int(np.prod(sparse.dims))
        wide = count * (4 + 8)
        total += min(wide, size * 4) - sparse.ByteSize()
    return total


def _bits(proto: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=DEFAULT, metavar="MODEL")
    parser.add_argument("--share", nargs="+", type=float, default=SHARES)
    arguments = parser.parse_args()
    failed = False
    for name in arguments.models:
        path = fetch.fetch(name) if name in fetch.names() else Path(name)
        print(f"{name}, {path.stat().st_size / 1e6:.2f} MB")
        print("zeros   sparse     8 B     zip  sparse zip  seconds")
        for share in arguments.share:
            found = measured(path, share)
            each = (found.sparse, found.wide, found.zipped, found.sparse_zipped)
            ratios = [size / found.dense for size in each]
            texts = [f"{r:{w}.3f}" for r, w in zip(ratios, (8, 8, 8, 12), strict=True)]
            missed = share == BAR_AT and found.dense > LARGE and ratios[0] > BAR
            note = ("" if found.is_exact else "  other bits") + ("  over the bar" if missed else "")
            print(f"{share:5.2f} {''.join(texts)} {found.seconds:8.2f}{note}", flush=True)
            failed |= missed or not found.is_exact
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
