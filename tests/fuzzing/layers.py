"""Kinds that add whole layers: convolutions, products, norms, activations, recurrences."""

from __future__ import annotations

import numpy as np

from tests.fuzzing.drawing import FLOAT, INT, Drawer, Scope, Typed, Unsuited, fixed
from tests.fuzzing.tensors import broadcast


def _spatial(x: Typed) -> int:
    channels = x.shape[1][0]
    if x.shape[1] != fixed(channels) or not 0 < channels <= 12:
        raise Unsuited
    return channels


def conv(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (3, 4))
    channels = _spatial(x)
    made = d.rng.choice([2, 4, 6])
    groups = d.rng.choice([g for g in (1, 2, channels) if channels % g == 0 and made % g == 0])
    kernel = [d.rng.choice([1, 3])] * (x.rank - 2)
    weight = d.floats(s, made, channels // groups, *kernel)
    bias = [d.floats(s, made)] if d.rng.random() < 0.5 else []
    pads = [k // 2 for k in kernel] * 2
    after = (x.shape[0], fixed(made), *x.shape[2:])
    y = d.add(s, "Conv", [x, weight, *bias], FLOAT, after, group=groups, pads=pads)
    follow(d, s, y, made)


def conv_transpose(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (3, 4))
    channels, made = _spatial(x), d.rng.choice([2, 4])
    spread = x.rank - 2
    weight = d.floats(s, channels, made, *[2] * spread)
    bias = [d.floats(s, made)] if d.rng.random() < 0.5 else []
    after = (x.shape[0], fixed(made), *(tuple(2 * n for n in dim) for dim in x.shape[2:]))
    y = d.add(s, "ConvTranspose", [x, weight, *bias], FLOAT, after, strides=[2] * spread)
    follow(d, s, y, made)


def follow(d: Drawer, s: Scope, y: Typed, channels: int) -> None:
    """What comes after a convolution: norms, scales, biases, activations."""
    ones = [1] * (y.rank - 2)
    for _ in range(d.rng.randint(0, 3)):
        way = d.rng.randrange(5)
        if way == 0:
            y = norm(d, s, y, channels)
        elif way == 1:
            op = d.rng.choice(["Add", "Mul", "Sub", "Div"])
            factor = d.rng.choice([d.floats(s, channels, *ones), d.floats(s), d.floats(s, 1)])
            if op == "Div":
                factor = d.stored(
                    s, np.arange(1, channels + 1, dtype=np.float32).reshape(-1, *ones)
                )
            y = d.add(s, op, [y, factor], FLOAT, y.shape)
        elif way == 2:
            y = d.add(s, d.rng.choice(["Relu", "Sigmoid", "Tanh"]), [y], FLOAT, y.shape)
        elif way == 3:
            others = [v for v in s.visible if v.element == FLOAT and v.shape == y.shape]
            y = d.add(s, "Add", [y, d.rng.choice(others)], FLOAT, y.shape)
        else:
            y = d.add(s, "Identity", [y], FLOAT, y.shape)


def norm(d: Drawer, s: Scope, x: Typed, channels: int) -> Typed:
    parts = [d.floats(s, channels) for _ in range(3)]
    variance = d.stored(s, np.abs(np.arange(channels, dtype=np.float32) - 1) + 0.5)
    return d.add(s, "BatchNormalization", [x, *parts, variance], FLOAT, x.shape, epsilon=1e-3)


def batch_norm(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (2, 3, 4))
    norm(d, s, x, _spatial(x))


def pool(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, (3, 4))
    op = d.rng.choice(["GlobalAveragePool", "MaxPool", "AveragePool"])
    if op == "GlobalAveragePool":
        d.add(s, op, [x], FLOAT, (*x.shape[:2], *[fixed(1)] * (x.rank - 2)))
        return
    ones = [1] * (x.rank - 2)
    how = {"kernel_shape": [3 * n for n in ones], "pads": ones * 2}
    d.add(s, op, [x], FLOAT, x.shape, **how)


def gemm(d: Drawer, s: Scope) -> None:
    x = d.pick(s, FLOAT, 2)
    flip = d.rng.randint(0, 1)
    inner, made = x.shape[0 if flip else 1], d.rng.choice([4, 6, 8])
    if inner != fixed(inner[0]):
        raise Unsuited
    turned = d.rng.randint(0, 1)
    weight = d.floats(s, *([made, inner[0]] if turned else [inner[0], made]))
    bias = [d.floats(s, *d.rng.choice([(made,), (1, made), ()]))]
    bias = bias if d.opset < 11 or d.rng.random() < 0.6 else []
    how = {"transA": flip, "transB": turned}
    how |= {"alpha": 0.5, "beta": 2.0} if d.rng.random() < 0.3 else {}
    y = d.add(s, "Gemm", [x, weight, *bias], FLOAT, (x.shape[1 - (1 - flip)], fixed(made)), **how)
    follow(d, s, y, made)


def dense(d: Drawer, s: Scope) -> None:
    """A product with a constant, a bias, a scale."""
    x = d.pick(s, FLOAT, (2, 3, 4))
    inner, made = x.shape[-1], d.rng.choice([4, 6, 8])
    if inner != fixed(inner[0]) or inner[0] < 1:
        raise Unsuited
    y = d.add(s, "MatMul", [x, d.floats(s, inner[0], made)], FLOAT, (*x.shape[:-1], fixed(made)))
    for _ in range(d.rng.randint(0, 2)):
        factor = d.floats(s, *d.rng.choice([(made,), (1, made), (), (1,)]))
        pair = [y, factor] if d.rng.random() < 0.7 else [factor, y]
        y = d.add(s, d.rng.choice(["Add", "Mul", "Sub"]), pair, FLOAT, broadcast(y, factor))


def _tokens(d: Drawer, s: Scope) -> Typed:
    """Rows of eight; where their number is known, an operator may take the place of the parts."""
    if d.rng.random() < 0.5:
        return d.pick(s, FLOAT, 3, lambda v: v.shape[2] == fixed(8))
    x = d.pick(s, FLOAT, 2, lambda v: all(dim == fixed(dim[0]) and dim[0] for dim in v.shape))
    rows, inner = x.shape
    y = d.add(s, "MatMul", [x, d.floats(s, inner[0], 8)], FLOAT, (rows, fixed(8)))
    target = d.ints(s, [1, rows[0], 8])
    return d.add(s, "Reshape", [y, target], FLOAT, (fixed(1), rows, fixed(8)))


def attention(d: Drawer, s: Scope) -> None:
    """softmax(scale q k' + mask) v, heads split off or not."""
    x = _tokens(d, s)
    batch, length, _ = x.shape
    heads = d.rng.random() < 0.5

    def project() -> Typed:
        y = d.add(s, "MatMul", [x, d.floats(s, 8, 8)], FLOAT, x.shape)
        if d.rng.random() < 0.5:
            y = d.add(s, "Add", [y, d.floats(s, 8)], FLOAT, x.shape)
        if not heads:
            return y
        split = (batch, length, fixed(2), fixed(4))
        y = d.add(s, "Reshape", [y, d.ints(s, [0, 0, 2, 4])], FLOAT, split)
        return d.add(
            s, "Transpose", [y], FLOAT, (batch, fixed(2), length, fixed(4)), perm=[0, 2, 1, 3]
        )

    q, k, v = project(), project(), project()
    perm = [*range(k.rank - 2), k.rank - 1, k.rank - 2]
    k = d.add(s, "Transpose", [k], FLOAT, tuple(k.shape[a] for a in perm), perm=perm)
    scale = d.stored(s, np.array(0.5, np.float32))
    if d.rng.random() < 0.5:
        q = d.add(s, "Mul", [q, scale], FLOAT, q.shape)
    scores = d.add(s, "MatMul", [q, k], FLOAT, (*q.shape[:-1], length))
    scores = d.add(s, d.rng.choice(["Mul", "Div"]), [scores, scale], FLOAT, scores.shape)
    if length == fixed(length[0]) and d.rng.random() < 0.6:
        masked = d.rng.choice([-np.inf, np.finfo(np.float32).min, -1e4])
        seen = np.tri(length[0], k=d.rng.randint(-1, 1)) > 0  # the first row sees nothing, at -1
        mask = d.stored(s, np.where(seen, 0, masked).astype(np.float32))
        scores = d.add(s, "Add", [scores, mask], FLOAT, scores.shape)
    weights = d.add(s, "Softmax", [scores], FLOAT, scores.shape, axis=scores.rank - 1)
    y = d.add(s, "MatMul", [weights, v], FLOAT, v.shape)
    if heads:
        back = (batch, length, fixed(2), fixed(4))
        y = d.add(s, "Transpose", [y], FLOAT, back, perm=[0, 2, 1, 3])
        d.add(s, "Reshape", [y, d.ints(s, [0, 0, 8])], FLOAT, x.shape)


def normalized(d: Drawer, s: Scope) -> None:
    """A LayerNormalization or an RMSNormalization out of its parts."""
    x = d.pick(s, FLOAT, (2, 3, 4), lambda v: v.shape[-1] == fixed(v.shape[-1][0]))
    flat = (*x.shape[:-1], fixed(1))
    inputs, how = d.setting(s, "axes", d.reduced(x, [x.rank - 1]), 18)
    if d.rng.random() < 0.6:
        mean = d.add(s, "ReduceMean", [x, *inputs], FLOAT, flat, keepdims=1, **how)
        x = d.add(s, "Sub", [x, mean], FLOAT, x.shape)
    square = d.add(s, "Mul", [x, x], FLOAT, x.shape)
    if d.rng.random() < 0.5:
        square = d.add(s, "Pow", [x, d.stored(s, np.float32(2))], FLOAT, x.shape)
    variance = d.add(s, "ReduceMean", [square, *inputs], FLOAT, flat, keepdims=1, **how)
    moved = d.add(s, "Add", [variance, d.stored(s, np.float32(1e-2))], FLOAT, flat)
    root = d.add(s, "Sqrt", [moved], FLOAT, flat)
    y = d.add(s, "Div", [x, root], FLOAT, x.shape)
    if d.rng.random() < 0.7:
        y = d.add(s, "Mul", [y, d.floats(s, x.shape[-1][0])], FLOAT, x.shape)
        d.add(s, "Add", [y, d.floats(s, x.shape[-1][0])], FLOAT, x.shape)


def activation(d: Drawer, s: Scope) -> None:
    """Gelu, HardSwish, Swish, Mish or LeakyRelu out of its parts."""
    x = d.pick(s, FLOAT)

    def one(op: str, *inputs: Typed | float) -> Typed:
        parts = [d.stored(s, np.float32(v)) if isinstance(v, float) else v for v in inputs]
        return d.add(s, op, parts, FLOAT, x.shape)

    way = d.rng.randrange(5)
    if way == 0:
        one("Mul", one("Mul", x, one("Add", one("Erf", one("Div", x, 2**0.5)), 1.0)), 0.5)
    elif way == 1 and d.opset >= 11:
        bounds = [d.stored(s, np.float32(n)) for n in (0, 6)]
        clipped = d.add(s, "Clip", [one("Add", x, 3.0), *bounds], FLOAT, x.shape)
        one("Mul", x, one("Div", clipped, 6.0))
    elif way == 2:
        one("Mul", x, one("Sigmoid", x))
    elif way == 3:
        one("Mul", x, one("Tanh", one("Softplus", x)))
    else:
        d.add(s, "Max", [x, one("Mul", x, 0.1)], FLOAT, x.shape)


def recurrent(d: Drawer, s: Scope) -> None:
    """An LSTM, GRU or RNN, its states from nowhere, from zeros or from sizes."""
    x = d.pick(s, FLOAT, 3, lambda v: v.shape[2] == fixed(v.shape[2][0]))
    op, gates = d.rng.choice([("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    hidden, inner = 3, x.shape[2][0]
    parts = [d.floats(s, 1, gates * hidden, inner), d.floats(s, 1, gates * hidden, hidden)]
    state = (fixed(1), x.shape[1], fixed(hidden))
    inputs: list[Typed | str] = [x, *parts, d.floats(s, 1, 2 * gates * hidden), ""]
    if d.rng.random() < 0.3:
        inputs[3] = ""
    for _ in range(states := 2 if op == "LSTM" else 1):
        inputs += [_state(d, s, x, state) if d.rng.random() < 0.8 else ""]
    after = [(x.shape[0], fixed(1), x.shape[1], fixed(hidden)), *[state] * states]
    d.add(s, op, inputs, FLOAT, *after, hidden_size=hidden)


def _state(d: Drawer, s: Scope, x: Typed, state: tuple[tuple[int, ...], ...]) -> Typed:
    from tests.fuzzing.sizes import joined

    target = joined(d, s, list(state))
    if d.rng.random() < 0.5:
        return d.add(s, "ConstantOfShape", [target], FLOAT, state)
    start = d.floats(s, 1, 1, 3)
    return d.add(s, "Expand", [start, target], FLOAT, state)


def embedding(d: Drawer, s: Scope) -> None:
    """Rows of a table, where the indices cannot lie outside."""
    i = d.pick(s, INT, (1, 2), lambda v: v.name == "i")
    d.add(s, "Gather", [d.floats(s, 8, 8), i], FLOAT, (*i.shape, fixed(8)))


KINDS = [
    (3, conv), (1, conv_transpose), (2, batch_norm), (1, pool), (2, gemm), (2, dense),
    (1, attention), (1, normalized), (2, activation), (1, recurrent), (1, embedding),
]  # fmt: skip
