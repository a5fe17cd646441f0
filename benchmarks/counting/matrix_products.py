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


def matmul_flops(traced: Any, arguments: Any) -> float:
    """Two for each multiplication and addition of `dot_general`; NaN if a loop may turn endlessly.

    Small arguments of a `jax.stages.Traced`, such as a depth, decide how often loops turn.
    """
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "dtype")]
    known = [x if isinstance(x, jax.Array) and _is_followed(x) else None for x in leaves]
    return _count(traced.jaxpr, known)[0]


def _is_followed(value: Any) -> bool:
    return value.size <= LARGEST and not jnp.issubdtype(value.dtype, jnp.inexact)


def _count(closed: Any, known: Sequence[Any]) -> tuple[float, list[Any]]:
    """The FLOPs of a program, and its results, None where they are not known."""
    jaxpr = closed.jaxpr
    consts = [x if _is_followed(x) else None for x in closed.consts]
    env = dict(zip([*jaxpr.invars, *jaxpr.constvars], [*known, *consts], strict=True))

    def read(var: Any) -> Any:
        if isinstance(var, core.Literal):
            return var.val if _is_followed(var.aval) else None
        return env[var]

    total = 0.0
    for eqn in jaxpr.eqns:
        flops, results = _count_equation(eqn, [read(var) for var in eqn.invars])
        total += flops
        env |= dict(zip(eqn.outvars, results, strict=True))
    return total, [read(var) for var in jaxpr.outvars]


def _count_equation(eqn: Any, known: list[Any]) -> tuple[float, list[Any]]:
    name, params = eqn.primitive.name, eqn.params
    unknown = [None] * len(eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2.0 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted), unknown
    if name == "scan":
        return params["length"] * _count(params["jaxpr"], [None] * len(known))[0], unknown
    if name == "while":
        return _count_while(params, known)
    if name == "cond":
        each = [_count(branch, known[1:]) for branch in params["branches"]]
        if known[0] is not None:
            return each[int(known[0])]
        return float(np.max([flops for flops, _ in each])), unknown  # NaN if one is
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            inner = params[key]
            is_open = isinstance(inner, core.Jaxpr)
            return _count(core.ClosedJaxpr(inner, ()) if is_open else inner, known)
    if any(value is None for value in known) or not all(_is_followed(v.aval) for v in eqn.outvars):
        return 0.0, unknown
    results = eqn.primitive.bind(*known, **params)
    return 0.0, list(results) if eqn.primitive.multiple_results else [results]


def _count_while(params: Any, known: list[Any]) -> tuple[float, list[Any]]:
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body = known[:num_cond], known[num_cond : num_cond + num_body]
    carry, total = known[num_cond + num_body :], 0.0
    while True:  # turn by turn
        _, [goes_on] = _count(params["cond_jaxpr"], [*of_cond, *carry])
        if goes_on is None:
            return math.nan, [None] * len(carry)
        if not goes_on:
            return total, carry
        flops, carry = _count(params["body_jaxpr"], [*of_body, *carry])
        total += flops
