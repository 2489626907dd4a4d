"""Hostile surroundings for drawn patterns, and what the rule has to do in each.

A context changes one thing about a draft. Its key names what it changes, so that each is built
once a rule however many alternatives share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graphopt.operators import BODIES
from graphopt.proofs import TensorType
from graphopt.rules import Either, Rule, Variable
from tests import rule_attributes, rule_shapes
from tests.rule_cases import Choice, Draft, Unbuildable, draw, unread
from tests.rule_choices import OLDEST, choices, opsets, ways

CONDITION: Final = "condition"
Context = tuple[str, Draft, bool | None]  # key, graph, whether the rule fires (None: as it likes)


@dataclass
class Case:
    """A graph and whether the rule has to fire on it; None where either is right."""

    label: str
    draft: Draft
    fires: bool | None


def cases(rule: Rule) -> list[Case]:
    """All of a rule: the plain drafts first, then every context, those that must fire before."""
    plain = _plain(rule)
    found = [*plain, *_refused(rule), *_outside(rule)]
    seen: set[tuple[str, int]] = set()
    versions = opsets(rule)
    places = [(versions[-1], way) for way in ways(rule)]
    places += [(versions[0], way) for way in ways(rule)[:1]]
    for opset, (root, options) in places:
        try:
            draft = draw(rule, Choice(opset, options, root))
        except Unbuildable:
            continue
        for key, changed, fires in _contexts(rule, draft):
            if (key, opset) not in seen and rule_attributes.is_valid(changed):
                seen.add((key, opset))
                found.append(Case(f"{changed.choice}: {key}", changed, fires))
    return found


def _plain(rule: Rule) -> list[Case]:
    found: dict[str, Case] = {}
    for choice in choices(rule):
        if (label := str(choice)) in found:
            continue
        try:
            draft = draw(rule, choice)
        except Unbuildable:
            continue
        if rule_attributes.is_valid(draft):
            found[label] = Case(label, draft, True)
    return list(found.values())


def _refused(rule: Rule) -> Iterator[Case]:
    versions = opsets(rule)
    for number, sample in enumerate(rule.refuses):
        for opset in {versions[0], versions[-1]}:
            for root, options in ways(rule)[:2]:
                try:
                    draft = draw(rule, Choice(opset, options, root), sample)
                except Unbuildable:
                    continue
                yield Case(f"{draft.choice}: refuses {number}", draft, False)
                for how, changed in rule_shapes.undeclared(draft):
                    label = f"{draft.choice}, {how}: refuses {number}"
                    yield Case(label, changed, False)


def _outside(rule: Rule) -> Iterator[Case]:
    """Opsets that the rule is not written for."""
    root, options = ways(rule)[0]
    outside = [rule.min_opset - 1, (rule.max_opset or 99) + 1]
    for opset in outside:
        if OLDEST <= opset <= onnx.defs.onnx_opset_version():
            try:
                draft = draw(rule, Choice(opset, options, root))
            except Unbuildable:
                continue
            yield Case(f"{draft.choice}: outside its opsets", draft, False)


def _contexts(rule: Rule, draft: Draft) -> Iterator[Context]:
    # an alternative that is a parameter can take the place of what the context spoils
    refused = None if _is_loose(rule) else False
    for make in (_interior, _demoted):
        for key, changed in make(rule, draft):
            yield key, changed, refused
    for make in (_roots, _constants):
        for key, changed in make(rule, draft):
            yield key, changed, True
    if draft.choice.options in (ways(rule)[0][1], ways(rule)[-1][1]):
        yield from _storages(rule, draft)
    yield from _bodies(rule, draft, refused)
    yield from rule_attributes.contexts(rule, draft, refused)
    yield from rule_shapes.contexts(rule, draft)
    for key, changed in _extra_outputs(rule, draft):
        is_needed = len(changed.outputs) > len(draft.outputs)
        yield key, changed, refused if is_needed else None
    for make in (_inputs, _values):
        for key, changed in make(rule, draft):
            yield key, changed, None


def _is_loose(rule: Rule) -> bool:
    eithers = [
        operand for node in rule.nodes for operand in node.operands if isinstance(operand, Either)
    ]
    return any(isinstance(option, Variable) for either in eithers for option in either.options)


def _interior(rule: Rule, draft: Draft) -> Iterator[tuple[str, Draft]]:
    """What the rewrite would take away is still needed."""
    for name in draft.interior:
        changed = draft.copy()
        changed.read(name)
        yield f"{name} is read elsewhere", changed
        changed = draft.copy()
        changed.outputs.append(name)
        yield f"{name} is an output", changed
        changed = draft.copy()
        _read_in_body(changed, name)
        yield f"{name} is read in a body", changed


def _roots(rule: Rule, draft: Draft) -> Iterator[tuple[str, Draft]]:
    """The root stays, so whoever reads it does not matter."""
    for name in draft.roots:
        changed = draft.copy()
        changed.outputs.append(name)
        yield f"{name} is an output, too", changed
        changed = draft.copy()
        changed.read(name)
        yield f"{name} is read twice", changed
        changed = draft.copy()
        _read_in_body(changed, name)
        yield f"{name} is read in a body", changed
    changed = draft.copy()
    changed.nodes = [n for n in changed.nodes if not set(n.input) & set(draft.roots)]
    changed.outputs = list(draft.roots)
    yield "the root is the output", changed


def _constants(rule: Rule, draft: Draft) -> Iterator[tuple[str, Draft]]:
    """Constants stated in other ways, or needed elsewhere as they are."""
    for name, array in draft.constants.items():
        changed = draft.copy()
        changed.read(name)
        yield f"{name} is shared", changed
        changed = draft.copy()
        del changed.constants[name]
        tensor = numpy_helper.from_array(array)
        changed.nodes.insert(0, helper.make_node("Constant", [], [name], value=tensor))
        yield f"{name} is a Constant node", changed
        stated = _listed(array)
        if stated and draft.choice.opset >= 12:
            changed = draft.copy()
            del changed.constants[name]
            changed.nodes.insert(0, helper.make_node("Constant", [], [name], **stated))
            yield f"{name} is a Constant of numbers", changed
    spread = draft.copy()
    for name, array in draft.constants.items():
        tensor = numpy_helper.from_array(array)
        spread.nodes.insert(0, helper.make_node("Constant", [], [name], value=tensor))
    spread.constants = {}
    yield "all constants are nodes", spread


def _listed(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    kind = {"float32": "float", "int64": "int"}.get(array.dtype.name)
    if kind is None or array.ndim > 1 or not array.size:
        return {}
    return {f"value_{kind}s" if array.ndim else f"value_{kind}": array.tolist()}


def _demoted(rule: Rule, draft: Draft) -> Iterator[tuple[str, Draft]]:
    """What the rule takes for constant is not."""
    for name, array in draft.constants.items():
        if name in draft.stated and not _is_required(rule, draft, name):
            continue  # a free attribute may be unread
        changed = draft.copy()
        del changed.constants[name]
        changed.inputs[name] = array
        yield f"{name} is an input", changed
        changed = draft.copy()
        changed.overridable.add(name)
        yield f"{name} can be overridden", changed
        changed = draft.copy()
        array = changed.constants.pop(name)
        changed.inputs[name] = unread(draft.reader, array)
        changed.nodes.insert(0, helper.make_node(draft.reader, [name], [f"{name}_made"]))
        for node in changed.nodes[1:]:
            node.input[:] = [f"{name}_made" if i == name else i for i in node.input]
        yield f"{name} is computed", changed


def _is_required(rule: Rule, draft: Draft, name: str) -> bool:
    index, attribute = draft.stated[name]
    return attribute in rule.nodes[index].attributes


def _storages(rule: Rule, draft: Draft) -> Iterator[Context]:
    """Other types. Many operators have no kernel for some of them, so that rules may refuse."""
    if not any(a.dtype.kind == "f" for a in (*draft.inputs.values(), *draft.constants.values())):
        return
    way = "".join(map(str, (draft.choice.root, *draft.choice.options.values())))
    fires: tuple[tuple[str, bool | None], ...] = (
        ("float16", True),
        ("float64", None),
        ("int64", None),
    )
    for storage, fired in fires:
        try:
            changed = draw(rule, replace(draft.choice, storage=storage))
        except Unbuildable:
            continue
        yield f"way {way} in {storage}", changed, fired


def _bodies(rule: Rule, draft: Draft, refused: bool | None) -> Iterator[Context]:
    """The whole pattern inside an If, and its root alone."""
    types = draft.types()
    if any(types[name].shape is None for name in draft.outputs):
        return  # old versions of If want both branches to be of one rank
    whole = draft.copy()
    _into_body(whole, whole.nodes)
    yield "all of it is in a body", whole, True
    inner = draft.copy()
    tail = [n for n in inner.nodes if set(n.output) & set(draft.roots)]
    tail += [n for n in inner.nodes if set(n.input) & set(draft.roots)]
    if len(draft.drawn) > 1 and not any(n.op_type in BODIES for n in tail):
        _into_body(inner, tail)
        yield "its root is in a body", inner, refused


def _into_body(draft: Draft, moved: list[onnx.NodeProto]) -> None:
    types = draft.types()
    outputs = list(draft.outputs)
    draft.nodes = [node for node in draft.nodes if not any(node is m for m in moved)]
    described = [helper.make_tensor_value_info(n, types[n].data_type, None) for n in outputs]
    then = helper.make_graph(list(moved), "then", [], described)
    twins = [f"{name}_else" for name in outputs]
    stand_ins = [_zeros(t, types[n]) for t, n in zip(twins, outputs, strict=True)]
    described = [
        helper.make_tensor_value_info(t, types[n].data_type, None)
        for t, n in zip(twins, outputs, strict=True)
    ]
    other = helper.make_graph(stand_ins, "else", [], described)
    results = [f"{name}_if" for name in outputs]
    draft.inputs[CONDITION] = np.asarray(True)
    draft.nodes.append(
        helper.make_node("If", [CONDITION], results, then_branch=then, else_branch=other)
    )
    draft.outputs = results


def _read_in_body(draft: Draft, name: str) -> None:
    element = draft.types()[name].data_type
    result = draft.fresh("chosen")
    bodies = [
        helper.make_graph(
            [helper.make_node(draft.reader, [name], [f"{result}_{branch}"])],
            branch,
            [],
            [helper.make_tensor_value_info(f"{result}_{branch}", element, None)],
        )
        for branch in ("then", "else")
    ]
    draft.inputs[CONDITION] = np.asarray(True)
    draft.nodes.append(
        helper.make_node("If", [CONDITION], [result], then_branch=bodies[0], else_branch=bodies[1])
    )
    draft.outputs.append(result)


def _zeros(name: str, known: TensorType) -> onnx.NodeProto:
    """Something of the same type, and of the same rank, which old versions of If insist on."""
    shape = [size if isinstance(size, int) else 1 for size in known.shape or ()]
    array = np.zeros(shape, helper.tensor_dtype_to_np_dtype(known.data_type))
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def _extra_outputs(rule: Rule, draft: Draft) -> Iterator[tuple[str, Draft]]:
    """An operator of the pattern computes something more that is needed."""
    for index, node in draft.drawn.items():
        schema = onnx.defs.get_schema(node.op_type, draft.choice.opset, "")
        options = [formal.option for formal in schema.outputs]
        if rule.nodes[index].outputs != 1 or len(options) < 2:
            continue
        if onnx.defs.OpSchema.FormalParameterOption.Variadic in options:
            continue
        changed = draft.copy()
        extra = [f"{node.output[0]}_more{i}" for i in range(len(options) - 1)]
        changed.drawn[index].output.extend(extra)
        types = changed.types()
        changed.outputs += [name for name in extra if name in types]
        yield f"{node.output[0]} has more outputs", changed


def _values(rule: Rule, draft: Draft) -> Iterator[tuple[str, Draft]]:
    """Other numbers in the constants: small ones, such as epsilons, hardly show."""
    for name, array in draft.constants.items():
        if array.dtype.kind != "f" or name in draft.literals:
            continue
        for what, other in (("larger", array + 0.5), ("negative", -array), ("zero", array * 0)):
            changed = draft.copy()
            changed.constants[name] = other.astype(array.dtype)
            yield f"{name} is {what}", changed


def _inputs(rule: Rule, draft: Draft) -> Iterator[tuple[str, Draft]]:
    """Parameters that are bare inputs, outputs, constants, or one and the same value."""
    bare = draft.copy()
    bare.nodes = [n for n in bare.nodes if not set(n.input) & set(draft.roots)]
    bare.outputs = list(draft.roots)
    for name in list(bare.inputs):
        if name.endswith("_fed"):
            own = name.removesuffix("_fed")
            bare.nodes = [n for n in bare.nodes if own not in n.output]
            array = bare.inputs.pop(name)
            bare.inputs[own] = unread(bare.reader, array)
    yield "from input to output", bare
    frozen = bare.copy()
    frozen.constants.update(frozen.inputs)
    frozen.inputs = {}
    yield "all is constant", frozen
    names = list(bare.inputs)
    for one, other in itertools.combinations(names, 2):
        if bare.inputs[one].shape != bare.inputs[other].shape:
            continue
        same = bare.copy()
        del same.inputs[other]
        for node in same.nodes:
            node.input[:] = [one if name == other else name for name in node.input]
        yield f"{one} is {other}", same
