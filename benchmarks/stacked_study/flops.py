"""The matrix products of a program, of whose loops each turn counts.

XLA's cost analysis counts the body of a loop once, so that it cannot tell one depth from another.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

LARGEST_FOLLOWED = 4096
"""Entries of an array of integers or booleans whose value is followed: depths and masks are."""


def matmul_flops(traced: Any, arguments: Sequence[Any]) -> float:
    """Two for each multiplication and addition of `dot_general`.

    Args:
        traced: What the `trace` method of a result of `jax.jit` returns.
        arguments: Those that are not static, as flat leaves. Small ones, such as a depth, decide
            how often loops turn.
    """
    total, _ = _count(traced.jaxpr, [leaf if _is_followed(leaf) else None for leaf in arguments])
    return total


def _is_followed(leaf: Any) -> bool:
    is_whole = leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.integer)
    return is_whole and leaf.size <= LARGEST_FOLLOWED


def _count(closed: Any, known: Sequence[Any]) -> tuple[float, list[Any]]:
    """The FLOPs of a program, and its results, None where they are not known."""
    jaxpr, consts = closed.jaxpr, closed.consts
    env: dict[Any, Any] = dict(zip(jaxpr.invars, known, strict=True))
    env |= {
        var: const if _is_followed(const) else None
        for var, const in zip(jaxpr.constvars, consts, strict=True)
    }

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
        flops, _ = _count(params["jaxpr"], [None] * len(known))
        return params["length"] * flops, unknown
    if name == "while":
        return _count_while(params, known)
    if name == "cond":
        index, *operands = known
        if index is not None:
            return _count(params["branches"][int(index)], operands)
        return max(_count(branch, operands)[0] for branch in params["branches"]), unknown
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            inner = params[key]
            if isinstance(inner, core.Jaxpr):
                inner = core.ClosedJaxpr(inner, ())
            return _count(inner, known)
    if any(value is None for value in known) or not all(_is_followed(v.aval) for v in eqn.outvars):
        return 0.0, unknown
    results = eqn.primitive.bind(*known, **params)
    return 0.0, list(results) if eqn.primitive.multiple_results else [results]


def _count_while(params: Any, known: list[Any]) -> tuple[float, list[Any]]:
    """Turn by turn; the condition must be known."""
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body = known[:num_cond], known[num_cond : num_cond + num_body]
    carry, total = known[num_cond + num_body :], 0.0
    while True:
        _, [goes_on] = _count(params["cond_jaxpr"], [*of_cond, *carry])
        if goes_on is None:
            raise ValueError("A loop whose condition is not known has no number of FLOPs.")
        if not goes_on:
            return total, carry
        flops, carry = _count(params["body_jaxpr"], [*of_body, *carry])
        total += flops
