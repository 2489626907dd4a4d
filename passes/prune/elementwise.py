"""Operators that keep channels apart: element by element, position by position, by channel."""

from __future__ import annotations

from typing import Final

from graphopt.operators import BROADCASTING, ELEMENTWISE
from graphopt.passes.prune.call import Call, Handler
from graphopt.passes.prune.labels import Axis, Facts

_CHANNELS: Final = 1  # the axis of channels of all that convolutions give
_KEEPS_ORIGIN: Final = frozenset({"Identity", "Cast", "CastLike", "Dropout"})
_ALIGNED: Final = 7  # before, an attribute said where
_SOFTMAX_BY_AXIS: Final = 13  # before, all axes from `axis` on were one


def unary(call: Call) -> list[Facts] | None:
    """The same channels; what else it reads is one number, or a type."""
    source = call.input(0)
    if source is None or source.axes is None:
        return None
    op = call.node.op
    kept = source if op in _KEEPS_ORIGIN else Facts(source.axes)
    return [kept, *(Facts(source.axes) for _ in call.node.outputs[1:])]


def broadcast(call: Call) -> list[Facts] | None:
    """Operands whose axes are aligned at the last one, as they are from opset 7 on."""
    if call.opset < _ALIGNED and not call.node.domain:
        return None
    given = [facts for facts in call.inputs if facts is not None]
    operands = [facts.axes for facts in given if facts.axes is not None]
    if len(operands) < len(given) or not operands:
        return None
    rank = max(map(len, operands))
    padded = [(Axis(1),) * (rank - len(axes)) + axes for axes in operands]
    return [Facts(tuple(call.coupling.join(column) for column in zip(*padded, strict=True)))]


def batch_normalization(call: Call) -> list[Facts] | None:
    """Four or two vectors with one number for each channel."""
    axes = call.axes
    if axes is None or len(axes) < 2 or not call.integer("spatial", 1):
        return None
    if any(value is not None for value in call.node.outputs[1:]):
        return None
    vectors = [facts.axes for facts in call.inputs[1:] if facts is not None]
    if any(vector is None or len(vector) != 1 for vector in vectors):
        return None
    channels = [axes[_CHANNELS], *(vector[0] for vector in vectors if vector)]
    joined = call.coupling.join(channels)
    return [Facts((axes[0], joined, *axes[2:]))]


def instance_normalization(call: Call) -> list[Facts] | None:
    """As batch normalisation, over the positions of each channel."""
    if call.axes is not None:
        call.bar(*call.axes[2:])
    return batch_normalization(call)


def layer_normalization(call: Call) -> list[Facts] | None:
    """Over the axes from `axis` on, which have to stay."""
    axes = call.axes
    if axes is None or (at := call.axis("axis", -1, len(axes))) < 0:
        return None
    call.bar(*axes[at:], *call.inputs[1:])
    bare = tuple(Axis(axis.size) for axis in axes[at:])
    reduced = Facts(axes[:at] + (Axis(1),) * len(bare))
    return [Facts(axes[:at] + bare), *(reduced for _ in call.node.outputs[1:])]


def skip_layer_normalization(call: Call) -> list[Facts] | None:
    """A sum, normalised over the last axis; the fourth output is the sum."""
    if any(value is not None for value in call.node.outputs[1:3]):
        return None
    for facts in call.inputs:
        if facts is None or not facts.axes:
            return None
        call.bar(facts.axes[-1])
    found = broadcast(call)
    if found is None or found[0].axes is None:
        return None
    summed = Facts((*found[0].axes[:-1], Axis(found[0].axes[-1].size)))
    return [summed] * len(call.node.outputs)


def along_one_axis(call: Call) -> list[Facts] | None:
    """Softmax and others that mix the elements along `axis`."""
    axes = call.axes
    is_old = call.opset < _SOFTMAX_BY_AXIS and "max" in call.node.op
    if axes is None or (at := call.axis("axis", 1 if is_old else -1, len(axes))) < 0:
        return None
    mixed = range(at, len(axes)) if is_old else (at,)
    call.bar(*(axes[axis] for axis in mixed))
    return [Facts(tuple(Axis(a.size) if number in mixed else a for number, a in enumerate(axes)))]


def pool(call: Call) -> list[Facts] | None:
    """Over positions; batch and channels pass."""
    axes = call.axes
    if axes is None or len(axes) < 3 or any(value for value in call.node.outputs[1:]):
        return None
    call.bar(*axes[2:])
    size = 1 if call.node.op.startswith("Global") else None
    return [Facts((*axes[:2], *(Axis(size) for _ in axes[2:])))]


def reduce(call: Call) -> list[Facts] | None:
    """Over axes that have to stay, whatever is computed of them."""
    axes = call.axes
    if axes is None:
        return None
    if call.node.op.startswith("Arg"):
        over: list[int] | None = [call.integer("axis", 0)]
    else:
        over = call.setting("axes", 1)
        if over is None and call.input(1) is not None:
            return None
    if not over:
        if call.integer("noop_with_empty_axes", 0):
            return None
        over = list(range(len(axes)))
    reduced = {axis + len(axes) if axis < 0 else axis for axis in over}
    call.bar(*(axes[axis] for axis in reduced if axis < len(axes)))
    keep = bool(call.integer("keepdims", 1))
    left = [
        Axis(1) if number in reduced else axis
        for number, axis in enumerate(axes)
        if keep or number not in reduced
    ]
    return [Facts(tuple(left))]


_NAMES: Final[tuple[tuple[frozenset[str], Handler], ...]] = (
    (ELEMENTWISE | {"CastLike", "Dropout"}, unary),
    (BROADCASTING | {"Where"}, broadcast),
    (frozenset({"BatchNormalization"}), batch_normalization),
    (frozenset({"InstanceNormalization"}), instance_normalization),
    (
        frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}),
        layer_normalization,
    ),
    (frozenset({"Softmax", "LogSoftmax", "Hardmax"}), along_one_axis),
    (frozenset({"MaxPool", "AveragePool", "LpPool", "GlobalAveragePool"}), pool),
    (frozenset({"GlobalMaxPool", "GlobalLpPool"}), pool),
    (
        frozenset(f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean"))
        | frozenset(f"Reduce{kind}" for kind in ("Min", "Prod", "Sum", "SumSquare")),
        reduce,
    ),
    (frozenset({"ArgMax", "ArgMin"}), reduce),
)

HANDLERS: Final[dict[tuple[str, str], Handler]] = {
    **{("", op): handler for names, handler in _NAMES for op in names},
    **dict.fromkeys((("com.microsoft", op) for op in ("Gelu", "QuickGelu")), unary),
    **dict.fromkeys((("com.microsoft", op) for op in ("BiasGelu", "FastGelu")), broadcast),
    **dict.fromkeys(
        (("com.microsoft", f"Skip{kind}Normalization") for kind in ("Layer", "SimplifiedLayer")),
        skip_layer_normalization,
    ),
}
