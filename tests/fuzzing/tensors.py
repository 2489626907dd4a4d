"""Kinds of nodes that compute element by element, move elements, or reduce them."""

from __future__ import annotations

import numpy as np

from tests.fuzzing.drawing import (
    BOOL,
    FLOAT,
    HALF,
    INT,
    INT32,
    Drawer,
    Scope,
    Typed,
    Unsuited,
    fixed,
    product,
)
from tests.graphs import node

_UNARY = ("Abs", "Identity", "Neg", "Relu", "Tanh", "Sigmoid", "Softplus", "LeakyRelu", "Erf")
_HALF_UNARY = ("Abs", "Identity", "Neg", "Relu", "Tanh", "Sigmoid")
_BINARY = ("Add", "Mul", "Sub", "Add", "Mul", "Sub", "Max", "Min")
_REDUCE = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceMean")
_FLOATS = (FLOAT, HALF)


def broadcast(a: Typed, b: Typed) -> tuple[tuple[int, ...], ...]:
    """The common shape. Raises Unsuited where there is none at all sizes."""
    dims = []
    for at in range(1, max(a.rank, b.rank) + 1):
        left = a.shape[-at] if at <= a.rank else fixed(1)
        right = b.shape[-at] if at <= b.rank else fixed(1)
        if left != right and fixed(1) not in (left, right):
            raise Unsuited
        dims.append(right if left == fixed(1) else left)
    return tuple(reversed(dims))


def unary(d: Drawer, s: Scope) -> None:
    x = d.pick(s, _FLOATS)
    d.add(s, d.rng.choice(_UNARY if x.element == FLOAT else _HALF_UNARY), [x], x.element, x.shape)


def integer_unary(d: Drawer, s: Scope) -> None:
    x = d.pick(s, (INT, BOOL))
    op = "Not" if x.element == BOOL else d.rng.choice(["Neg", "Abs", "Identity", "Sign"])
    d.add(s, op, [x], x.element, x.shape)


def binary(d: Drawer, s: Scope) -> None:
    a = d.pick(s, _FLOATS)
    b = d.pick(s, a.element)
    ops = _BINARY if a.element == FLOAT or d.opset >= 13 else _BINARY[:6]
    pair = [a, b] if d.rng.random() < 0.5 else [b, a]
    d.add(s, d.rng.choice(ops), pair, a.element, broadcast(a, b))


def scaled(d: Drawer, s: Scope) -> None:
    """With a constant that broadcasts along some axes."""
    x = d.pick(s, _FLOATS, (0, 1, 2, 3, 4))
    sizes = [
        dim[0] if dim == fixed(dim[0]) and d.rng.random() < 0.5 else 1
        for dim in x.shape[d.rng.randint(0, x.rank) :]
    ]
    constant = d.floats(s, *sizes, element=x.element)
    op = d.rng.choice([*_BINARY[:6], "Div"])
    pair = [x, constant]
    if op == "Div":
        constant = d.stored(s, np.array(d.rng.choice([0.5, 2, 3, -4]), _numpy(x)))
        pair = [x, constant]
    elif d.rng.random() < 0.3:
        pair = [constant, x]
    d.add(s, op, pair, x.element, broadcast(x, constant))


def _numpy(x: Typed) -> type:
    return np.float16 if x.element == HALF else np.float32


def integer_binary(d: Drawer, s: Scope) -> None:
    a = d.pick(s, (INT, INT32))
    b = d.pick(s, a.element)
    d.add(s, d.rng.choice(["Add", "Mul", "Sub"]), [a, b], a.element, broadcast(a, b))


def compare(d: Drawer, s: Scope) -> None:
    a = d.pick(s, (FLOAT, INT))
    b = d.pick(s, a.element)
    ops = ["Less", "Greater"] + (["Equal"] if a.element == INT else [])
    ops += ["LessOrEqual", "GreaterOrEqual"] if d.opset >= 12 else []
    d.add(s, d.rng.choice(ops), [a, b], BOOL, broadcast(a, b))


def logic(d: Drawer, s: Scope) -> None:
    a, b = d.pick(s, BOOL), d.pick(s, BOOL)
    d.add(s, d.rng.choice(["And", "Or", "Xor"]), [a, b], BOOL, broadcast(a, b))


