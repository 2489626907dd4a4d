"""Proofs about values that outlive one run of inference, and what open sizes are called.

Inference names the sizes that it knows nothing of, and names them anew each time it runs. Proofs
speak of sizes by these names. So each run's names are made unlike all others', and where a later
run knows more of a value than an earlier one did, the earlier name is replaced everywhere.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, cast

import onnx

from graphopt import size_terms
from graphopt.ir import Shape, Value
from graphopt.size_terms import Size, Term

_BY_INFERENCE: Final = re.compile(r"unk__\d+")
_OPEN: Final = re.compile(r"(unk|open)__\d+")


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type (TensorProto.DataType) and shape; a dim is a size, a symbol, or unknown."""

    data_type: int
    shape: Shape | None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    def stands_for(self, other: TensorType) -> bool:
        """False where this is not proven of a value of which the other is.

        Two different symbols may be of one size, but a rewrite that exchanges them has not shown
        it; neither has one whose sizes do not follow where they did before.
        """
        if self.data_type != other.data_type:
            return False
        if other.shape is None:
            return True
        if self.shape is None:
            return False
        return len(self.shape) == len(other.shape) and all(
            a == b or is_open(b) for a, b in zip(self.shape, other.shape, strict=True)
        )

    def __str__(self) -> str:
        name = element_name(self.data_type)
        if self.shape is None:
            return name
        return f"{name}[{','.join('?' if dim is None else str(dim) for dim in self.shape)}]"

    def proto(self) -> onnx.TypeProto:
        """The same as a TypeProto."""
        return onnx.helper.make_tensor_type_proto(self.data_type, self.shape)


def element_name(data_type: int) -> str:
    """A TensorProto.DataType as ONNX's type strings spell it."""
    return onnx.TensorProto.DataType.Name(data_type).lower()


def is_open(size: int | str | None) -> bool:
    """True for a size of which nothing is known: it was only named."""
    return size is None or (isinstance(size, str) and _OPEN.fullmatch(size) is not None)


@dataclass
class Proofs:
    """What is proven of values beyond inference; `terms` tells what some symbols stand for."""

    types: dict[Value, TensorType] = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)
    nonzero: set[Hashable] = field(default_factory=set)  # atoms: zero in no run that succeeds
    before: dict[Value, TensorType] = field(default_factory=dict)  # as last inferred
    inferred: dict[Hashable, dict[Hashable, tuple[TensorType | None, ...]]] = field(
        default_factory=dict
    )  # by versions of operators, then by call: blocks of a model repeat one another
    _serial: itertools.count[int] = field(default_factory=itertools.count)

    def copy(self) -> Proofs:
        """The same proofs; what is added to one is not in the other."""
        before = dict(self.before)
        types, terms, nonzero = dict(self.types), dict(self.terms), set(self.nonzero)
        return Proofs(types, terms, nonzero, before, self.inferred, self._serial)

    def dim(self, size: Size) -> int | str | None:
        """The size as shapes state it; None where no name says what it is."""
        name = size if isinstance(size, int) else size_terms.spelled(size)
        if isinstance(name, str) and size != size_terms.atom(name):
            self.terms[name] = cast(Term, size)
        return name

    def size(self, symbol: str) -> Term:
        """What a symbol in a shape stands for."""
        return self.terms.get(symbol) or size_terms.atom(symbol)

    def is_nonzero(self, size: int | str | None) -> bool:
        """True where the size, as shapes state it, is proven to be zero in no run."""
        if size is None:
            return False
        return size_terms.is_nonzero(
            size if isinstance(size, int) else self.size(size), self.nonzero
        )

    def settle(self, known: dict[Value, TensorType]) -> None:
        """Give new names to what inference just named, and let those of before mean the same."""
        self._replace(known, self._named(known))
        learnt = self._learnt(known)
        self._replace(known, learnt)
        self._replace(self.types, learnt)
        for atom in self.nonzero & learnt.keys():
            size = size_terms.replaced(learnt[atom], learnt)
            if isinstance(size, Term) and len(size.parts) == 1:  # then so is each factor
                self.nonzero |= size.atoms

    def _named(self, known: dict[Value, TensorType]) -> dict[Hashable, Size]:
        """Names for what inference just named: those of before where the same value had one."""
        found: dict[Hashable, Size] = {}
        taken: set[str] = set()
        for value, kind in known.items():
            for axis, size in enumerate(kind.shape or ()):
                if not isinstance(size, str) or size in found or not _BY_INFERENCE.fullmatch(size):
                    continue
                old = self.before.get(value)
                same_rank = (
                    old is not None and old.shape and len(old.shape) == len(kind.shape or ())
                )
                name = old.shape[axis] if same_rank and old is not None and old.shape else None
                if not isinstance(name, str) or not is_open(name) or name in taken:
                    name = f"open__{next(self._serial)}"
                taken.add(name)
                found[size] = size_terms.atom(name)
        return found

    def _learnt(self, known: dict[Value, TensorType]) -> dict[Hashable, Size]:
        """What sizes that were open are now known as."""
        found: dict[Hashable, Size] = {}
        for value, old in self.before.items():
            new = known.get(value)
            if new is None or new.shape is None or len(old.shape or ()) != len(new.shape):
                continue
            for was, size in zip(old.shape or (), new.shape, strict=True):
                if was == size or size is None or not isinstance(was, str) or not is_open(was):
                    continue
                learn(found, was, size if isinstance(size, int) else self.size(size))
        return found

    def _replace(self, known: dict[Value, TensorType], by: dict[Hashable, Size]) -> None:
        if not by:
            return
        alike: dict[TensorType, TensorType] = {}
        for value, kind in known.items():
            if kind.shape is not None and not all(isinstance(size, int) for size in kind.shape):
                if kind not in alike:
                    shape = tuple(self._replaced(size, by) for size in kind.shape)
                    alike[kind] = TensorType(kind.data_type, shape)
                known[value] = alike[kind]

    def _replaced(self, size: int | str | None, by: dict[Hashable, Size]) -> int | str | None:
        if not isinstance(size, str):
            return size
        if size not in self.terms and size not in by:  # an atom, as nearly all are
            return size
        return self.dim(size_terms.replaced(self.size(size), by))


def learn(found: dict[Hashable, Size], symbol: str, size: Size) -> None:
    """Add to what is found that the symbol stands for the size, consistently."""
    size = size_terms.replaced(size, found)
    if symbol in found or (isinstance(size, Term) and symbol in size.atoms):
        return
    if isinstance(size, Term) and size_terms.spelled(size) is None:
        return
    found[symbol] = size
