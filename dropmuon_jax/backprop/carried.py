"""What steps carry on, parameters and state: what of it changes, in which types and places."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dropmuon_jax._checks import describe

_COMMITTED, _WEAK = attrgetter("committed"), attrgetter("weak_type")


class ChangingOnly:
    """A step whose program is given what it changes, to overwrite it, and returns only that.

    What comes out as it went in, the parameters and the momentum of frozen layers, is handed on
    without the executable: as a donated argument and a result it would cost a microsecond a leaf.

    Args:
        step: A function of `(carried, others, static)` that returns a new `carried` and more.
        carried: To trace it with; shapes do as well.
        others: Likewise.
        static: What it is compiled for.
        donate: Whether what changes is overwritten.
        shardings: Of each leaf of `carried`, or None; and of the second result.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, Any]],
        carried: Any,
        others: Any,
        static: Any,
        *,
        donate: bool,
        shardings: tuple[Sequence[Any] | None, Any],
    ):
        whole: Any = jax.jit(step, static_argnums=2, inline=True)
        program = whole.trace(carried, others, static).jaxpr.jaxpr
        tree = jax.tree.structure(carried)
        self._changes = tuple(
            new is not old
            for new, old in zip(program.outvars[: tree.num_leaves], program.invars, strict=False)
        )
        self._stays = tuple(not changes for changes in self._changes)

        def train_step(changing: list[Any], kept: list[Any], others: Any, static: Any) -> Any:
            before = jax.tree.unflatten(tree, self._merge(changing, kept))
            after, more = whole(before, others, static)  # as traced above: not traced again
            return list(compress(jax.tree.leaves(after), self._changes)), more

        options: dict[str, Any] = {"donate_argnums": 0 if donate else ()}
        of_leaves, of_more = shardings
        if of_leaves is not None:
            of_changing, of_kept = self._split(of_leaves)
            options["in_shardings"] = of_changing, of_kept, None
            options["out_shardings"] = of_changing, of_more
        self._jitted: Any = jax.jit(train_step, static_argnums=3, **options)

    def __call__(self, leaves: Sequence[Any], others: Any, static: Any) -> tuple[list[Any], Any]:
        """The leaves of the new `carried`, and the step's second result."""
        changing, kept = self._split(leaves)
        changed, more = self._jitted(changing, kept, others, static)
        return self._merge(changed, kept), more

    def trace(self, leaves: Sequence[Any], others: Any, static: Any) -> jax.stages.Traced:
        """The program, for arrays or for their shapes."""
        return self._jitted.trace(*self._split(leaves), others, static)

    def lower(self, leaves: Sequence[Any], others: Any, static: Any) -> list[jax.stages.Lowered]:
        """What is to be compiled."""
        return [self.trace(leaves, others, static).lower()]

    def _split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return list(compress(leaves, self._changes)), list(compress(leaves, self._stays))

    def _merge(self, changing: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
        of_each = iter(kept), iter(changing)
        return [next(of_each[changes]) for changes in self._changes]


_ON_THE_HOST = (
    "A step of dm.train_step draws its depth on the host and is compiled already: call it in a "
    "loop of Python, not inside jax.jit, jax.lax.scan or jax.vmap. A loop on the device takes a "
    "step of the parts, dm.switch_depth(step, sampler), with sampler.sample(count) for its depth."
)


_OVERWRITTEN = (
    "A step of dm.train_step overwrites the parameters and the state that it is given, as far as "
    "it changes them: give the next one what it has returned, keep copies, "
    "jax.tree.map(jnp.copy, params), or take dm.train_step(…, donate=False)."
)


def run(program: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """What a program returns; or its error, with a note where an argument is overwritten."""
    try:
        return program(*inputs)
    except (RuntimeError, ValueError) as error:
        if "deleted" in str(error):
            error.add_note(_OVERWRITTEN)
        raise


def check_step(step: Any) -> None:
    """Error for what is no number of a step, or is traced."""
    if isinstance(step, Tracer):
        raise TypeError(_ON_THE_HOST)
    if not hasattr(step, "__index__"):
        raise TypeError(
            f"step must be the number of the step, a Python integer, got {describe(step)}: "
            "step_fn(step, params, opt_state, *args)."
        )


def check_shardings(shardings: Any) -> None:
    """Error for `out_shardings` that are no pair, or three."""
    if shardings is not None and not (isinstance(shardings, tuple) and len(shardings) in (2, 3)):
        raise TypeError(
            "out_shardings must be a pair, for the parameters and the optimizer state: "
            "(shardings, dm.state_shardings(optimizer, params)); a third one is for the "
            f"loss. Got {describe(shardings)}."
        )


def shardings_of(carried: Sequence[Any], shardings: Any) -> tuple[list[Any] | None, Any]:
    """Of each leaf that is carried on, and of the loss, from `out_shardings`."""
    if shardings is None:
        return None, None
    of_loss = shardings[2] if len(shardings) == 3 else None
    of_leaves: list[Any] = []
    for of_part, part in zip((*shardings[:2], None), carried, strict=True):
        if of_part is None:
            of_leaves += [None] * len(jax.tree.leaves(part))
        else:
            of_leaves += jax.tree.leaves(jax.tree.broadcast(of_part, part))
    return of_leaves, of_loss


def as_returned(leaves: list[Any], tree: Any, others: Any, shardings: Any) -> list[Any]:
    """The leaves of what steps carry on, in the types and places in which they return it.

    So the first step is compiled for all: arrays are strongly typed, and lie where `shardings` say
    or on the device on which another argument has been put. No array is there twice, as tied and
    cloned ones are, since it cannot be donated twice.
    """
    if _is_as_returned(leaves, others, shardings):
        return leaves
    if any(getattr(x, "weak_type", False) for x in leaves):
        leaves = list(map(_strong, leaves))
    if len({*map(id, leaves)}) < len(leaves):
        leaves = list(map(_once(set()), leaves))
    if all(map(_is_put, leaves)):
        return leaves
    if shardings is not None:
        *parts, rest = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves((*map(_put, parts, shardings), rest))
    put = list(filter(_is_put, [*leaves, *jax.tree.leaves(others)]))
    devices = set().union(*(x.sharding.device_set for x in put))
    if len(devices) != 1:  # with arrays on several, JAX says what does not fit
        return leaves
    return _put(leaves, jax.device_put(np.int32(0), *devices).sharding)


def _is_as_returned(leaves: Sequence[Any], others: Any, shardings: Any) -> bool:
    """Whether there is nothing to do: asked in every step, and so by loops that run in C."""
    try:
        is_put, is_weak = set(map(_COMMITTED, leaves)), any(map(_WEAK, leaves))
    except AttributeError:  # of what is no array yet
        return False
    except jax.errors.ConcretizationTypeError:  # traced arrays lie nowhere
        raise TypeError(_ON_THE_HOST) from None
    if is_weak or len({*map(id, leaves)}) < len(leaves):
        return False
    if is_put == {False}:  # so is what comes back, if nothing at all has been put somewhere
        return shardings is None and not any(map(_is_put, jax.tree.leaves(others)))
    return is_put == {True}


def _once(seen: set[int]) -> Callable[[Any], Any]:
    """A function of arrays one by one, which copies those that it has seen."""

    def copy_if_seen(x: Any) -> Any:
        if id(x) in seen and isinstance(x, jax.Array):
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return copy_if_seen


def _is_put(x: Any) -> bool:
    return getattr(x, "committed", False)


def _put(tree: Any, shardings: Any) -> Any:
    """The arrays of a tree in other places, if shardings are given, for all or for each."""

    def put(x: Any, sharding: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x.update(sharding=sharding)
        return jax.device_put(x, sharding)

    if shardings is None:
        return tree
    return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def _strong(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(weak_type=False)
    return jnp.asarray(x, x.dtype) if hasattr(x, "dtype") else x


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Without Python's collector of cycles, which walks again and again through what is traced."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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
