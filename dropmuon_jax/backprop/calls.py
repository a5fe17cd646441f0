"""What can be wrong with a call of a step, and what its errors say of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from jax.core import Tracer

from dropmuon_jax._checks import describe

_OVERWRITTEN = (
    "A step of dm.train_step overwrites the parameters and the state that it is given, as far as "
    "it changes them: give the next one what it has returned, keep copies, "
    "jax.tree.map(jnp.copy, params), or take dm.train_step(…, donate=False)."
)


def check_step(step: Any) -> None:
    """Error for what is no number of a step, or is traced."""
    if isinstance(step, Tracer):
        refuse_traced()
    if not hasattr(step, "__index__"):
        raise TypeError(
            f"step must be the number of the step, a Python integer, got {describe(step)}: "
            "step_fn(step, params, opt_state, *args)."
        )


def refuse_traced() -> NoReturn:
    """Error for a step inside of a program."""
    raise TypeError(
        "A step of dm.train_step draws its depth on the host and is compiled already: call it in a "
        "loop of Python, not inside jax.jit, jax.lax.scan or jax.vmap. A loop on the device takes "
        "a step of the parts, dm.switch_depth(step, sampler), with sampler.sample(count) for its "
        "depth."
    ) from None


def check_shardings(shardings: Any) -> None:
    """Error for `out_shardings` that are no pair, or three."""
    if shardings is not None and not (isinstance(shardings, tuple) and len(shardings) in (2, 3)):
        raise TypeError(
            "out_shardings must be a pair, for the parameters and the optimizer state: "
            "(shardings, dm.state_shardings(optimizer, params)); a third one is for the "
            f"loss. Got {describe(shardings)}."
        )


def run(program: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """What a program returns; or its error, with a note where an argument is overwritten."""
    try:
        return program(*inputs)
    except (RuntimeError, ValueError) as error:
        if "deleted" in str(error):
            error.add_note(_OVERWRITTEN)
        raise


@contextlib.contextmanager
def naming_what_is_static() -> Iterator[None]:
    """With a note at JAX's errors of an argument of the loss, whose cause is that it is traced."""
    try:
        yield
    except TypeError as error:
        if "others[" in str(error):  # as JAX names it, by the arguments of a step
            error.add_note(
                "What is static is no argument of a step, but bound to its loss: "
                "dm.train_step(functools.partial(loss_fn, train=True), …)."
            )
        raise
