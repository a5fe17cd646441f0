"""Whether a distribution fits the layers, and can be traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dropmuon_jax._layers import Layers
from dropmuon_jax._sampling._adaptive import AdaptiveDistribution
from dropmuon_jax._sampling._distributions import LayerDistribution
from dropmuon_jax._sampling._host_draws import check_probabilities


def check_distribution(
    distribution: LayerDistribution | AdaptiveDistribution, layers: Layers, steps_per_draw: int
) -> None:
    """Error for subsets or probabilities of other shapes than the layers need, or no numbers.

    Of an adaptive distribution, for gains that are all alike.
    """
    num_layers, names = layers.num_layers, ", ".join(layers.names)
    subsets = np.asarray(distribution.subsets(num_layers))
    if subsets.dtype != bool:
        raise TypeError(f"subsets of the distribution must be booleans, got {subsets.dtype}.")
    if subsets.ndim != 2 or subsets.shape[1] != num_layers:
        raise ValueError(
            f"The distribution is over subsets of shape {subsets.shape}, and there are "
            f"{num_layers} layers: {names}."
        )
    if isinstance(distribution, AdaptiveDistribution):
        name, example = "plan", np.ones(num_layers, np.float32)
        if distribution.steps_per_plan % steps_per_draw:
            raise ValueError(
                f"steps_per_draw is {steps_per_draw}, and must divide the distribution's "
                f"steps_per_plan, {distribution.steps_per_plan}."
            )

        def probabilities_of(argument: Any) -> Array:
            return distribution.plan(jnp.asarray(argument))
    else:
        name, example = "probabilities", 0

        def probabilities_of(argument: Any) -> Array:
            return distribution.probabilities(argument, num_layers)

    with jax.ensure_compile_time_eval():
        probabilities = np.asarray(probabilities_of(example))
    if probabilities.shape != (len(subsets),):
        raise ValueError(
            f"The distribution gives {probabilities.size} probabilities, and {num_layers} layers "
            f"need {len(subsets)}: {names}."
        )
    check_probabilities(probabilities, 0)
    try:
        jax.eval_shape(probabilities_of, jax.ShapeDtypeStruct(np.shape(example), _dtype(example)))
    except jax.errors.ConcretizationTypeError as error:
        traced = "step" if name == "probabilities" else "array of gains"
        raise TypeError(
            f"{name} of the distribution must be a function of a traced {traced}: write "
            "jnp.where(step < n, …) in place of a Python `if`."
        ) from error


def _dtype(example: np.ndarray | int) -> np.dtype:
    return np.dtype(np.int32 if isinstance(example, int) else np.float32)
