"""How much of what layers lose reaches the outputs: each layer with other weights, all else as is.

The noise that a layer's error makes in the outputs grows with the error, and small noises of
several layers add up (see `graphopt.quality`): what is measured at one error holds for others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx

from graphopt import exporter, output
from graphopt.errors import RuntimeFailure
from graphopt.ir import Model
from graphopt.passes.lowrank.table import Probe
from graphopt.quality import compare
from graphopt.runtime import Feed, Session, limits

_SECONDS: Final = 15.0  # for all layers: of large models fewer feeds are run
_TRUST: Final = 0.5  # few feeds tell a layer's harm roughly: a power below 1 draws all together
_LEAST: Final = 1e-3  # of the largest: what does no harm on these feeds may on others


def harms(
    lossless: Path,
    probes: Mapping[str, Probe],
    feeds: Sequence[Feed],
    classes: Mapping[str, int | None],
    *,
    threads: int,
    custom_ops: Sequence[Path],
    folder: Path,
    progress: Callable[[float], None],
) -> dict[str, float]:
    """By root: what a unit of a layer's error does to the outputs, relative to other layers.

    Infinite where the model fails with the layer's other weights; one for all where nothing could
    be seen. `classes` is what `compare` takes. Loads the model once: weights are fed.
    """
    written = _overridable(lossless, {probe.weights for probe in probes.values()}, folder)
    with Session(written, threads=threads, custom_ops=custom_ops) as session:
        known = list(_known(session, feeds, len(probes)))
        outputs = {id(feed): found for feed, found in known}
        noises = {}
        for number, (root, probe) in enumerate(probes.items()):
            progress(number / len(probes))
            try:
                quality = compare(
                    lambda feed: outputs[id(feed)],
                    lambda feed, fed={probe.weights: probe.stored}: session.run({**feed, **fed}),  # type: ignore[misc]
                    [feed for feed, _ in known],
                    classes=classes,
                )
                noises[root] = max(quality.noise, 0.0) / max(probe.error, 1e-12)
            except RuntimeFailure:
                noises[root] = math.inf
    found = {root: noise**_TRUST for root, noise in noises.items()}
    most = max((each for each in found.values() if math.isfinite(each)), default=0.0)
    return {root: max(each, _LEAST * most) if most else 1.0 for root, each in found.items()}


def _known(
    session: Session, feeds: Sequence[Feed], layers: int
) -> list[tuple[Feed, Mapping[str, Any]]]:
    """As many feeds as there is time to run for every layer, with what the model gives for them."""
    found: list[tuple[Feed, Mapping[str, Any]]] = []
    started = time.perf_counter()
    for feed in feeds:
        found.append((feed, session.run(feed)))
        if (time.perf_counter() - started) * layers > _SECONDS:
            break
    return found


def _overridable(lossless: Path, names: set[str], folder: Path) -> Path:
    """The model with these initializers as inputs as well, which may be fed instead."""
    proto = onnx.ModelProto()
    model = Model.load(lossless)
    proto.CopyFrom(exporter.to_hollow(model))
    proto.ir_version = min(max(proto.ir_version, 4), limits().ir)
    for value in model.graph.initializers:
        if value.name in names and not value.is_input:
            assert value.weight is not None
            shape = list(value.weight.shape)
            info = onnx.helper.make_tensor_value_info(value.name, value.weight.data_type, shape)
            proto.graph.input.append(info)
    return output.write(proto, model.store, folder / "fed.onnx")[0]