def where(d: Drawer, s: Scope) -> None:
    c, a = d.pick(s, BOOL), d.pick(s, (FLOAT, INT))
    b = d.pick(s, a.element)
    inner = Typed("", a.element, broadcast(a, b))
    d.add(s, "Where", [c, a, b], a.element, broadcast(c, inner))


def cast(d: Drawer, s: Scope) -> None:
    x = d.pick(s)
    to = d.rng.choice([FLOAT, FLOAT, HALF, INT, INT32, BOOL])
    if x.element in _FLOATS and to in (INT, INT32, BOOL):
        return  # what rounding moves across a border is no fault
    content = x.content if to in (INT, INT32) and x.element in (INT, INT32) else None
    d.add(s, "Cast", [x], to, x.shape, content=content, to=to)


def clip(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT)
    low, high = sorted(d.rng.sample([-1.0, 0.0, 0.5, 6.0], 2))
    if d.opset < 11:
        d.add(s, "Clip", [x], FLOAT, x.shape, min=low, max=high)
        return
    bounds = [d.stored(s, np.float32(n)) if d.rng.random() < 0.8 else "" for n in (low, high)]
    d.add(s, "Clip", [x, *bounds], FLOAT, x.shape)


def transpose(d: Drawer, s: Scope) -> None:
    x = d.pick(s, None, (2, 3, 4, 5))
    perm = d.rng.sample(range(x.rank), x.rank)
    if x.rank == 4 and d.rng.random() < 0.7:
        perm = d.rng.choice([[0, 2, 3, 1], [0, 3, 1, 2]])
    d.add(s, "Transpose", [x], x.element, tuple(x.shape[a] for a in perm), perm=perm)


def transpose_back(d: Drawer, s: Scope) -> None:
    x = d.pick(s, None, (2, 3, 4, 5))
    perms = [list(a.ints) for n in s.nodes for a in n.attribute if a.name == "perm"]
    perms = [perm for perm in perms if len(perm) == x.rank]
    if perms:
        perm = np.argsort(d.rng.choice(perms)).tolist()
        d.add(s, "Transpose", [x], x.element, tuple(x.shape[a] for a in perm), perm=perm)


def reduce(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (1, 2, 3, 4))
    axes = d.rng.sample(range(x.rank), d.rng.randint(1, x.rank))
    keeps = d.rng.randint(0, 1)
    after = tuple(
        fixed(1) if a in axes else n for a, n in enumerate(x.shape) if keeps or a not in axes
    )
    op = d.rng.choice(_REDUCE)
    inputs, how = d.setting(s, "axes", d.reduced(x, axes), 13 if op == "ReduceSum" else 18)
    d.add(s, op, [x, *inputs], FLOAT, after, keepdims=keeps, **how)


def arg_max(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (1, 2, 3, 4))
    axis, keeps = d.rng.randrange(x.rank), d.rng.randint(0, 1)
    after = (*x.shape[:axis], *([fixed(1)] * keeps), *x.shape[axis + 1 :])
    d.add(s, "ArgMax", [x], INT, after, axis=axis, keepdims=keeps)


def concat(d: Drawer, s: Scope) -> None:
    x = d.pick(s, (FLOAT, INT, HALF), (1, 2, 3, 4))
    axis = d.rng.randrange(x.rank)

    def fits(v: Typed) -> bool:
        return v.rank == x.rank and all(
            p == q for a, (p, q) in enumerate(zip(v.shape, x.shape, strict=True)) if a != axis
        )

    parts = [x, *(d.pick(s, x.element, x.rank, fits) for _ in range(d.rng.randint(0, 2)))]
    total = tuple(map(sum, zip(*(v.shape[axis] for v in parts), strict=True)))
    after = (*x.shape[:axis], total, *x.shape[axis + 1 :])
    content = None
    if x.rank == 1 and all(v.content is not None for v in parts):
        content = tuple(dim for v in parts for dim in v.content or ())
    d.add(s, "Concat", parts, x.element, after, content=content, axis=d.axis(x, axis))


def split(d: Drawer, s: Scope) -> None:
    x = d.pick(s, (FLOAT, INT), (1, 2, 3, 4))
    axis = d.rng.randrange(x.rank)
    size = x.shape[axis][0]
    if x.shape[axis] != fixed(size) or size < 2:
        raise Unsuited
    first = d.rng.randint(1, size - 1)
    inputs, how = d.setting(s, "split", [first, size - first], 13)
    shapes = [(*x.shape[:axis], fixed(n), *x.shape[axis + 1 :]) for n in (first, size - first)]
    d.add(s, "Split", [x, *inputs], x.element, *shapes, axis=axis, **how)


