"""Operators with weights: they read the channels of one value and give those of another."""

from __future__ import annotations

from typing import Final

from graphopt.passes.prune.call import Call, Handler
from graphopt.passes.prune.labels import Axis, Facts, Labels

_GATES: Final = {"LSTM": 4, "GRU": 3, "RNN": 1}


def convolution(call: Call) -> list[Facts] | None:
    """W [M, C / group, taps]: depthwise channels pass, of groups equally many go."""
    operands = _operands(call)
    if operands is None:
        return None
    x, w, channels, (first, second) = operands
    groups = call.integer("group", 1)
    out = first
    if groups == 1:
        _meet(call, w, 1)
    elif second.size == 1 and channels.size == groups:
        out = _depthwise(call, channels, out, groups)
    else:
        _by_groups(call, w, 1, channels, groups)
        if out.labels is not None:
            call.coupling.rows(out.labels.reshape(groups, -1).T)
    return _convolved(call, x, w, out)


def transposed_convolution(call: Call) -> list[Facts] | None:
    """W [C, M / group, taps]."""
    operands = _operands(call)
    if operands is None:
        return None
    x, w, channels, (first, second) = operands
    groups = call.integer("group", 1)
    out = second
    if groups == 1:
        _meet(call, w, 0)
    elif out.size == 1 and channels.size == groups:
        out = _depthwise(call, channels, first, groups)
    else:  # weights that read and give at once, and more than one group: left alone
        return None
    return _convolved(call, x, w, out)


def _meet(call: Call, w: Facts, axis: int) -> None:
    """The sum over all channels of input 0, axis 1."""
    x = call.input(0)
    assert x is not None
    assert x.axes is not None
    assert w.axes is not None
    joined = call.coupling.join([x.axes[1], w.axes[axis]])
    if joined.labels is not None:
        call.read(w, axis, 0, 1)


def _depthwise(call: Call, channels: Axis, out: Axis, groups: int) -> Axis:
    """Each channel gives as many: they go with it, and the number of groups with them."""
    if channels.labels is None or out.labels is None:
        call.bar(channels, out)
        return Axis(out.size)
    each = call.coupling.rows(out.labels.reshape(groups, -1))
    call.coupling.unite(channels.labels, each)
    call.fix_attribute("group", None, channels.labels, channels.labels)
    return out


def _by_groups(call: Call, w: Facts, axis: int, channels: Axis, groups: int) -> None:
    """An index of the weights serves the channel at that place of every group."""
    assert w.axes is not None
    inner = w.axes[axis]
    if channels.labels is None or inner.labels is None:
        call.bar(channels, inner)
        return
    call.coupling.unite(inner.labels, *channels.labels.reshape(groups, -1))
    call.read(w, axis, 0, 1)


def _operands(call: Call) -> tuple[Facts, Facts, Axis, tuple[Axis, Axis]] | None:
    """Input and weights of a convolution, its channels, and the weights' first two axes."""
    x, w = call.input(0), call.input(1)
    if x is None or w is None or x.axes is None or w.axes is None or w.origin is None:
        return None
    if len(x.axes) != len(w.axes) or len(w.axes) < 3:
        return None
    call.bar(*x.axes[2:], *w.axes[2:])
    return x, w, x.axes[1], (w.axes[0], w.axes[1])


def _convolved(call: Call, x: Facts, w: Facts, out: Axis) -> list[Facts] | None:
    assert x.axes is not None
    call.coupling.give(out)
    bias = call.input(2)
    if bias is not None:
        if bias.axes is None or len(bias.axes) != 1:
            return None
        out = call.coupling.join([out, bias.axes[0]])
    return [Facts((x.axes[0], out, *(Axis(None) for _ in x.axes[2:])))]


def matmul(call: Call) -> list[Facts] | None:
    """[..., M, K] times [..., K, N]; either may be constant."""
    a, b = call.input(0), call.input(1)
    if call.integer("transBatchA", 0) or call.integer("transBatchB", 0):
        return None
    return _product(call, a, b, (call.integer("transA", 0), call.integer("transB", 0)))


