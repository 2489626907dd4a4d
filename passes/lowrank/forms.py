"""The forms that a split layer can take: its parts, their weights, and how much work they are.

A layer with weights [M, K], K = C x kernel for a convolution, becomes

    svd      a product K -> r, a product r -> M        (products, convolutions with one tap)
    channel  a convolution C -> r, one with one tap r -> M
    spatial  a convolution C -> r with a column, one r -> M with a row of the kernel
    tucker   one tap C -> q, a convolution q -> p, one tap p -> M
    cp       one tap C -> r, a convolution of each channel by itself, one tap r -> M

(Denton et al. and Jaderberg et al., 2014; Zhang et al., 2015; Kim et al., 2016; Lebedev et al.,
2015, whose depthwise column and row are one kernel here: one node less, and never a larger error.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from graphopt.kernels import lowrank, multilinear
from graphopt.kernels.threads import one_thread
from graphopt.passes.linear import Layer

Array = NDArray[Any]
Method = Literal["svd", "channel", "spatial", "tucker", "cp"]
RIDGE: Final = 1e-3  # of the mean square of what a layer reads, so that no direction is free
_ROUGH: Final = 3e9  # floating-point operations: more lower few errors of a table
_STEPS: Final = ((64, 16), (32, 8), (16, 2))  # ranks go by: for so many channels and more


@dataclass(frozen=True)
class Split:
    """A layer as several: factors in order of computation, float32, shaped as its form says."""

    method: Method
    factors: tuple[Array, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Channels between the parts."""
        return tuple(len(factor) for factor in self.factors[:-1])

    @property
    def effective(self) -> Array:
        """The weights [M, K] that the parts together amount to, float64."""
        return FORMS[self.method].composed([np.asarray(f, np.float64) for f in self.factors])

    @property
    def size(self) -> int:
        """Numbers that it holds."""
        return sum(factor.size for factor in self.factors)

    @property
    def degeneracy(self) -> float | None:
        """Squares of all terms over those of their sum, large where they cancel; of CP only."""
        if self.method != "cp":
            return None
        first, middle, last = (np.asarray(f, np.float64) for f in self.factors)
        sizes = [np.square(first).sum(1), np.square(middle.reshape(len(middle), -1)).sum(1)]
        terms = float(np.sum(sizes[0] * sizes[1] * np.square(last).sum(0)))
        whole = float(np.square(self.effective).sum())
        return terms / whole if whole else 0.0


