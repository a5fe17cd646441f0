"""The update of each layer as a program of its own, which depths and equal layers share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from dropmuon_jax.layers.trees import leaf_paths
from dropmuon_jax.orthogonalize.batches import joining_within

_SEVERAL = -1  # in place of a layer
Program = tuple[Any, jax.stages.Lowered]  # a jitted function, and what it was lowered to


class Part(NamedTuple):
    """What of an update depends on the gradient of one layer, or on numbers of several."""

    program: Program
    overwritten: list[int]
    """Inputs, among the gradients, all that is carried on, scalars that layers share, and sums."""
    read: list[int]
    """Likewise."""
    results: list[int]
    """Among what is carried on."""
    sums: list[int]
    """Further results: numbers of the layer, among the inputs of a program of what is left."""


class ByLayer:
    """A step as that of `ChangingOnly`, whose update is in programs of single layers.

    They are cut out of the update of all active layers: its arithmetic is theirs. Two layers that
    are alike have one program, at all depths, since XLA would be given the same text.

    Args:
        gradient: A function of `(carried, others, static)` that returns gradients, what is last in
            `carried` as the loss leaves it, and what else the step returns.
        update: A function of `(gradients, carried, static)` that returns what else is in `carried`.
        carried: Parameters, state and a rest, to trace with, as `others`.
        others: What else a step is given.
        static: What it is compiled for.
        layer_of: The layer of each leaf of the parameters, by its path.
        programs: Those that there are, by what they compute and by their texts; new ones are added.
        donate: Whether what changes is overwritten.

    Raises:
        ValueError: If a result depends on arrays of several layers, and not only on numbers.
    """

    def __init__(
        self,
        gradient: Callable[..., tuple[Any, Any, Any]],
        update: Callable[..., Any],
        carried: Any,
        others: Any,
        static: Any,
        *,
        layer_of: Mapping[str, int],
        programs: dict[Hashable, Program],
        donate: bool,
    ):
        of_gradient: Any = jax.jit(gradient, static_argnums=2, inline=True)
        gradients = of_gradient.trace(carried, others, static).out_info[0]
        with joining_within(layer_of.get):
            traced: Any = jax.jit(update, static_argnums=2).trace(gradients, carried[:-1], static)
        leaves, tree = jax.tree.flatten(carried)
        whole, paths = traced.jaxpr, leaf_paths(carried[:-1])
        kept, shapes = leaves[: len(paths)], jax.tree.leaves(gradients)
        self._num_grads = num_grads = len(shapes)
        of_params = list(map(layer_of.get, leaf_paths(carried[0])))
        of_inputs = of_params * (num_grads // max(1, len(of_params)) + 1)
        layers = _layers_of_variables(whole.jaxpr, of_inputs)
        results = _results_by_layer(whole.jaxpr, layers, len(paths))
        self._common, several = results.pop(None, []), results.pop(_SEVERAL, [])
        scalars = _common_scalars(whole.jaxpr, layers)
        sums = _sums_of_layers(whole.jaxpr, layers, {i: paths[i] for i in several})
        of_common, read_by_common = _cut(whole, self._common, more=scalars)
        cuts = []
        for layer, of in results.items():
            own_sums = [i for i, x in enumerate(sums) if layers[x] == {layer}]
            more = [sums[i] for i in own_sums]
            cuts.append((of, own_sums, *_cut(whole, of, known=scalars, more=more)))
        if several:
            cuts.append((several, [], *_cut(whole, several, known=[*scalars, *sums])))
        uses = Counter(chain(*(used for *_, used in cuts)))
        self._grads = [i for i in range(num_grads) if uses[i]]
        self._num_sums = len(sums)

        def step_gradient(leaves: list[Any], others: Any, static: Any) -> Any:
            grads, rest, more = of_gradient(jax.tree.unflatten(tree, leaves), others, static)
            grads = jax.tree.leaves(grads)
            known = [*grads, *leaves]
            found = jaxpr_as_fun(of_common)(*(known[i] for i in read_by_common))
            return [grads[i] for i in self._grads], found, jax.tree.leaves(rest), more

        self._gradient: Any = jax.jit(step_gradient, static_argnums=2)
        placed = [_placed_like(x, leaves[0]) for x in (*shapes, *(x.aval for x in scalars + sums))]
        known = [*placed[:num_grads], *kept, *placed[num_grads:]]
        first_sum = len(known) - len(sums)
        self._parts = []
        for of, own_sums, cut, used in cuts:
            changed = {num_grads + i for i in of}
            own = [i for i in used if donate and i in changed and uses[i] == 1]
            read = [i for i in used if i not in own]
            order = [used.index(i) for i in (*own, *read)]
            key = len(own), tuple(order), _identity(cut.jaxpr, cut.consts)
            if key not in programs:
                program = _program(jaxpr_as_fun(cut), order)
                lowered = program.trace([known[i] for i in own], [known[i] for i in read]).lower()
                same = key if _calls_host(cut.jaxpr) else lowered.as_text()
                programs[key] = programs.setdefault(same, (program, lowered))
            self._parts.append(
                Part(programs[key], own, read, of, [first_sum + i for i in own_sums])
            )

    def __call__(self, leaves: Sequence[Any], others: Any, static: Any) -> tuple[list[Any], Any]:
        """The leaves of the new `carried`, and what else the step returns."""
        grads, found, rest, more = self._gradient(leaves, others, static)
        kept, scalars = leaves[: len(leaves) - len(rest)], found[len(self._common) :]
        known = [*[None] * self._num_grads, *kept, *scalars, *[None] * self._num_sums]
        for i, grad in zip(self._grads, grads, strict=True):
            known[i] = grad
        new = [*kept, *rest]
        for i, x in zip(self._common, found, strict=False):
            new[i] = x
        for (program, _), own, read, results, sums in self._parts:
            changed = program([known[i] for i in own], [known[i] for i in read])
            for i, x in zip(results, changed, strict=False):
                new[i] = x
            for i, x in zip(sums, changed[len(results) :], strict=True):
                known[i] = x
        return new, more

    def lower(self, leaves: Sequence[Any], others: Any, static: Any) -> list[jax.stages.Lowered]:
        """All programs, for arrays or for their shapes."""
        gradient = self._gradient.trace(leaves, others, static).lower()
        return [gradient, *(lowered for (_, lowered), *_ in self._parts)]


def _layers_of_variables(
    jaxpr: Jaxpr, of_inputs: Sequence[int | None]
) -> dict[Any, frozenset[int]]:
    """Of each variable the layers of gradients and parameters on which it depends."""
    layers: dict[Any, frozenset[int]] = {x: frozenset() for x in (*jaxpr.constvars, *jaxpr.invars)}
    for x, layer in zip(jaxpr.invars, of_inputs, strict=False):
        layers[x] = frozenset() if layer is None else frozenset([layer])
    for eqn in jaxpr.eqns:
        of_eqn = frozenset().union(*(layers[x] for x in _variables(eqn.invars)))
        layers.update(dict.fromkeys(eqn.outvars, of_eqn))
    return layers


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [x for x in atoms if not isinstance(x, Literal)]


def _is_scalar(variable: Any) -> bool:
    return getattr(variable.aval, "shape", None) == ()


def _results_by_layer(
    jaxpr: Jaxpr, layers: Mapping[Any, frozenset[int]], num_carried: int
) -> dict[int | None, list[int]]:
    """The numbers of the results that change, by the layer on which they depend."""
    found: dict[int | None, list[int]] = {}
    before = jaxpr.invars[len(jaxpr.invars) - num_carried :]
    for i, (old, new) in enumerate(zip(before, jaxpr.outvars, strict=True)):
        if new is not old:
            of = sorted(frozenset().union(*(layers[x] for x in _variables([new]))))
            layer = of[0] if len(of) == 1 else _SEVERAL if of else None
            found.setdefault(layer, []).append(i)
    return found


def _sums_of_layers(
    jaxpr: Jaxpr, layers: Mapping[Any, frozenset[int]], paths: Mapping[int, str]
) -> list[Any]:
    """The numbers of single layers on which results of several depend, such as squares of norms."""
    made_by = {x: eqn for eqn in jaxpr.eqns for x in eqn.outvars}
    sums: dict[Any, None] = {}
    for i, path in paths.items():
        seen, to_see = set(), [jaxpr.outvars[i]]
        while to_see:
            x = to_see.pop()
            if x in seen or not layers[x]:
                continue
            seen.add(x)
            if x in made_by and _is_scalar(x) and len(layers[x]) == 1:
                sums[x] = None
            elif x in made_by:
                to_see += _variables(made_by[x].invars)
            elif not _is_scalar(x):
                of = ", ".join(map(str, sorted(layers[jaxpr.outvars[i]])))
                raise ValueError(
                    f"With update_by_layer each layer is updated alone, and the new '{path}' of "
                    f"this optimizer depends on layers {of}. One that looks at several layers at "
                    "once, or accumulates, needs update_by_layer=False."
                )
    return list(sums)


def _common_scalars(jaxpr: Jaxpr, layers: Mapping[Any, frozenset[int]]) -> list[Any]:
    """What layers are given beside their own: a learning rate, a number of each leaf in a vector.

    With them as inputs layers are alike that would read entries of their own. Other arrays without
    a layer are computed by each, such as an identity matrix.
    """
    from_inputs, made = {x for x in jaxpr.invars if not layers[x]}, []
    used_by_layers: set[Any] = set()
    for eqn in jaxpr.eqns:
        if any(layers[x] for x in eqn.outvars):
            used_by_layers.update(_variables(eqn.invars))
        elif from_inputs.intersection(_variables(eqn.invars)):
            from_inputs.update(eqn.outvars)
            made += [x for x in eqn.outvars if len(eqn.outvars) == 1 and _is_scalar(x)]
    return [x for x in made if x in used_by_layers]


def _cut(
    program: ClosedJaxpr, results: Sequence[int], *, known: Sequence[Any] = (), more: Any = ()
) -> tuple[ClosedJaxpr, list[int]]:
    """The part of a program that computes some results and `more`, and the numbers of its inputs.

    Variables that are `known` are further inputs.
    """
    jaxpr, given = program.jaxpr, set(known)
    rest = [eqn for eqn in jaxpr.eqns if given.isdisjoint(eqn.outvars)]
    outputs = [*(jaxpr.outvars[i] for i in results), *more]
    jaxpr = jaxpr.replace(invars=[*jaxpr.invars, *known], eqns=rest, outvars=outputs)
    jaxpr, is_used = dce_jaxpr(jaxpr, [True] * len(outputs))
    used = list(compress(range(len(is_used)), is_used))
    return ClosedJaxpr(jaxpr, program.consts), used


def _identity(jaxpr: Jaxpr, consts: Sequence[Any] = ()) -> Hashable:
    """What programs have in common that compute the same: found sooner than they are lowered."""
    number = {x: i for i, x in enumerate(chain(jaxpr.constvars, jaxpr.invars))}

    def identity(x: Any) -> Hashable:
        match x:
            case ClosedJaxpr():
                return _identity(x.jaxpr, x.consts)
            case Jaxpr():
                return _identity(x)
            case Literal():
                return identity(x.val), x.aval
            case jax.Array() if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                return x.dtype, identity(jax.random.key_data(x))
            case jax.Array() | np.ndarray() | np.generic():
                return x.dtype, x.shape, np.asarray(x).tobytes()
            case tuple() | list():
                return type(x), tuple(map(identity, x))
            case float() | complex():  # as 0.0 == -0.0
                return repr(x)
        try:
            hash(x)
        except TypeError:
            return object()  # which nothing else is equal to
        return type(x), x

    def atoms(variables: Sequence[Any]) -> Hashable:
        return tuple(identity(x) if isinstance(x, Literal) else number[x] for x in variables)

    steps = []
    for eqn in jaxpr.eqns:
        params = tuple((name, identity(of)) for name, of in sorted(eqn.params.items()))
        steps.append((eqn.primitive, atoms(eqn.invars), params, identity(eqn.ctx)))
        number |= {x: len(number) + i for i, x in enumerate(eqn.outvars)}
    avals = tuple(x.aval for x in (*jaxpr.constvars, *jaxpr.invars))
    return avals, identity(consts), tuple(steps), atoms(jaxpr.outvars)


def _calls_host(jaxpr: Jaxpr) -> bool:
    """Whether a program calls a function of Python, which a text does not tell from another."""
    inner = chain(*(jaxprs_in_params(eqn.params) for eqn in jaxpr.eqns))
    return any("callback" in of.primitive.name for of in jaxpr.eqns) or any(map(_calls_host, inner))


def _program(function: Callable[..., list[Any]], order: Sequence[int]) -> Any:
    """A function of inputs in this order as a program that overwrites the first of them."""

    def update_layer(overwritten: list[Any], read: list[Any]) -> list[Any]:
        given = dict(zip(order, [*overwritten, *read], strict=True))
        return function(*(given[i] for i in range(len(given))))

    return jax.jit(update_layer, donate_argnums=0)


def _placed_like(shape: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a gradient, which lies where a leaf has been put."""
    sharding = getattr(leaf, "sharding", None) if getattr(leaf, "committed", False) else None
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
