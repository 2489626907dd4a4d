"""Kinds of nodes with bodies that capture values around them, functions, and random draws."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from tests.fuzzing import layers, sizes, tensors
from tests.fuzzing.drawing import BOOL, FLOAT, INT, Drawer, Scope, Typed, Unsuited, fixed, port
from tests.graphs import node


def _body(
    d: Drawer, s: Scope, inputs: list[Typed], like: list[Typed], first: list[Typed]
) -> onnx.GraphProto:
    """A body with these inputs; its outputs are `first`, then one like each of `like`."""
    inner = Scope([*s.visible, *inputs])
    d.depth -= 1
    d.fill(inner, d.rng.randint(1, 5))
    d.depth += 1
    outputs: list[Typed] = []
    for wanted in like:
        # onnxruntime mistakes what is one output twice: the buffer of one is freed for both
        free = [v for v in inner.made if v not in outputs]
        fits = [v for v in free if v.element == wanted.element and v.shape == wanted.shape]
        if fits and d.rng.random() < 0.8:
            outputs.append(d.rng.choice(fits))
        else:
            outputs.append(d.add(inner, "Neg", [wanted], wanted.element, wanted.shape))
    for held in first:
        inner.nodes.append(node("Identity", [held.name], [f"{held.name}_next"]))
    named = [Typed(f"{held.name}_next", held.element, held.shape) for held in first] + outputs
    ports = [port(v) for v in named]
    named_inputs = [port(v) for v in inputs]
    return helper.make_graph(inner.nodes, d.name(), named_inputs, ports, inner.weights)


def conditional(d: Drawer, s: Scope) -> None:
    """An If on an input, on a constant, or on whatever was computed."""
    if not d.depth:
        raise Unsuited
    x = d.pick(s, FLOAT)
    if d.rng.random() < 0.2:
        condition = d.stored(s, np.array(d.rng.random() < 0.5))
    else:
        condition = d.pick(s, BOOL, 0)
    then, other = (_body(d, s, [], [x], []) for _ in range(2))
    d.add(s, "If", [condition], FLOAT, x.shape, then_branch=then, else_branch=other)


def loop(d: Drawer, s: Scope) -> None:
    """So many rounds as a constant or a size says; one state is carried, one value collected."""
    if not d.depth:
        raise Unsuited
    start, like = d.pick(s, FLOAT), d.pick(s, FLOAT)
    rounds = fixed(d.rng.choice([1, 3]))
    count = d.ints(s, rounds[0])
    if d.rng.random() < 0.4:
        found = d.pick(s, INT, (0, 1), lambda v: v.content is not None and len(v.content) == 1)
        assert found.content is not None
        rounds = tuple(max(n, 0) for n in found.content[0])
        count = sizes.ranked(d, s, found, 0)
    at, go = Typed(d.name(), INT, ()), Typed(d.name(), BOOL, ())
    state = Typed(d.name(), FLOAT, start.shape)
    # Sizes of what no round has collected are onnxruntime's guess, so that sizes, which may be 0,
    # decide the number of rounds only where nothing is collected.
    collected = [like] if rounds == fixed(max(rounds[0], 1)) else []
    body = _body(d, s, [at, go, state], [state, *collected], [go])
    going = d.stored(s, np.array(True)) if d.rng.random() < 0.7 else ""
    made = [Typed(d.name(), FLOAT, start.shape)]
    made += [Typed(d.name(), FLOAT, (rounds, *v.shape)) for v in collected]
    names = [v if isinstance(v, str) else v.name for v in (count, going, start)]
    s.nodes.append(node("Loop", names, [v.name for v in made], body=body))
    s.visible += made
    s.made += made


def scan(d: Drawer, s: Scope) -> None:
    if not d.depth:
        raise Unsuited
    start, over = d.pick(s, FLOAT), d.pick(s, FLOAT, (1, 2, 3), lambda v: min(v.shape[0]) > 0)
    state = Typed(d.name(), FLOAT, start.shape)
    part = Typed(d.name(), FLOAT, over.shape[1:])
    body = _body(d, s, [state, part], [state, part], [])
    shapes = (start.shape, over.shape)
    d.add(s, "Scan", [start, over], FLOAT, *shapes, body=body, num_scan_inputs=1)


def function(d: Drawer, s: Scope) -> None:
    """A call of a function of the model; a function of its own is drawn at first."""
    if d.opset < 13:
        raise Unsuited
    x = d.pick(s, FLOAT)
    if not d.functions or d.rng.random() < 0.5:
        nodes = [
            node(d.rng.choice(["Relu", "Tanh", "Neg"]), ["p"], ["q"]),
            node("Constant", [], ["w"], value_float=d.rng.choice([0.0, 1.0, 0.5])),
            node(d.rng.choice(["Mul", "Add", "Sub"]), ["q", "w"], ["r"]),
            node("Transpose", ["r"], ["t"]),
        ]
        opsets = [helper.make_opsetid("", d.opset)]
        name = f"f{len(d.functions)}"
        made = helper.make_function("local", name, ["p"], ["t"], nodes, opsets)
        d.functions.append(made)
    called = d.rng.choice(d.functions).name
    d.add(s, called, [x], FLOAT, tuple(reversed(x.shape)), domain="local")


def hidden_draw(d: Drawer, s: Scope) -> None:
    """A random draw that does not show in the result: times zero."""
    if d.opset > 21:  # onnxruntime has no kernel
        raise Unsuited
    x = d.pick(s, FLOAT)
    drawn = Typed(f"hidden{d.name()}", FLOAT, x.shape)
    s.nodes.append(node("RandomUniformLike", [x.name], [drawn.name]))
    zero = d.stored(s, np.array(0, np.float32))
    d.add(s, "Mul", [drawn, zero], FLOAT, x.shape)


_KINDS = [(2, conditional), (2, loop), (1, scan), (1, function), (1, hidden_draw)]
KINDS = [*tensors.KINDS, *sizes.KINDS, *layers.KINDS, *_KINDS]
