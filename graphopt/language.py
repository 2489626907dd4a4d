"""What a rule is written in: values, constants, operators, and `require`.

Before the yield these stand for what a pattern looks for, after it for what was found.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import GraphoptError
from graphopt.ir import Shape


class RuleError(GraphoptError):
    """A rule is written wrongly; it shows when the rule is defined or first fires."""


class Rejected(Exception):  # an answer, not an error
    """The rule does not apply here; the text says why."""


def require(condition: object, reason: str) -> None:
    """Let the rule fire only if `condition` holds; `graphopt explain` shows `reason` if not."""
    if not condition:
        raise Rejected(reason)


class Var:
    """A value in a rule: any tensor, or what an operator of the pattern computes."""

    def __or__(self, other: Var) -> Var:
        """Either of two alternatives; they must bind the same names."""
        return self._unavailable()

    def __bool__(self) -> bool:
        raise RuleError("a value is neither true nor false: ask is_absent, after the yield")

    @property
    def shape(self) -> Shape:
        """Proven sizes: numbers, symbols (equal means equal) or None; an unknown rank rejects."""
        return self._unavailable()

    @property
    def rank(self) -> int:
        """Number of axes; the rule does not fire where it is unknown."""
        return len(self.shape)

    @property
    def is_never_empty(self) -> bool:
        """True where no size is zero in any run: proven as numbers, or by what would fail."""
        return self._unavailable()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type as numpy has it (bfloat16 and narrower as ml_dtypes)."""
        return self._unavailable()

    @property
    def is_absent(self) -> bool:
        """True for an optional input that the matched node leaves out."""
        return False

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes that the matched node states, to be passed on."""
        return self._unavailable()

    def attr(self, name: str) -> Any:
        """An attribute of the matched node, its default included, wherever its opset states it."""
        return self._unavailable()

    def _unavailable(self) -> NoReturn:
        raise RuleError("only names are used before the yield: shapes and values come after it")


class Const(Var):
    """A value proven constant."""

    @property
    def values(self) -> NDArray[Any]:
        """The array: floats as float32 or float64 whatever their storage, the rest as stored."""
        return self._unavailable()

    def scalar(self) -> float:
        """The only element; the rule does not fire where there are more."""
        values = self.values
        require(values.size == 1, "a constant has more than one element")
        return float(values.reshape(-1)[0])


class Vars(Var):
    """All inputs, or all outputs, of an operator that takes any number."""

    def __iter__(self) -> Generator[Var, None, None]:
        self._unavailable()

    def __len__(self) -> int:
        self._unavailable()


class Call(Protocol):
    """An operator; positions are inputs, names are attributes (or inputs that once were)."""

    def __call__(self, *operands: Any, outputs: int | None = 1, **attributes: Any) -> Any:
        """The output; a tuple for `outputs` over 1, a Vars for None, any number."""


class Ops(Protocol):
    """Operators by name: `op.Conv(x, w)`; those of other domains by `op.of("com.microsoft")`."""

    def __getattr__(self, name: str) -> Call: ...


@dataclass(frozen=True)
class Absent:
    """Default of a parameter whose input may be left out; `value` then stands for it."""

    value: float


def absent(value: float = 0.0) -> Any:
    """Marks an optional input of the pattern; where left out it reads as this number."""
    return Absent(value)
