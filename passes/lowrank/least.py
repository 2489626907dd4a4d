"""The least rank that each layer can do with by itself, whatever others save."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphopt.kernels.lowrank import evbmf_rank
from graphopt.passes.linear import Layer
from graphopt.passes.lowrank.forms import FORMS, Form, Method
from graphopt.passes.lowrank.options import Option, Splittable

Array = NDArray[Any]
_EXACT: Final = ("svd", "channel")  # one spectrum tells the errors of all ranks
_ROUNDING: Final = 1e-12  # an energy of 0.9 leaves 1 - 0.9, which is no tenth


def by_energy(
    group: Splittable, methods: Collection[Method], gram: Array | None, energy: float
) -> Option:
    """The cheapest form at the least rank that keeps this share of the mean square.

    `gram` [K, K] is of what the layers read, as `pooled` gives it. Dense where no form saves MACs.
    """
    most = 1 - energy + _ROUNDING
    found = []
    for method, form, macs in _forms(group, methods):
        ranks = list(macs)
        if method in _EXACT:
            errors = form.errors(_weights(group.first), gram, ranks)
            rank = next((rank for rank in ranks if errors[rank] <= most), None)
        else:  # each takes a search: as few as can be

            def fits(rank: int, form: Form = form) -> bool:
                return form.errors(_weights(group.first), gram, [rank])[rank] <= most

            at = bisect_left(ranks, True, key=fits)
            rank = ranks[at] if at < len(ranks) else None
            errors = {} if rank is None else form.errors(_weights(group.first), gram, [rank])
        if rank is not None:
            found.append(_option(group, method, rank, macs[rank], errors[rank]))
    return min(found, key=lambda option: option.macs, default=group.dense)


def by_noise(group: Splittable, methods: Collection[Method], gram: Array | None) -> Option:
    """The cheapest form at the rank of what stands out of noise in the weights, as matrices.

    Dense where no form saves MACs, and where all seems to be noise. Ranks of Tucker are of the
    unfoldings along outputs and inputs (Kim et al., 2016); the form has one for both, the least
    that is enough.
    """
    found = []
    for method, form, macs in _forms(group, methods):
        wanted = _noise_ranks(group.first, method)
        if min(wanted, default=0) < 1:
            continue
        for rank in macs:
            between = form.between(group.first, rank)
            if all(has >= needs for has, needs in zip(between, wanted, strict=True)):
                error = form.errors(_weights(group.first), gram, [rank])[rank]
                found.append(_option(group, method, rank, macs[rank], error))
                break
    return min(found, key=lambda option: option.macs, default=group.dense)


def _noise_ranks(layer: Layer, method: Method) -> tuple[int, ...]:
    """Channels between the parts of a form, in their order; none for CP."""
    weights = _weights(layer)
    outputs, inputs = weights.shape[:2]
    if method in _EXACT:
        return (evbmf_rank(weights.reshape(outputs, -1)),)
    if method == "spatial":
        by_column = weights.transpose(1, 2, 0, 3)
        return (evbmf_rank(by_column.reshape(inputs * weights.shape[2], -1)),)
    if method == "tucker":
        by_input = np.moveaxis(weights, 1, 0).reshape(inputs, -1)
        return evbmf_rank(by_input), evbmf_rank(weights.reshape(outputs, -1))
    return ()


def _forms(
    group: Splittable, methods: Collection[Method]
) -> Iterator[tuple[Method, Form, dict[int, int]]]:
    """The forms that the layers can take, with MACs by rank where those are fewer."""
    for method in methods:
        form = FORMS[method]
        if not form.fits(group.first):
            continue
        macs = {
            rank: sum(form.macs(group.first, extent, rank) for extent in group.extents)
            for rank in range(1, form.most(group.first) + 1)
        }
        macs = {rank: count for rank, count in macs.items() if count < group.macs}
        if macs:
            yield method, form, macs


def _option(group: Splittable, method: Method, rank: int, macs: int, error: float) -> Option:
    size = FORMS[method].size(group.first, rank)
    return Option(method, rank, macs, size, error, float(macs))


def _weights(layer: Layer) -> Array:
    """[M, C, *kernel], float64."""
    kernel = () if layer.patches is None else layer.patches.kernel
    return np.asarray(layer.matrix(), np.float64).reshape(layer.shape[0], -1, *kernel)
