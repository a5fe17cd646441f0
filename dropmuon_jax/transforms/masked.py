"""Transformations and layer masks: what looks at a mask, freezes by it, and cuts it to subtrees.

A mask is validated where it enters the outermost of these transformations, and trusted inside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dropmuon_jax._checks import (
    check_parameters,
    check_transformation,
    describe,
    did_you_mean,
)
from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.prefixes import fitted_prefix
from dropmuon_jax.layers.states import StateCheck, checked_transformation
from dropmuon_jax.layers.trees import (
    is_static,
    resolve_mask,
    restructure_like,
    where_active,
)
from dropmuon_jax.sampling.adaptive import AdaptiveDistribution
from dropmuon_jax.sampling.distributions import LayerDistribution
from dropmuon_jax.sampling.sampler import DepthSampler


def masked_transformation(
    init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]], *, takes_rows: bool = False
) -> optax.GradientTransformationExtraArgs:
    """A transformation that looks at the layer mask.

    Args:
        init: From the parameters to the state.
        update: From `updates, state, params, layer_mask, extra_args` to updates and state, where
            the mask has been validated and has the structure of the updates.
        takes_rows: Whether leaves of the mask may be vectors over the layers of a stack.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask`, by default all active
        layers, and passes by unknown ones.
    """

    def init_fn(params: optax.Params) -> optax.OptState:
        check_parameters(params)
        return init(params)

    check = StateCheck(init_fn)

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        if layer_mask is None and "depth" in extra_args:
            raise TypeError(
                "update() takes depth in drop_muon and its siblings, which know the layers; here "
                "give layer_mask=layers.mask(depth)."
            )
        layer_mask = resolve_mask(layer_mask, updates, extra_args, takes_rows=takes_rows)
        check(state, updates)
        return update(updates, state, params, layer_mask, extra_args)

    return optax.GradientTransformationExtraArgs(check.init, update_fn)


def promoting(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Optax's Adam, schedules and the like, which cannot run under strict promotion, as they do."""
    tx = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


@names_counterparts
def chain_subtrees(
    transforms: Mapping[str, optax.GradientTransformation],
    labels: Any | Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """Sends each leaf of the updates through the chain that its label names.

    This is `optax.partition` with `mask_compatible_extra_args=True`, so that a tree-shaped extra
    argument such as `layer_mask` reaches each chain cut to its leaves, and with messages that name
    the leaf.

    Args:
        transforms: From label to transformation; `optax.chain` makes one out of several.
        labels: A tree of labels with the leaves of the parameters, or a prefix of it, or a
            function that makes one from the parameters, such as :func:`matrix_labels`. Containers
            may be others, such as plain dicts for a state of NNX.

    Returns:
        A transformation with the state of `optax.partition`. Extra arguments are passed on.

    Raises:
        ValueError: At construction without transforms; at `init` for a leaf whose label is not in
            `transforms`, naming its path, and for labels of other leaves.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
        >>> tx = dm.chain_subtrees(
        ...     {"matrix": dm.newton_schulz_lmo(), "vector": optax.scale(-1.0)},
        ...     {"kernel": "matrix", "bias": "vector"},
        ... )
        >>> grads = {"kernel": 9 * jnp.eye(2), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(grads, tx.init(params))
        >>> print(updates["bias"])
        [-1. -1.]
    """
    if not transforms:
        raise ValueError("transforms is empty; give one transformation for each label.")
    for label, transformation in transforms.items():
        check_transformation(f"transforms[{label!r}]", transformation)
    by_label: dict[Hashable, optax.GradientTransformation] = dict(transforms.items())

    def check_label(path: str, label: Any) -> None:
        if not isinstance(label, Hashable) or label not in transforms:
            raise ValueError(
                f"Leaf '{path}' has the label {describe(label)}, and transforms has only "
                f"{sorted(map(str, transforms))}.{did_you_mean(label, map(str, transforms))}"
            )

    labels_of = fitted_prefix("labels", labels, check_label)
    partition = optax.partition(by_label, labels_of, mask_compatible_extra_args=True)

    def init_fn(params: optax.Params) -> optax.OptState:
        check_parameters(params)
        return partition.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        # Optax cuts an extra argument to a subtree if its structure is that of the updates.
        extra_args = with_second_gradient(extra_args, updates)
        return partition.update(updates, state, params, **extra_args)

    return checked_transformation(init_fn, update_fn)


def with_second_gradient(extra_args: dict[str, Any], updates: Any) -> dict[str, Any]:
    """The extra arguments, `prev_params_grads` among them in the containers of the updates."""
    grads = extra_args.get("prev_params_grads")
    if grads is None:
        return extra_args
    return extra_args | {"prev_params_grads": restructure_like("prev_params_grads", grads, updates)}


class LayerMaskSamplerState(NamedTuple):
    """State of :func:`layer_mask_sampler`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of steps taken, a scalar int32; the step to resume from."""


class LayerMaskSampler(optax.GradientTransformationExtraArgs):
    """A transformation that freezes inactive layers, with the sampler of the active ones beside it.

    Attributes:
        draws: The :class:`DepthSampler`; the methods here are its own.
    """

    draws: DepthSampler

    def depth(self, step: int, opt_state: Any = None) -> int:
        """The depth of a step, on the host."""
        return self.draws.depth(step, opt_state)

    def active(self, step: int, opt_state: Any = None) -> tuple[bool, ...]:
        """The active layers of a step, on the host."""
        return self.draws.active(step, opt_state)

    def sample(self, count: Int[Array, ""] | int, opt_state: Any = None) -> Int[Array, ""]:
        """The drawn index of a step, on the device."""
        return self.draws.sample(count, opt_state)


@names_counterparts
def layer_mask_sampler(
    layers: Layers,
    depth_distribution: LayerDistribution | AdaptiveDistribution,
    *,
    seed: int | jax.Array,
    steps_per_draw: int = 1,
) -> LayerMaskSampler:
    """Lets only the updates of the layers of a mask through, and draws the layers of each step.

    The link of a chain that freezes: the updates of inactive leaves become zeros of a sign that
    keeps every bit of a parameter. Put it behind every link that does not look at `layer_mask`,
    such as weight decay and learning rates of Optax; :func:`check_optimizer` says where a frozen
    leaf would move. The draws are those of a :class:`DepthSampler` with the same arguments, which
    is the attribute `draws`; wrappers such as `optax.chain` return a transformation without them,
    so keep this one, or make the sampler by itself.

    Args:
        layers: The layers, over the whole parameters.
        depth_distribution: A :class:`LayerDistribution`, such as :func:`uniform_depth`, or one that
            follows the run, such as :func:`time_aware_depth`.
        seed: A Python integer or a key of JAX.
        steps_per_draw: How many steps in a row share a draw.

    Returns:
        A transformation whose `update` requires the extra argument `layer_mask`, with the methods
        `depth`, `active` and `sample`.

    Raises:
        TypeError: If `seed` is missing or no integer or key; in `update`, without `layer_mask`.
        ValueError: As :class:`DepthSampler`; at `init`, for a leaf that is in no layer.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.ones(2), "mid": jnp.ones(2), "head": jnp.ones(2)}
        >>> layers = dm.layers_by_path(params, ["stem", "mid", "head"])
        >>> sampler = dm.layer_mask_sampler(layers, dm.uniform_depth(), seed=0)
        >>> depths = [sampler.depth(step) for step in range(8)]
        >>> depths == [int(sampler.sample(step)) for step in range(8)]
        True
        >>> updates, state = sampler.update(params, sampler.init(params), layer_mask=layers.mask(1))
        >>> print(updates["stem"], updates["mid"], updates["head"])
        [-0. -0.] [1. 1.] [1. 1.]

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1.
    """
    draws = DepthSampler(layers, depth_distribution, seed=seed, steps_per_draw=steps_per_draw)

    def init_fn(params: optax.Params) -> LayerMaskSamplerState:
        check_parameters(params)
        layers.units_of(params)  # an error if a leaf is in no layer
        return LayerMaskSamplerState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        del params
        layer_mask = required_mask(layers, updates, layer_mask, extra_args)
        updates = freeze(layer_mask, updates)
        return updates, LayerMaskSamplerState(jnp.asarray(optax.safe_increment(state.count)))

    # Optax unpacks a transformation as the pair (init, update), so all else is an attribute.
    sampler = LayerMaskSampler(*checked_transformation(init_fn, update_fn))
    sampler.draws = draws
    return sampler


def required_mask(
    layers: Layers,
    updates: Any,
    layer_mask: Any,
    extra_args: Mapping[str, Any],
    *,
    otherwise: str = "",
) -> Any:
    """The validated mask of an update that cannot do without one."""
    if layer_mask is None:
        if "depth" in extra_args:
            otherwise = "; depth= is for drop_muon and its siblings"
        else:
            resolve_mask(None, updates, extra_args)  # an error if it was lost on the way
        raise TypeError(
            "update() is missing the keyword argument 'layer_mask'. Pass the mask that the "
            f"gradients were taken with, layer_mask=layers.mask(depth){otherwise}. If you did, a "
            "wrapper has kept it, as Flax's TrainState does: call tx.update yourself."
        )
    layer_mask = resolve_mask(layer_mask, updates, extra_args, takes_rows=bool(layers.stacks))
    if layers.stacks or not all(map(is_static, jax.tree.leaves(layer_mask))):
        layers.check_rows(layer_mask)
    return layer_mask


def freeze(layer_mask: Any, updates: Any) -> Any:
    """The updates of active leaves; for the others zeros that keep every bit of a parameter."""

    # p + (-0.0) is p, bit for bit; p + 0.0 is not for a p of -0.0.
    def let_through(flag: Any, update: Array) -> Array:
        if not is_static(flag):
            return where_active(flag, update, -0.0)
        return update if flag else jnp.full_like(update, -0.0)

    return jax.tree.map(let_through, layer_mask, updates)