def pad(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (1, 2, 3, 4))
    pads = [d.rng.choice([0, 0, 0, 1, 2]) for _ in range(2 * x.rank)]
    ends = zip(x.shape, pads, pads[x.rank :], strict=False)
    after = tuple(tuple(n + p + q for n in dim) for dim, p, q in ends)
    inputs, how = d.setting(s, "pads", pads, 11)
    d.add(s, "Pad", [x, *inputs], FLOAT, after, **how)


def softmax(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (1, 2, 3, 4))
    op = d.rng.choice(["Softmax", "Softmax", "LogSoftmax"])
    d.add(s, op, [x], FLOAT, x.shape, axis=d.axis(x, d.rng.randrange(x.rank)))


def squeeze(d: Drawer, s: Scope) -> None:
    x = d.pick(s, None, (1, 2, 3, 4, 5), lambda v: fixed(1) in v.shape)
    axis = d.rng.choice([a for a, dim in enumerate(x.shape) if dim == fixed(1)])
    inputs, how = d.setting(s, "axes", [axis], 13)
    after = (*x.shape[:axis], *x.shape[axis + 1 :])
    d.add(s, "Squeeze", [x, *inputs], x.element, after, content=x.content, **how)


def unsqueeze(d: Drawer, s: Scope) -> None:
    x = d.pick(s, None, (0, 1, 2, 3))
    axis = d.rng.randint(0, x.rank)
    inputs, how = d.setting(s, "axes", [axis], 13)
    after = (*x.shape[:axis], fixed(1), *x.shape[axis:])
    content = x.content if x.rank == 0 else None
    d.add(s, "Unsqueeze", [x, *inputs], x.element, after, content=content, **how)


def flatten(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (1, 2, 3, 4))
    axis = d.rng.randint(0, x.rank)
    d.add(s, "Flatten", [x], FLOAT, (product(x.shape[:axis]), product(x.shape[axis:])), axis=axis)


def gather(d: Drawer, s: Scope) -> None:
    """Of a dimension that is known, by constant indices."""
    x = d.pick(s, (FLOAT, INT), (1, 2, 3, 4))
    axis = d.rng.randrange(x.rank)
    size = min(x.shape[axis])
    if size < 1:
        raise Unsuited
    shape = d.rng.choice([(), (1,), (2,)])
    at = [d.rng.randrange(size) for _ in range(int(np.prod(shape)))]
    indices = d.stored(s, np.array(at, np.int64).reshape(shape))
    after = (*x.shape[:axis], *map(fixed, shape), *x.shape[axis + 1 :])
    content = tuple(x.content[i] for i in at) if x.content is not None and x.rank == 1 else None
    d.add(s, "Gather", [x, indices], x.element, after, content=content, axis=axis)


def again(d: Drawer, s: Scope) -> None:
    """A node that is there already, under other names."""
    made = {v.name: v for v in s.made}
    plain = [n for n in s.nodes if n.output[0] in made and not n.op_type.startswith("Random")]
    if not plain:
        raise Unsuited
    twin = d.rng.choice(plain)
    if any(a.HasField("g") for a in twin.attribute):
        raise Unsuited
    olds = [made[name] for name in twin.output if name in made]
    news = [Typed(d.name(), v.element, v.shape, v.content) for v in olds]
    names = iter(news)
    copy = node(
        twin.op_type,
        list(twin.input),
        [next(names).name if o in made else o for o in twin.output],
        domain=twin.domain,
    )
    copy.attribute.extend(twin.attribute)
    s.nodes.append(copy)
    s.visible += news
    s.made += news


def constant(d: Drawer, s: Scope) -> None:
    d.floats(s, *d.rng.choice([(), (1,), (6,), (4, 6), (1, 4, 1, 1), (8,), (1, 1, 8)]))


KINDS = [
    (3, unary), (1, integer_unary), (4, binary), (4, scaled), (1, integer_binary), (1, compare),
    (1, logic), (1, where), (1, cast), (1, clip), (3, transpose), (2, transpose_back), (2, reduce),
    (1, arg_max), (2, concat), (1, split), (1, pad), (1, softmax), (1, squeeze), (1, unsqueeze),
    (1, flatten), (1, gather), (2, again), (1, constant),
]  # fmt: skip
