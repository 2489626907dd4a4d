"""What ranks would do to a model: how much each layer loses and gains, split as it best can be."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import Field

from graphopt import api
from graphopt.data import given_feeds
from graphopt.ir import Model
from graphopt.kernels.lowrank import Spectrum, energy_rank, evbmf_rank, spectrum
from graphopt.low_rank_search import AUTO, FIT_FEEDS, table_of
from graphopt.passes.fitting import Settings, each_moments
from graphopt.passes.lowrank.forms import FORMS, Method
from graphopt.passes.lowrank.options import Option, Splittable, pooled
from graphopt.passes.lowrank.table import Ranks
from graphopt.proposals import first_feed
from graphopt.prover import Progress
from graphopt.record import Record
from graphopt.report import SCHEMA_VERSION, FileInfo, Host, file_info, host
from graphopt.runtime import Feed, Session
from graphopt.split_times import SplitTimes
from graphopt.wanted import LowRankWanted

RATIOS: Final = (0.75, 0.5, 0.25)  # of a layer's MACs: what is shown
_ABOUT: Final = 0.05  # of its MACs: ranks go by steps, so that ratios are met about as closely
_POINTS: Final = 32  # of a spectrum, evenly spaced, and as many by equal factors


class RankOption(Record):
    """One way to split a layer."""

    method: Method
    rank: int
    channels: list[int] = Field(description="between the parts")
    left: float = Field(description="of the layer's MACs")
    macs: int
    parameters: int
    error: float = Field(
        description="share of the variance of what the layer gives that is lost, before anything "
        "is fitted; of the squares of the weights where there was no data"
    )
    ms: float | None = Field(description="of its parts, as profiled here; None: not timed")
    pays: bool = Field(
        description="as much faster as there is less to do, or nearly so: what `optimize "
        "--low-rank` takes"
    )


class LayerRanks(Record):
    """A layer that can be split, or several that read the same weights."""

    root: str = Field(description="the value it is called after")
    operator: str
    kernel: list[int] = Field(description="empty for a product")
    layers: int = Field(description="that read these weights")
    outputs: int
    inputs: int = Field(description="weights for each output: channels times the kernel's size")
    macs: int
    share: float = Field(description="of the model's MACs")
    ms: float | None = Field(description="as it is, profiled here; None: it was not seen to run")
    rank_90: int = Field(description="keeps 90 % of the energy of what it gives")
    rank_99: int = Field(description="keeps 99 % of it")
    evbmf: int = Field(description="of its weights what stands out of noise (empirical Bayes)")
    spectrum: list[tuple[int, float]] = Field(
        description="ranks, and the share of the energy that is beyond each"
    )
    options: list[RankOption] = Field(description="all that was weighed, by form and rank")
    best: dict[float, RankOption] = Field(
        description="at about these ratios of its MACs: of options that pay the one that loses "
        "least, of all where none pays"
    )


class RanksRecord(Record):
    """What `graphopt ranks` found: of the model after the lossless passes of level 2."""

    schema_version: int = SCHEMA_VERSION
    host: Host
    model: FileInfo
    threads: int = Field(description="0: onnxruntime's default, all cores")
    methods: list[Method] = Field(description="forms that layers might take")
    feeds: int = Field(description="that errors and energies are weighed by; 0: by none")
    macs: int = Field(description="of the whole model")
    layers: list[LayerRanks] = Field(description="in order of computation")
    seconds: float


def ranks(
    model: Path,
    *,
    data: str | None = None,
    method: str = AUTO,
    shapes: Mapping[str, Sequence[int]] | None = None,
    custom_ops: Sequence[Path] = (),
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> RanksRecord:
    """Weigh all that each layer can be split into, and time it in the model, as it runs here.

    Without `data` all directions that a layer may read count alike. Raises UsageError for a method
    that there is none of, or data that does not fit, RuntimeFailure where onnxruntime fails.
    """
    started = time.perf_counter()
    tell: Progress = progress or (lambda what, share: None)
    wanted = LowRankWanted(share=AUTO, method=method)
    wanted.check()
    info = file_info(model, [model, *Model.load(model).store.files()])
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        folder = Path(name)
        original, lossless = model, folder / "lossless.onnx"
        if shapes:
            original = folder / "original.onnx"
            api.optimize(model, original, level=0, shapes=shapes, validate=False)
        tell("looking for a feed", None)
        feed = first_feed(original, data=data, seed=seed, custom_ops=list(custom_ops))
        api.optimize(original, lossless, custom_ops=custom_ops, validate=False, progress=tell)
        settings = Settings(threads=threads, custom_ops=tuple(custom_ops))
        feeds = None if data is None else _Feeds(lossless, data, settings.custom_ops)
        table = table_of(lossless, feed, wanted.methods, feeds, settings, tell)
        spectra = dict(_spectra(Model.load(lossless), table.groups, feeds, settings, tell))
        times = None
        if table.groups:
            times = SplitTimes(
                lossless,
                table,
                feed,
                threads,
                custom_ops,
                folder,
                lambda done: tell("timing layers", done),
            )
    return RanksRecord(
        host=host(),
        model=info,
        threads=threads,
        methods=list(wanted.methods),
        feeds=0 if feeds is None else feeds.number,
        macs=table.total,
        layers=[_layer(group, table, spectra[group.root], times) for group in table.groups],
        seconds=time.perf_counter() - started,
    )


class _Feeds:
    """Feeds of the data, as many as layers are fitted on; `number` is how many there were."""

    def __init__(self, model: Path, data: str, custom_ops: Sequence[Path]) -> None:
        self._model = model
        self._data = data
        self._custom_ops = custom_ops
        self.number = 0

    def __call__(self) -> Iterator[Feed]:
        with Session(self._model, custom_ops=self._custom_ops) as session:
            for number, feed in enumerate(given_feeds(self._data, session, FIT_FEEDS), 1):
                self.number = number
                yield feed


def _spectra(
    model: Model,
    groups: Sequence[Splittable],
    feeds: _Feeds | None,
    settings: Settings,
    tell: Progress,
) -> Iterator[tuple[str, Spectrum]]:
    """Spectra of what groups give, by root, of their weights alone where nothing was seen.

    Each as soon as all was seen that its layers read: few matrices are held at once.
    """
    by_layer = {layer.root: group for group in groups for layer in group.layers}
    known: dict[str, dict[str, np.ndarray]] = {group.root: {} for group in groups}
    if feeds is not None and groups:
        told = each_moments(
            model, by_layer, feeds, settings, lambda done: tell("seeing spectra", done)
        )
        for root, matrix in told:
            group = by_layer[root]
            known[group.root][root] = matrix
            if len(known[group.root]) == len(group.layers):
                gram = pooled(group, known.pop(group.root))
                yield group.root, spectrum(group.first.matrix(), gram)
    for group in groups:
        if group.root in known:  # without data, or not all of its layers run
            yield group.root, spectrum(group.first.matrix(), pooled(group, known[group.root]))


def _layer(
    group: Splittable, table: Ranks, found: Spectrum, times: SplitTimes | None
) -> LayerRanks:
    layer = group.first
    split = [option for option in table.options[group.root] if option.method is not None]
    options = [_option(group, option, times) for option in split]
    whole = 0.0 if times is None else times.dense[group.root]
    return LayerRanks(
        root=group.root,
        operator=layer.node.op,
        kernel=[] if layer.patches is None else list(layer.patches.kernel),
        layers=len(group.layers),
        outputs=layer.shape[0],
        inputs=layer.shape[1],
        macs=group.macs,
        share=group.macs / max(1, table.total),
        ms=whole or None,
        rank_90=energy_rank(found.values, 0.9),
        rank_99=energy_rank(found.values, 0.99),
        evbmf=evbmf_rank(layer.matrix()),
        spectrum=_points(found),
        options=options,
        best={ratio: option for ratio in RATIOS if (option := _best(options, ratio)) is not None},
    )


def _option(group: Splittable, option: Option, times: SplitTimes | None) -> RankOption:
    assert option.method is not None
    ms = np.inf if times is None else times.estimate(group.root, option)
    return RankOption(
        method=option.method,
        rank=option.rank,
        channels=list(FORMS[option.method].between(group.first, option.rank)),
        left=option.macs / max(1, group.macs),
        macs=option.macs,
        parameters=option.size,
        error=option.error,
        ms=ms if np.isfinite(ms) else None,
        pays=times is not None and times.pays(group, option, ms),
    )


def _best(options: Sequence[RankOption], ratio: float) -> RankOption | None:
    """The option to take for about a share of a layer's MACs; None where all leave more."""
    small = [option for option in options if option.left <= ratio + _ABOUT]
    return min(small, key=lambda o: (not o.pays, o.error, o.macs), default=None)


def _points(found: Spectrum) -> list[tuple[int, float]]:
    """Ranks up to the last one, and the shares of the energy beyond them."""
    last = len(found.values)
    several = np.concatenate((np.linspace(1, last, _POINTS), np.geomspace(1, last, _POINTS)))
    ranks_ = [int(rank) for rank in np.unique(several.round())]
    return list(zip(ranks_, found.errors(ranks_), strict=True))