def gemm(call: Call) -> list[Facts] | None:
    """A product of matrices, and an addend that broadcasts."""
    a, b = call.input(0), call.input(1)
    found = _product(call, a, b, (call.integer("transA", 0), call.integer("transB", 0)))
    addend = call.input(2)
    if found is None or addend is None or found[0].axes is None:
        return found
    if addend.axes is None or len(addend.axes) > 2:
        return None
    padded = (Axis(1),) * (2 - len(addend.axes)) + addend.axes
    pairs = zip(found[0].axes, padded, strict=True)
    return [Facts(tuple(call.coupling.join(pair) for pair in pairs))]


def _product(
    call: Call, a: Facts | None, b: Facts | None, turned: tuple[int, int]
) -> list[Facts] | None:
    if a is None or b is None or not a.axes or not b.axes:
        return None
    ranks = len(a.axes), len(b.axes)
    if min(ranks) < 2:
        return None
    at = ranks[0] - (2 if turned[0] else 1), ranks[1] - (1 if turned[1] else 2)
    a = a.permuted([*range(ranks[0] - 2), ranks[0] - 1, ranks[0] - 2]) if turned[0] else a
    b = b.permuted([*range(ranks[1] - 2), ranks[1] - 1, ranks[1] - 2]) if turned[1] else b
    assert a.axes is not None
    assert b.axes is not None
    depth = call.coupling.join([a.axes[-1], b.axes[-2]])
    if depth.labels is not None and (a.origin is None) == (b.origin is None):
        call.bar(depth)  # no weights to be told from what they read
    elif depth.labels is not None and b.origin is not None:
        call.read(b, len(b.axes) - 2, 0, at[0])
    elif depth.labels is not None:
        call.read(a, len(a.axes) - 1, 1, at[1])
    if b.origin is not None:
        call.coupling.give(b.axes[-1])
    if a.origin is not None:
        call.coupling.give(a.axes[-2])
    rank = max(ranks)
    batch = [
        call.coupling.join(pair)
        for pair in zip(_padded(a.axes[:-2], rank), _padded(b.axes[:-2], rank), strict=True)
    ]
    return [Facts((*batch, a.axes[-2], b.axes[-1]))]


def _padded(axes: tuple[Axis, ...], rank: int) -> tuple[Axis, ...]:
    return (Axis(1),) * (rank - 2 - len(axes)) + axes


def recurrent(call: Call) -> list[Facts] | None:
    """Hidden units of LSTM, GRU and RNN: equally many of each direction go.

    W [D, gates * H, I], R [D, gates * H, H], B [D, 2 * gates * H], P [D, 3 * H].
    """
    x, w, r = call.input(0), call.input(1), call.input(2)
    if x is None or w is None or r is None or w.origin is None or r.origin is None:
        return None
    if x.axes is None or len(x.axes) != 3 or w.axes is None or r.axes is None:
        return None
    hidden, gates = r.axes[2], _GATES[call.node.op]
    call.bar(*x.axes[:2], w.axes[0], r.axes[0])
    joined = call.coupling.join([x.axes[2], w.axes[2]])
    if joined.labels is not None:
        call.read(w, 2, 0, 2)
    _hidden_units(call, hidden, gates)
    for slot in (5, 6):  # the states before the first step
        state = call.input(slot)
        if state is not None and state.axes is not None:
            call.bar(*state.axes[:-1])
            hidden = call.coupling.join([hidden, state.axes[-1]])
        elif state is not None:
            return None
    call.bar(call.input(4))
    size = Axis(hidden.size, hidden.labels)
    directions = Axis(2 if call.text("direction", "forward") == "bidirectional" else 1)
    steps, batch = (Axis(axis.size) for axis in x.axes[:2])
    if call.integer("layout", 0):
        return [Facts((steps, batch, directions, size)), *[Facts((steps, directions, size))] * 2]
    return [Facts((steps, directions, batch, size)), *[Facts((directions, batch, size))] * 2]


