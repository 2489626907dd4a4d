"""Sizes that are not known as numbers: polynomials over the sizes that a model leaves open.

A size is an `int`, or a `Term`: a sum of products of atoms, in a normal form, so that equal sizes
compare equal: (a + b) * 2 and 2*b + a*2 are one Term. Atoms are whatever cannot be taken apart.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

Monomial = frozenset[tuple[Hashable, int]]
"""Atoms with their powers; empty for the number that stands alone."""

_NUMBER: Monomial = frozenset()


@dataclass(frozen=True, slots=True)
class Open:
    """An atom: a size of a value, or an element that it holds, of which nothing else is known."""

    value: Hashable
    index: int
    is_size: bool  # and so is never negative


@dataclass(frozen=True, slots=True)
class Term:
    """A polynomial with integer coefficients, none of them zero, that is no plain number."""

    parts: frozenset[tuple[Monomial, int]]

    @property
    def atoms(self) -> set[Hashable]:
        return {atom for monomial, _ in self.parts for atom, _ in monomial}

    @property
    def is_size(self) -> bool:
        """True where it cannot be negative: sums and products of sizes."""
        sizes = (isinstance(atom, str) or getattr(atom, "is_size", False) for atom in self.atoms)
        return all(count > 0 for _, count in self.parts) and all(sizes)


Size = int | Term


def atom(of: Hashable) -> Term:
    """The size that consists of one atom: a symbol's name, or an `Open`."""
    return Term(frozenset({(frozenset({(of, 1)}), 1)}))


def _parts(size: Size) -> dict[Monomial, int]:
    if isinstance(size, Term):
        return dict(size.parts)
    return {_NUMBER: size} if size else {}


def _size(parts: dict[Monomial, int]) -> Size:
    kept = {monomial: count for monomial, count in parts.items() if count}
    if not kept.keys() - {_NUMBER}:
        return kept.get(_NUMBER, 0)
    return Term(frozenset(kept.items()))


def add(a: Size, b: Size) -> Size:
    """The sum."""
    found = _parts(a)
    for monomial, count in _parts(b).items():
        found[monomial] = found.get(monomial, 0) + count
    return _size(found)


def subtract(a: Size, b: Size) -> Size:
    """The difference."""
    return add(a, multiply(b, -1))


def multiply(a: Size, b: Size) -> Size:
    """The product."""
    found: dict[Monomial, int] = {}
    for left, count in _parts(a).items():
        for right, times in _parts(b).items():
            powers = dict(left)
            for each, power in right:
                powers[each] = powers.get(each, 0) + power
            key = frozenset(powers.items())
            found[key] = found.get(key, 0) + count * times
    return _size(found)


def product(sizes: Iterable[Size]) -> Size:
    """The product of all; 1 of none."""
    one: Size = 1
    return reduce(multiply, sizes, one)


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where b divides every part of a, and is one product; None where that is not so.

    Right wherever b is not zero: cancelled atoms are taken to be different from it.
    """
    divisor = _parts(b)
    if len(divisor) != 1:
        return 1 if a == b and divisor else None
    ((below, count),) = divisor.items()
    found: dict[Monomial, int] = {}
    for monomial, times in _parts(a).items():
        powers = dict(monomial)
        for each, power in below:
            powers[each] = powers.get(each, 0) - power
        if times % count or any(power < 0 for power in powers.values()):
            return None
        found[frozenset((each, power) for each, power in powers.items() if power)] = times // count
    return _size(found)


def solved(sizes: Sequence[Size], target: Sequence[Size], *, zeros_copy: bool) -> list[Size | None]:
    """The sizes that a Reshape to `target` gives of `sizes`; None for one that does not follow.

    Raises IndexError where a size is copied that is not there.
    """
    found: list[Size | None] = [
        sizes[axis] if size == 0 and zeros_copy else size for axis, size in enumerate(target)
    ]
    if -1 in found:
        others = product(size for size in found if size is not None and size != -1)
        free = quotient(product(sizes), others) if others != 0 else None
        found[found.index(-1)] = free
    return found


def is_nonzero(size: Size, nonzero: Container[Hashable]) -> bool:
    """True where the size is not zero, given that none of the `nonzero` atoms is."""
    if isinstance(size, int):
        return size != 0
    counts = any(all(each in nonzero for each, _ in monomial) for monomial, _ in size.parts)
    return counts and (len(size.parts) == 1 or size.is_size)


def replaced(size: Size, by: Mapping[Hashable, Size]) -> Size:
    """The size with other sizes in the place of its atoms, in that of their atoms, and so on.

    Nothing may stand for what it is made of.
    """
    while isinstance(size, Term) and not size.atoms.isdisjoint(by):
        total: Size = 0
        for monomial, count in size.parts:
            factors = [by.get(each, atom(each)) for each, power in monomial for _ in range(power)]
            total = add(total, multiply(count, product(factors)))
        size = total
    return size


def spelled(size: Term) -> str | None:
    """A name for the size, the same for equal ones; None where an atom has no name."""
    if not all(isinstance(each, str) for each in size.atoms):
        return None
    texts = []
    for monomial, count in size.parts:
        factors = [f"{each}^{power}" if power > 1 else str(each) for each, power in monomial]
        texts.append("*".join([str(count), *sorted(factors)] if count != 1 else sorted(factors)))
    return "+".join(sorted(text or "1" for text in texts))
