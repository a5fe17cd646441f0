"""The matrix products of a program, of whose loops each turn counts.

XLA's cost analysis counts the body of a loop once, so that it cannot tell one depth from another.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

LARGEST = 4096  # of the arrays, in entries, whose values are followed: depths and masks are
_UNCOUNTED = ("pallas_call", "svd")  # multiply matrices that nobody sees
Flops = dict[str, float]  # by dtype


def product_flops(traced: Any, *arguments: Any) -> Flops:
    """Two for each multiplication and addition of `dot_general`, by the dtype of its factors.

    Small arguments of a `jax.stages.Traced`, such as a depth, decide how often loops turn, and
    which branch is taken: of one that is not known the larger counts. Of what depends on the
    platform it is the branch of this one. NaN is the number of a loop whose end is not known, of
    a kernel of one's own and of an SVD.
    """
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "dtype")]
    known = [x if isinstance(x, jax.Array) and _is_followed(x) else None for x in leaves]
    closed = traced.jaxpr
    return _count(closed, known or [None] * len(closed.jaxpr.invars))[0]


def _is_followed(value: Any) -> bool:
    return value.size <= LARGEST and not jnp.issubdtype(value.dtype, jnp.inexact)


def _count(closed: Any, known: Sequence[Any]) -> tuple[Flops, list[Any]]:
    """The FLOPs of a program, and its results, None where they are not known."""
    jaxpr = closed.jaxpr
    consts = [x if _is_followed(x) else None for x in closed.consts]
    env = dict(zip([*jaxpr.invars, *jaxpr.constvars], [*known, *consts], strict=True))

    def read(var: Any) -> Any:
        if isinstance(var, core.Literal):
            return var.val if _is_followed(var.aval) else None
        return env[var]

    total: Flops = {}
    for eqn in jaxpr.eqns:
        flops, results = _count_equation(eqn, [read(var) for var in eqn.invars])
        _add(total, flops)
        env |= dict(zip(eqn.outvars, results, strict=True))
    return total, [read(var) for var in jaxpr.outvars]


def _count_equation(eqn: Any, known: list[Any]) -> tuple[Flops, list[Any]]:
    name, params = eqn.primitive.name, eqn.params
    unknown = [None] * len(eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval
        size = math.prod(left.shape[axis] for axis in contracted)
        return {str(left.dtype): 2.0 * eqn.outvars[0].aval.size * size}, unknown
    if name in _UNCOUNTED:
        return {str(eqn.invars[0].aval.dtype): math.nan}, unknown
    if name == "scan":
        flops, _ = _count(params["jaxpr"], [None] * len(known))
        return {dtype: params["length"] * count for dtype, count in flops.items()}, unknown
    if name == "while":
        return _count_while(params, known)
    if name == "cond":
        return _count_branch(params, known, unknown)
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            inner = params[key]
            is_open = isinstance(inner, core.Jaxpr)
            return _count(core.ClosedJaxpr(inner, ()) if is_open else inner, known)
    if any(value is None for value in known) or not all(_is_followed(v.aval) for v in eqn.outvars):
        return {}, unknown
    results = eqn.primitive.bind(*known, **params)
    return {}, list(results) if eqn.primitive.multiple_results else [results]


def _count_branch(params: Any, known: list[Any], unknown: list[Any]) -> Any:
    each = [_count(branch, known[1:]) for branch in params["branches"]]
    if platforms := params.get("branches_platforms"):
        backend = jax.default_backend()
        own = {"cuda", "rocm"} if backend == "gpu" else {backend}
        return each[
            [names is None or bool(own.intersection(names)) for names in platforms].index(True)
        ]
    if known[0] is not None:
        return each[int(known[0])]
    largest = np.argmax([sum(flops.values()) for flops, _ in each])  # the first NaN, if one is
    return each[int(largest)][0], unknown


def _count_while(params: Any, known: list[Any]) -> tuple[Flops, list[Any]]:
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body = known[:num_cond], known[num_cond : num_cond + num_body]
    carry, total = known[num_cond + num_body :], {}
    while True:  # turn by turn
        _, [goes_on] = _count(params["cond_jaxpr"], [*of_cond, *carry])
        if goes_on is None:
            dtypes = _count(params["body_jaxpr"], [*of_body, *carry])[0]
            return dict.fromkeys(dtypes, math.nan), [None] * len(carry)
        if not goes_on:
            return total, carry
        flops, carry = _count(params["body_jaxpr"], [*of_body, *carry])
        _add(total, flops)


def _add(total: Flops, flops: Flops) -> None:
    for dtype, count in flops.items():
        total[dtype] = total.get(dtype, 0.0) + count