@dataclass(frozen=True)
class Extent:
    """How often the kernel of a layer is applied: sizes of what it reads and gives, by batch.

    `batch` counts rows of a product; axes are those of the kernel, none for a product.
    """

    batch: int
    read: tuple[int, ...] = ()
    given: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows that the layer gives."""
        return self.batch * math.prod(self.given)


class Form(ABC):
    """One way to split a layer."""

    method: ClassVar[Method]
    parts: ClassVar[int] = 2

    @abstractmethod
    def fits(self, layer: Layer) -> bool:
        """True where a layer can take this form."""

    @abstractmethod
    def most(self, layer: Layer) -> int:
        """The rank that loses nothing; of Tucker the smaller of the two."""

    @abstractmethod
    def macs(self, layer: Layer, extent: Extent, rank: int) -> int:
        """Multiply-accumulates at a rank."""

    def between(self, layer: Layer, rank: int) -> tuple[int, ...]:
        """Channels between the parts at a rank."""
        return (rank,) * (self.parts - 1)

    def shapes(self, layer: Layer, rank: int) -> list[tuple[int, ...]]:
        """Of the factors at a rank."""
        return self.shaped(layer, self.between(layer, rank))

    @abstractmethod
    def shaped(self, layer: Layer, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        """Of the factors with so many channels between the parts."""

    def size(self, layer: Layer, rank: int) -> int:
        """Weights at a rank."""
        return sum(math.prod(shape) for shape in self.shapes(layer, rank))

    @abstractmethod
    def factors(
        self, weights: Array, gram: Array | None, rank: int, work: float = multilinear.WORK
    ) -> tuple[Array, ...]:
        """Factors of weights [M, C, *kernel] that lose least of what the Gram matrix weighs.

        In about so many floating-point operations, where they have to be searched for.
        """

    @abstractmethod
    def composed(self, factors: Sequence[Array]) -> Array:
        """The weights [M, K] that factors amount to."""

    def ranks(self, layer: Layer) -> list[int]:
        """Ranks worth a try, smallest first: those at which the layer has fewer weights.

        Wide layers run on blocks of channels, so that ranks between go for the same price.
        """
        most = self.most(layer)
        step = next((step for least, step in _STEPS if most >= least), 1)
        ranks = [*range(step, most, step)]
        return [rank for rank in ranks if self.size(layer, rank) < layer.weight.size]

    def errors(self, weights: Array, gram: Array | None, ranks: Sequence[int]) -> dict[int, float]:
        """What is lost at ranks of what the layer gives: a share of its mean square."""
        found = {}
        flat = weights.reshape(len(weights), -1)
        for rank in ranks:
            near = self.composed(self.factors(weights, gram, rank, _ROUGH))
            found[rank] = lowrank.weighted_error(flat, near, gram)
        return found


class _Pair(Form):
    """A first layer that gives r channels, and one with a single tap that reads them."""

    def most(self, layer: Layer) -> int:
        return min(layer.shape)

    def macs(self, layer: Layer, extent: Extent, rank: int) -> int:
        return extent.rows * self.size(layer, rank)

    def shaped(self, layer: Layer, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        (rank,) = ranks
        return [(rank, _channels(layer), *_kernel(layer)), (layer.shape[0], rank)]

    def factors(
        self, weights: Array, gram: Array | None, rank: int, work: float = multilinear.WORK
    ) -> tuple[Array, ...]:
        flat = weights.reshape(len(weights), -1)
        left, right = lowrank.spectrum(flat, gram, RIDGE).factors(rank)
        return right.reshape(rank, *weights.shape[1:]), left

    def composed(self, factors: Sequence[Array]) -> Array:
        first, last = factors
        return np.asarray(last @ first.reshape(len(first), -1))

    def errors(self, weights: Array, gram: Array | None, ranks: Sequence[int]) -> dict[int, float]:
        found = lowrank.spectrum(weights.reshape(len(weights), -1), gram, RIDGE)
        left, right = found.factors(len(found.values))
        added = 0.0 if gram is None else RIDGE * float(np.mean(np.diag(gram)))
        ridge = added * np.square(left).sum(0) * np.square(right).sum(1)  # as left is orthogonal
        seen = np.maximum(found.values - ridge, 0.0)
        tails = np.append(np.cumsum(seen[::-1])[::-1], 0.0)
        whole = float(tails[0])
        return {
            rank: float(tails[min(rank, len(seen))]) / whole if whole > 0 else 0.0 for rank in ranks
        }


class Svd(_Pair):
    """Two products, or two convolutions with one tap; the first takes the strides."""

    method = "svd"

    def fits(self, layer: Layer) -> bool:
        return layer.groups == 1 and layer.taps == 1


class Channel(_Pair):
    """A convolution with fewer channels, and one with one tap that gives all of them."""

    method = "channel"

    def fits(self, layer: Layer) -> bool:
        return layer.groups == 1 and layer.taps > 1


class Spatial(Form):
    """A column of the kernel, then a row of it."""

    method = "spatial"

    def fits(self, layer: Layer) -> bool:
        kernel = _kernel(layer)
        return layer.groups == 1 and len(kernel) == 2 and min(kernel) > 1

    def most(self, layer: Layer) -> int:
        height, width = _kernel(layer)
        return min(layer.shape[1] // width, layer.shape[0] * width, _channels(layer) * height)

    def macs(self, layer: Layer, extent: Extent, rank: int) -> int:
        height, width = _kernel(layer)
        between = extent.given[0] * extent.read[1]
        first = between * rank * _channels(layer) * height
        return extent.batch * (first + math.prod(extent.given) * layer.shape[0] * rank * width)

    def shaped(self, layer: Layer, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        (rank,), (height, width) = ranks, _kernel(layer)
        return [(rank, _channels(layer), height), (layer.shape[0], rank, width)]

    def factors(
        self, weights: Array, gram: Array | None, rank: int, work: float = multilinear.WORK
    ) -> tuple[Array, ...]:
        return tuple(multilinear.spatial(weights, gram, rank, work=work))

    def composed(self, factors: Sequence[Array]) -> Array:
        first, last = factors
        return _flat(multilinear.SPATIAL, first, last)


class Tucker(Form):
    """Fewer channels in, a small convolution, and all channels out; one rank for both of these.

    The rank is that of the side with fewer channels, the other one has as large a part of its own.
    """

    method = "tucker"
    parts = 3

    def fits(self, layer: Layer) -> bool:
        return layer.groups == 1 and layer.taps > 1 and _channels(layer) > 1

    def most(self, layer: Layer) -> int:
        return min(layer.shape[0], _channels(layer))

    def macs(self, layer: Layer, extent: Extent, rank: int) -> int:
        q, p = self.between(layer, rank)
        first = math.prod(extent.read) * q * _channels(layer)
        rest = math.prod(extent.given) * (p * q * layer.taps + p * layer.shape[0])
        return extent.batch * (first + rest)

    def between(self, layer: Layer, rank: int) -> tuple[int, ...]:
        p, q = self._pair(layer.shape[0], _channels(layer), layer.taps, rank)
        return q, p

    def shaped(self, layer: Layer, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        q, p = ranks
        return [(q, _channels(layer)), (p, q, *_kernel(layer)), (layer.shape[0], p)]

    def factors(
        self, weights: Array, gram: Array | None, rank: int, work: float = multilinear.WORK
    ) -> tuple[Array, ...]:
        taps = math.prod(weights.shape[2:])
        pair = self._pair(len(weights), weights.shape[1], taps, rank)
        return tuple(multilinear.tucker(weights, gram, pair, work=work))

    def composed(self, factors: Sequence[Array]) -> Array:
        first, core, last = factors
        return _flat(multilinear.TUCKER, first, core.reshape(*core.shape[:2], -1), last)

    @staticmethod
    def _pair(outputs: int, inputs: int, taps: int, rank: int) -> tuple[int, int]:
        """Ranks of the outputs and of the inputs, by the rank of the smaller side.

        Neither is larger than what the core makes of the other one.
        """
        wide = max(1, round(rank * max(outputs, inputs) / min(outputs, inputs)))
        wide = min(wide, rank * taps)
        return (wide, rank) if outputs > inputs else (rank, wide)


class Cp(Form):
    """One tap, a kernel for each channel by itself, one tap."""

    method = "cp"
    parts = 3

    def fits(self, layer: Layer) -> bool:
        return layer.groups == 1 and layer.taps > 1 and _channels(layer) > 1

    def most(self, layer: Layer) -> int:
        sides = sorted((layer.shape[0], _channels(layer), layer.taps))
        return sides[0] * sides[1]

    def macs(self, layer: Layer, extent: Extent, rank: int) -> int:
        first = math.prod(extent.read) * rank * _channels(layer)
        rest = math.prod(extent.given) * rank * (layer.taps + layer.shape[0])
        return extent.batch * (first + rest)

    def shaped(self, layer: Layer, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        rank = ranks[0]
        return [(rank, _channels(layer)), (rank, *_kernel(layer)), (layer.shape[0], rank)]

    def factors(
        self, weights: Array, gram: Array | None, rank: int, work: float = multilinear.WORK
    ) -> tuple[Array, ...]:
        return tuple(multilinear.cp(weights, gram, rank).factors)

    def composed(self, factors: Sequence[Array]) -> Array:
        first, middle, last = factors
        return _flat(multilinear.CP, first, middle.reshape(len(middle), -1), last)


FORMS: Final[dict[Method, Form]] = {
    form.method: form for form in (Svd(), Channel(), Spatial(), Tucker(), Cp())
}
METHODS: Final[tuple[Method, ...]] = tuple(FORMS)


def split_of(layer: Layer, method: Method, rank: int, matrix: Array, gram: Array | None) -> Split:
    """The layer with weights [M, K] in a form, at a rank."""
    weights = np.asarray(matrix, np.float64).reshape(layer.shape[0], -1, *_kernel(layer))
    with one_thread():
        factors = FORMS[method].factors(weights, gram, rank)
    return Split(method, tuple(np.ascontiguousarray(f, np.float32) for f in factors))


def _flat(form: str, *factors: Array) -> Array:
    """The weights [M, K] that factors amount to; the last of them has M."""
    made = np.einsum(form, *factors, optimize=True)
    return np.asarray(made).reshape(len(factors[-1]), -1)


def _kernel(layer: Layer) -> tuple[int, ...]:
    """Of a convolution; none of a product."""
    return () if layer.patches is None else layer.patches.kernel


def _channels(layer: Layer) -> int:
    """Input channels."""
    return layer.shape[1] // layer.taps
