"""Kinds of nodes that compute sizes, and that take what was computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzzing.drawing import (
    BOOL,
    FLOAT,
    INT,
    INT32,
    SIZES,
    Dim,
    Drawer,
    Scope,
    Typed,
    Unsuited,
    fixed,
    product,
)  # fmt: skip
from tests.fuzzing.tensors import broadcast


def shape_of(d: Drawer, s: Scope, x: Typed) -> Typed:
    if d.opset >= 15 and x.rank > 1 and d.rng.random() < 0.3:
        start = d.rng.randrange(x.rank)
        end = d.rng.randint(start + 1, x.rank)
        made = x.shape[start:end]
        how = {"start": start - x.rank * d.rng.randint(0, 1), "end": end}
        return d.add(s, "Shape", [x], INT, (fixed(len(made)),), content=made, **how)
    return d.add(s, "Shape", [x], INT, (fixed(x.rank),), content=x.shape)


def shape(d: Drawer, s: Scope) -> None:
    shape_of(d, s, d.pick(s, None, (1, 2, 3, 4)))


def size(d: Drawer, s: Scope) -> None:
    x = d.pick(s)
    d.add(s, "Size", [x], INT, (), content=(product(x.shape),))


def element(d: Drawer, s: Scope, x: Typed, at: int, rank: int) -> Typed:
    """One number of a vector, as a scalar or a vector of one, by one of the ways of exporters."""
    assert x.content is not None
    made = (x.content[at],)
    index = at - len(x.content) * int(d.opset >= 11 and d.rng.random() < 0.2)
    way = d.rng.randrange(4)
    if way == 0 and d.opset >= 10:
        ends = [d.ints(s, [at]), d.ints(s, [at + 1])]
        found = d.add(s, "Slice", [x, *ends], x.element, (fixed(1),), content=made)
    elif way == 1:
        found = d.add(s, "Gather", [x, d.ints(s, [index])], x.element, (fixed(1),), content=made)
    else:
        found = d.add(s, "Gather", [x, d.ints(s, index)], x.element, (), content=made)
    return ranked(d, s, found, rank)


def ranked(d: Drawer, s: Scope, x: Typed, rank: int) -> Typed:
    if x.rank == rank:
        return x
    inputs, how = d.setting(s, "axes", [0], 13)
    op, after = ("Unsqueeze", (fixed(1),)) if rank else ("Squeeze", ())
    return d.add(s, op, [x, *inputs], x.element, after, content=x.content, **how)


def take(d: Drawer, s: Scope) -> None:
    x = d.pick(s, INT, 1, lambda v: bool(v.content))
    element(d, s, x, d.rng.randrange(len(x.content or ())), d.rng.randint(0, 1))


def number(d: Drawer, s: Scope, dim: Dim, rank: int = 1) -> Typed:
    """An integer that has these values. Raises Unsuited where nothing of that size is there."""
    if dim == fixed(dim[0]) and d.rng.random() < 0.7:
        return d.ints(s, [dim[0]] if rank else dim[0])
    made = [v for v in s.visible if v.element == INT and v.content == (dim,) and v.rank < 2]
    if made and d.rng.random() < 0.5:
        return ranked(d, s, d.rng.choice(made), rank)
    x = d.pick(s, None, None, lambda v: dim in v.shape)
    shape = d.add(s, "Shape", [x], INT, (fixed(x.rank),), content=x.shape)
    return element(d, s, shape, x.shape.index(dim), rank)


def computed(op: str, a: Dim, b: Dim) -> Dim:
    if op in ("Div", "Mod"):
        if min(b) < 1 or min(a) < 0:
            raise Unsuited
        return tuple(x // y if op == "Div" else x % y for x, y in zip(a, b, strict=True))
    ways: dict[str, Any] = {"Add": sum, "Mul": np.prod, "Min": min, "Max": max}
    if op == "Sub":
        return tuple(x - y for x, y in zip(a, b, strict=True))
    return tuple(int(ways[op](pair)) for pair in zip(a, b, strict=True))


def arithmetic(d: Drawer, s: Scope) -> None:
    """Of sizes with numbers, or with other sizes."""
    a = d.pick(s, INT, (0, 1), lambda v: bool(v.content))
    if d.rng.random() < 0.6:
        b = d.ints(s, d.rng.choice([1, 2, 2, 3, 4, 8]))
    else:
        b = d.pick(s, INT, (0, 1), lambda v: v.content is not None and len(v.content) == 1)
    assert a.content
    assert b.content
    if d.rng.random() < 0.2 and len(a.content) == 1:
        a, b = b, a
    ops = ["Add", "Mul", "Mul", "Sub", "Div", "Div"]
    ops += ["Mod"] if d.opset >= 10 else []
    ops += ["Min", "Max"] if d.opset >= 12 else []
    op = d.rng.choice(ops)
    made = tuple(computed(op, dim, b.content[0]) for dim in a.content or ())
    d.add(s, op, [a, b], INT, broadcast(a, b), content=made)


def round_trip(d: Drawer, s: Scope) -> None:
    """Through another type and back, as exporters do around a division."""
    a = d.pick(s, INT, (0, 1), lambda v: v.content is not None)
    to = d.rng.choice([FLOAT, INT32])
    there = d.add(s, "Cast", [a], to, a.shape, to=to)
    if to == FLOAT and d.rng.random() < 0.5 and min(map(min, a.content or [(0,)])) >= 0:
        two = d.stored(s, np.float32(2))
        halved = d.add(s, "Div", [there, two], FLOAT, a.shape)
        there = d.add(s, "Floor", [halved], FLOAT, a.shape)
        content = tuple(tuple(n // 2 for n in dim) for dim in a.content or ())
        d.add(s, "Cast", [there], INT, a.shape, content=content, to=INT)
    else:
        d.add(s, "Cast", [there], INT, a.shape, content=a.content, to=INT)


def reduced(d: Drawer, s: Scope) -> None:
    x = d.pick(s, INT, 1, lambda v: bool(v.content))
    keeps = d.rng.randint(0, 1)
    after = (fixed(1),) if keeps else ()
    op = d.rng.choice(["ReduceProd", "ReduceSum"])
    if op == "ReduceSum":
        made = tuple(map(sum, zip(*(x.content or ()), strict=True)))
    else:
        made = product(x.content or ())
    d.add(s, op, [x], INT, after, content=(made,), keepdims=keeps)


def joined(d: Drawer, s: Scope, dims: list[Dim | int]) -> Typed:
    """A vector of sizes; numbers (0, -1) stand for themselves."""
    parts: list[Typed] = []
    for dim in dims:
        constant = [dim] if isinstance(dim, int) else None
        parts.append(d.ints(s, constant) if constant else number(d, s, dim))  # type: ignore[arg-type]
    if len(parts) == 1:
        return parts[0]
    content = tuple(fixed(dim) if isinstance(dim, int) else dim for dim in dims)
    return d.add(s, "Concat", parts, INT, (fixed(len(dims)),), content=content, axis=0)


def reshape(d: Drawer, s: Scope) -> None:
    """Neighbouring dimensions become one, one becomes two; the target is put together of sizes."""
    x = d.pick(s, (FLOAT, FLOAT, INT), (0, 1, 2, 3, 4, 5))
    dims = list(x.shape)
    for _ in range(d.rng.randint(0, 2)):
        at = d.rng.randint(0, len(dims))
        if d.rng.random() < 0.5 and at + 1 < len(dims):
            dims[at : at + 2] = [product(dims[at : at + 2])]
        elif at < len(dims) and dims[at] == fixed(dims[at][0]) and dims[at][0] % 2 == 0:
            dims[at : at + 1] = [fixed(2), fixed(dims[at][0] // 2)]
        elif len(dims) < 5:
            dims.insert(at, fixed(1))
    if not dims:
        raise Unsuited
    target: list[Dim | int] = list(dims)
    for at, dim in enumerate(dims):
        if at < x.rank and dim == x.shape[at] and d.rng.random() < 0.3:
            target[at] = 0
    if d.rng.random() < 0.5:
        target[d.rng.randrange(len(target))] = -1
    d.add(s, "Reshape", [x, joined(d, s, target)], x.element, tuple(dims))


def reshape_like(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT)
    like = d.pick(s, None, (1, 2, 3, 4), lambda v: product(v.shape) == product(x.shape))
    shape = d.add(s, "Shape", [like], INT, (fixed(like.rank),), content=like.shape)
    d.add(s, "Reshape", [x, shape], FLOAT, like.shape)


def expand(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (0, 1, 2, 3))
    like = d.pick(s, None, (1, 2, 3, 4), lambda v: v.rank >= x.rank)
    after = broadcast(x, like)
    if d.rng.random() < 0.5:
        target = d.add(s, "Shape", [like], INT, (fixed(like.rank),), content=like.shape)
    else:
        target = joined(d, s, list(after))
    d.add(s, "Expand", [x, target], FLOAT, after)


def filled(d: Drawer, s: Scope) -> None:
    x = d.pick(s, INT, 1, lambda v: v.content is not None and len(v.content) < 5)
    if min(map(min, x.content or ((0,),))) < 0:
        raise Unsuited
    how = {"value": _one(d.rng.choice([0.0, 1.0]))} if d.rng.random() < 0.7 else {}
    d.add(s, "ConstantOfShape", [x], FLOAT, x.content or (), **how)


def _one(number: float) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array([number], np.float32))


def cut(d: Drawer, s: Scope) -> None:
    """A Slice between constants or sizes."""
    x = d.pick(s, (FLOAT, INT), (1, 2, 3, 4))
    axis = d.rng.randrange(x.rank)
    dim = x.shape[axis]
    start = d.rng.randint(0, 1)
    last: Dim | int = d.rng.choice([2**31 - 1, 2**63 - 1, -1, 2, 3])
    if d.opset >= 10 and d.rng.random() < 0.5:
        v = d.pick(s, INT, (0, 1), lambda v: v.content is not None and len(v.content) == 1)
        end, (last,) = ranked(d, s, v, 1), v.content or ()
    lasts = fixed(last) if isinstance(last, int) else last
    ends = [min(n, e) if e >= 0 else max(n + e, 0) for n, e in zip(dim, lasts, strict=True)]
    made = tuple(max(e - min(start, n), 0) for n, e in zip(dim, ends, strict=True))
    after = (*x.shape[:axis], made, *x.shape[axis + 1 :])
    content = None
    if x.content is not None and x.rank == 1 and made == fixed(made[0]):
        content = x.content[start : ends[0]]
    if d.opset < 10:
        bounds = {"starts": [start], "ends": [last], "axes": [axis]}
        d.add(s, "Slice", [x], x.element, after, content=content, **bounds)
        return
    end = end if not isinstance(last, int) else d.ints(s, [last])
    inputs = [x, d.ints(s, [start]), end, d.ints(s, [d.axis(x, axis)])]
    inputs += [d.ints(s, [1])] if d.rng.random() < 0.3 else []
    d.add(s, "Slice", inputs, x.element, after, content=content)


def counted(d: Drawer, s: Scope) -> None:
    """A Range up to a size."""
    if d.opset < 11:
        raise Unsuited
    v = d.pick(s, INT, (0, 1), lambda v: v.content is not None and len(v.content) == 1)
    ends = [d.ints(s, 0), ranked(d, s, v, 0), d.ints(s, 1)]
    assert v.content is not None
    d.add(s, "Range", ends, INT, (tuple(max(n, 0) for n in v.content[0]),))


def tile(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (1, 2, 3))
    repeats: list[Dim | int] = [d.rng.choice([1, 1, 2]) for _ in x.shape]
    if d.rng.random() < 0.5:
        at = d.rng.randrange(x.rank)
        repeats[at] = d.rng.choice([tuple(sizes[n] for sizes in SIZES) for n in "NS"])
    dims = [fixed(n) if isinstance(n, int) else n for n in repeats]
    after = tuple(product(pair) for pair in zip(x.shape, dims, strict=True))
    d.add(s, "Tile", [x, joined(d, s, repeats)], FLOAT, after)


def question(d: Drawer, s: Scope) -> None:
    """Whether a size is some number, which an If or a Where may ask."""
    v = d.pick(s, INT, (0, 1), lambda v: v.content is not None and len(v.content) == 1)
    at = d.ints(s, d.rng.choice([0, 1, 2, 4, 6]))
    d.add(s, d.rng.choice(["Equal", "Less", "Greater"]), [ranked(d, s, v, 0), at], BOOL, ())


KINDS = [
    (2, shape), (1, size), (2, take), (3, arithmetic), (1, round_trip), (1, reduced), (4, reshape),
    (2, reshape_like), (2, expand), (1, filled), (2, cut), (1, counted), (1, tile), (1, question),
]  # fmt: skip
