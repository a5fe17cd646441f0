"""What the program of a step does with the parameters of each layer: what meets what, and where."""

import functools
import operator
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.rows import StackedLeaves
from dropmuon_jax.layers.trees import leaf_keys

PRODUCTS = {"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"}


class Meetings(NamedTuple):
    """What a step does with its layers."""

    multiplied: set[int]
    """The layers that are multiplied with data."""
    disordered: list[tuple[int, int]]
    """Pairs of a layer and one behind it, by the order given, that its data depend on."""
    scanned: list[tuple[StackedLeaves, int]]
    """The stacks that a scan takes apart into another number of rows than they have layers."""


def _places(traced: Any, arguments: Any, layers: Layers) -> list[int] | None:
    """The layers of each input of a program, as bits; None without parameters among the inputs."""
    trees, nnx = [traced.args_info], sys.modules.get("flax.nnx")
    if nnx is not None:  # whose jit flattens modules into nameless lists
        nodes, treedef = jax.tree.flatten(arguments, lambda node: isinstance(node, nnx.Module))
        states = (nnx.state(x) if isinstance(x, nnx.Module) else x for x in nodes)
        trees.append(treedef.unflatten(states))
    own = {leaf.key: sum({1 << layer for layer in leaf.layers}) for leaf in layers.leaves}
    first = layers.leaves[0].key
    for keys in map(leaf_keys, trees):
        for prefix in (key.removesuffix(first) for key in keys if key.endswith(first)):
            places = {prefix + key: bits for key, bits in own.items()}
            if len(keys) == len(traced.jaxpr.jaxpr.invars) and places.keys() <= {*keys}:
                return [places.get(key, 0) for key in keys]
    return None


def find_meetings(traced: Any, arguments: Any, layers: Layers) -> Meetings:
    """What a traced step does with its layers."""
    jaxpr, places = traced.jaxpr.jaxpr, _places(traced, arguments, layers)
    if places is None:
        return Meetings({*range(layers.num_layers)}, [], [])
    meetings: list[tuple[str, int, int]] = []
    scans: list[tuple[int, int]] = []
    shapes = map(_shape, jaxpr.invars)
    inputs = [(bits, not bits and bool(shape)) for bits, shape in zip(places, shapes, strict=True)]
    _follow(jaxpr, inputs, meetings, scans)
    multiplied, before = set(), {}
    for name, weights, data in meetings:
        for layer in (i for i in range(layers.num_layers) if weights >> i & 1):
            before.setdefault(layer, data)
            multiplied |= {layer} if name in PRODUCTS else set()
    later = ((i, j) for i in before for j in range(i + 1, layers.num_layers))
    # The rows of a stack are one input, so that each seems to have met what any of them has.
    stack_of = {layer: of.name for of in layers.stacks for layer in of.layers}
    pairs = ((i, j) for i, j in later if stack_of.get(i, i) != stack_of.get(j, j))
    disordered = sorted((i, j) for i, j in pairs if before[i] >> j & 1)
    stacks = {sum({1 << layer for layer in of.layers}): of for of in layers.stacks}
    found = {stacks[bits]: turns for bits, turns in scans if bits in stacks}
    scanned = [(of, turns) for of, turns in found.items() if turns != len(of.layers)]
    return Meetings(multiplied, disordered, scanned)


def _follow(
    jaxpr: Jaxpr,
    inputs: Sequence[tuple[int, bool]],
    meetings: list[tuple[str, int, int]],
    scans: list[tuple[int, int]],
) -> list[tuple[int, bool]]:
    """The layers that each output depends on, as bits, and whether it depends on data.

    `meetings` gets the products and lookups of weights and data, in order: the name of the
    operation, the layers of the weights, and those that the data depend on. Scalars are no data.
    `scans` gets the layers of weights that a scan cuts into rows, and how many these are.
    """
    origins: dict[Any, tuple[int, bool]] = {v: (0, bool(_shape(v))) for v in jaxpr.constvars}
    origins |= zip(jaxpr.invars, inputs, strict=True)

    def read(atom: Any) -> tuple[int, bool]:
        return (0, False) if isinstance(atom, Literal) else origins[atom]

    for eqn in jaxpr.eqns:
        operands, name = list(map(read, eqn.invars)), eqn.primitive.name
        of_data, of_weights = (
            functools.reduce(operator.or_, (bits for bits, data in operands if data == kind), 0)
            for kind in (True, False)
        )
        is_data = any(data for _, data in operands)
        if is_data and of_weights and (name in PRODUCTS or name == "gather"):
            meetings.append((name, of_weights, of_data))
        results = [(of_data | of_weights, is_data)] * len(eqn.outvars)
        for program in jaxprs_in_params(eqn.params):
            # Of loops and conditionals the first turn; their results depend on all operands.
            if (size := len(program.invars)) <= len(operands):
                inner = operands[len(operands) - size :]
                cut = _weights_in_rows(eqn, program, inner)
                scans += [(bits, eqn.params["length"]) for bits in cut]
                # The scans within one over layers are over something else, such as experts.
                found = _follow(program, inner, meetings, [] if cut else scans)
                if name not in {"scan", "while", "cond"} and len(found) == len(results):
                    results = found
        origins |= zip(eqn.outvars, results, strict=True)
    return list(map(read, jaxpr.outvars))


def _shape(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())  # tokens have none


def _weights_in_rows(
    eqn: JaxprEqn, program: Jaxpr, operands: Sequence[tuple[int, bool]]
) -> list[int]:
    """The layers of each operand without data of which a scan takes one row at a time, as bits."""
    if eqn.primitive.name != "scan":
        return []
    pairs = zip(eqn.invars, program.invars, operands, strict=True)
    cut = (of for outer, inner, of in pairs if _shape(outer) != _shape(inner))
    return [bits for bits, is_data in cut if bits and not is_data]
