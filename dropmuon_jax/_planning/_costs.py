"""What a training step costs at each depth, counted or timed."""

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dropmuon_jax._checks import check_choice, describe, static_int
from dropmuon_jax._layers import Layers, check_layers

# What XLA's cost analysis calls them.
_COUNTS = {"flops": "flops", "bytes": "bytes accessed"}


def depth_cost(
    step: Callable[..., Any],
    layers: Layers,
    /,
    *args: Any,
    measure: str = "flops",
    repetitions: int = 5,
    **kwargs: Any,
) -> Float[np.ndarray, " num_layers"]:
    """What your training step costs at each depth: what :func:`optimal_depth` needs.

    * "flops" and "bytes" are XLA's counts of the compiled step, on one of its devices: floating
      point operations, and bytes that operations read and write. They do not flicker. XLA counts
      the body of a loop once, however often it runs, and nothing inside of a foreign call, such as
      LAPACK's SVD on a CPU: measure layers in `jax.lax.scan` or :func:`scan_layers` in "seconds".
      Each depth is compiled for the count, which a later call of the step may do again.
    * "seconds" is the median time of the step itself, depths taking turns, each waited for; the
      first call at each depth compiles and does not count. Later calls of the step with the depth
      by keyword find it compiled. It steps copies of the arguments: donated buffers stay yours, and
      one more copy of them is in memory.

    Args:
        step: A jitted training step with a static argument `depth`, which is given by keyword.
        layers: The layers, whose number is that of the depths.
        *args: The other arguments of the step, in order. For counts `jax.ShapeDtypeStruct`s will
            do.
        measure: "flops", "bytes" or "seconds".
        repetitions: How often each depth is timed, at least 1.
        **kwargs: The other keyword arguments of the step.

    Returns:
        Of shape (num_layers,) in float64: entry s is the cost at depth s, in the unit of `measure`.
        On several processes, which all have to call it, the seconds are those of process 0.

    Raises:
        TypeError: If `step` is not jitted, or has no argument `depth` or not as a static one; if
            arrays are abstract and `measure` is "seconds".
        ValueError: If `measure` is unknown or `repetitions` below 1; or if the backend does not
            count.

    Examples:
        >>> import functools, jax, jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": jnp.eye(8), "head": jnp.eye(8)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> def loss_fn(params, x):
        ...     return jnp.sum(jnp.tanh(x @ params["stem"]) @ params["head"])
        >>> @functools.partial(jax.jit, static_argnames="depth")
        ... def step(params, x, depth):
        ...     mask = layers.mask(depth)
        ...     return dm.masked_value_and_grad(loss_fn)(params, x, layer_mask=mask)
        >>> x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
        >>> full, head_only = dm.depth_cost(step, layers, params, x)
        >>> bool(full > head_only)
        True
    """
    check_layers(layers)
    check_choice("measure", measure, [*_COUNTS, "seconds"])
    repetitions = static_int("repetitions", repetitions, minimum=1)
    _check_step(step)
    _check_static(step, args, kwargs)
    depths = range(layers.num_layers)
    if measure == "seconds":
        return _on_every_process(_time(step, depths, args, kwargs, repetitions))
    return np.array([_count(step, depth, args, kwargs, measure) for depth in depths])


def _count(step: Any, depth: int, args: Any, kwargs: Any, measure: str) -> float:
    analysis = step.lower(*args, depth=depth, **kwargs).compile().cost_analysis()
    if not analysis or _COUNTS[measure] not in analysis:
        raise ValueError(
            f"The backend {jax.default_backend()!r} does not count {measure}: take "
            "measure='seconds'."
        )
    return float(analysis[_COUNTS[measure]])


def _time(step: Any, depths: range, args: Any, kwargs: Any, repetitions: int) -> list[float]:
    """The median seconds of each depth."""
    for leaf in jax.tree.leaves((args, kwargs)):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                "measure='seconds' runs the step and needs arrays, got a ShapeDtypeStruct: give "
                "arrays, or take measure='flops'."
            )
    samples: list[list[float]] = [[] for _ in depths]
    for repetition in range(repetitions + 1):
        for depth in depths:
            own_args, own_kwargs = jax.tree.map(_copy, (args, kwargs))
            jax.block_until_ready((own_args, own_kwargs))
            start = time.perf_counter()
            jax.block_until_ready(step(*own_args, depth=depth, **own_kwargs))
            seconds = time.perf_counter() - start
            if repetition > 0:
                samples[depth].append(seconds)
    return [statistics.median(of_depth) for of_depth in samples]


def _copy(leaf: Any) -> Any:
    """A buffer of its own, for the step to overwrite; what is no array of JAX cannot be donated."""
    if not isinstance(leaf, jax.Array):
        return leaf
    copy = jnp.copy(leaf)
    # To the letter, P("x") for P("x", None), or the step would be compiled for both.
    return jax.device_put(copy, leaf.sharding) if leaf.committed else copy


def _on_every_process(seconds: list[float]) -> Float[np.ndarray, " num_layers"]:
    """Those of process 0, so that all draw from the same distribution."""
    measured = np.array(seconds)
    if jax.process_count() == 1:
        return measured
    # Imported here because importing it starts no pod, but takes time on one device.
    from jax.experimental import multihost_utils

    # Rounded to float32, on process 0 as well.
    broadcast = multihost_utils.broadcast_one_to_all(measured.astype(np.float32))
    return np.asarray(broadcast, np.float64)


def _check_step(step: Any) -> None:
    """Error unless a step is jitted and has an argument `depth`."""
    way_out = "jax.jit(step, static_argnames='depth')"
    if not (callable(step) and hasattr(step, "lower")):
        raise TypeError(f"step must be a jitted function, {way_out}, got {describe(step)}.")
    parameters = inspect.signature(step).parameters.values()
    if not any(of.name == "depth" or of.kind is of.VAR_KEYWORD for of in parameters):
        raise TypeError(
            f"step must have an argument `depth`: {way_out}. Its arguments are "
            f"{', '.join(of.name for of in parameters)}."
        )


def _check_static(step: Any, args: Any, kwargs: Any) -> None:
    """Error if the depth is traced, which makes one program of all depths."""
    # By tracing: a step that tests its depth by `if` fails there, in a sentence of JAX's own.
    _, keywords = step.lower(*args, depth=0, **kwargs).args_info
    if "depth" in keywords:
        raise TypeError(
            "The argument `depth` of step is traced, and so of one cost: make it static, "
            "jax.jit(step, static_argnames='depth')."
        )