def _hidden_units(call: Call, hidden: Axis, gates: int) -> None:
    """A unit has a row in each gate of W and R, its biases and peepholes, and a column in R."""
    w, r = call.input(1), call.input(2)
    assert w is not None
    assert r is not None
    assert w.axes is not None
    assert r.axes is not None
    rows: list[tuple[Axis, int]] = [(w.axes[1], gates), (r.axes[1], gates)]
    for slot, count in ((3, 2 * gates), (7, 3)):
        given = call.input(slot)
        if given is not None and given.axes is not None:
            call.bar(given.axes[0])
            rows.append((given.axes[1], count))
    labels = hidden.labels
    if labels is None or any(axis.labels is None for axis, _ in rows):
        call.bar(hidden, *(axis for axis, _ in rows))
        return
    for axis, count in rows:
        assert axis.labels is not None
        call.coupling.unite(labels, *axis.labels.reshape(count, -1))
    call.coupling.give(hidden)
    result = next((slot for slot, value in enumerate(call.node.outputs) if value), None)
    if result is not None:
        call.read_own(r, 2, result, 2 if result else 3)
    call.fix_attribute("hidden_size", None, labels, labels)


def attention(call: Call) -> list[Facts] | None:
    """Heads of query, key and value, each its own or shared by as many queries."""
    q, k, v = call.input(0), call.input(1), call.input(2)
    if q is None or k is None or v is None or any(f is not None for f in call.inputs[4:]):
        return None
    if any(value is not None for value in call.node.outputs[1:]):
        return None
    if q.axes is None or k.axes is None or v.axes is None:
        return None
    ranks = {len(q.axes), len(k.axes), len(v.axes)}
    if ranks == {4}:
        return _attention_by_heads(call, q.axes, k.axes, v.axes)
    return _attention_of_rows(call, q.axes, k.axes, v.axes) if ranks == {3} else None


def _attention_by_heads(
    call: Call, q: tuple[Axis, ...], k: tuple[Axis, ...], v: tuple[Axis, ...]
) -> list[Facts] | None:
    """[N, heads, length, features]."""
    call.bar(*q[2:], *k[2:], *v[2:], call.coupling.join([q[0], k[0], v[0]]))
    heads = _heads(call, q[1], k[1], v[1])
    if heads is None:
        return None
    return [Facts((Axis(q[0].size), heads, Axis(q[2].size), Axis(v[3].size)))]


def _attention_of_rows(
    call: Call, q: tuple[Axis, ...], k: tuple[Axis, ...], v: tuple[Axis, ...]
) -> list[Facts] | None:
    """[N, length, heads * features]."""
    call.bar(*q[:2], *k[:2], *v[:2])
    counts = call.integer("q_num_heads", 0), call.integer("kv_num_heads", 0)
    if not all(counts):
        return None
    parts, kept = [], []
    for axis, count in ((q[2], counts[0]), (k[2], counts[1]), (v[2], counts[1])):
        if axis.labels is None or len(axis.labels) % count or count < 2:
            return None
        kept.append(axis.labels.reshape(count, -1))
        parts.append(Axis(count, call.coupling.rows(kept[-1])))
    heads = _heads(call, *parts)
    if heads is None or heads.labels is None:
        return None
    for name, part in (("q_num_heads", parts[0]), ("kv_num_heads", parts[1])):
        assert part.labels is not None
        call.fix_attribute(name, None, part.labels, part.labels)
    width = kept[2].shape[1]
    labels: Labels = heads.labels.repeat(width)
    return [Facts((Axis(q[0].size), Axis(q[1].size), Axis(len(labels), labels)))]


def _heads(call: Call, q: Axis, k: Axis, v: Axis) -> Axis | None:
    """Heads of the result. A mask for each head has to stay, and so have they."""
    mask = call.input(3)
    if mask is not None and (mask.axes is None or any(a.labels is not None for a in mask.axes)):
        return None
    if (
        mask is not None
        and mask.axes is not None
        and len(mask.axes) > 2
        and mask.axes[-3].size != 1
    ):
        return None
    if q.labels is None or k.labels is None or v.labels is None or len(q.labels) % len(k.labels):
        call.bar(q, k, v)
        return Axis(q.size)
    grid = q.labels.reshape(len(k.labels), -1)
    call.coupling.unite(k.labels, v.labels, call.coupling.rows(grid))
    return q


HANDLERS: Final[dict[tuple[str, str], Handler]] = {
    ("", "Attention"): attention,
    ("", "Conv"): convolution,
    ("", "ConvTranspose"): transposed_convolution,
    ("", "GRU"): recurrent,
    ("", "Gemm"): gemm,
    ("", "LSTM"): recurrent,
    ("", "MatMul"): matmul,
    ("", "RNN"): recurrent,
    ("com.microsoft", "FusedMatMul"): matmul,
}
