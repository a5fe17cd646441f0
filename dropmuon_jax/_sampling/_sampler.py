"""`layer_mask_sampler`: which layers a step updates, on the host and on the device."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dropmuon_jax._checks import (
    check_extra_args,
    check_transformation,
    describe,
    static_int,
)
from dropmuon_jax._layers import Layers, check_layers
from dropmuon_jax._masks import check_rows, is_static, resolve_mask, where_active
from dropmuon_jax._sampling._distributions import LayerDistribution, depth_subsets
from dropmuon_jax._sampling._draws import draw_index
from dropmuon_jax._sampling._processes import check_agreement

_STEPS_PER_BLOCK = 1024  # how many steps the host draws at once
_STEPS_TO_COMPARE = 64  # how many draws processes compare
_LAST_STEP = 2**31 - 1


class LayerMaskSamplerState(NamedTuple):
    """State of :func:`layer_mask_sampler`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of steps taken, a scalar int32; the step to resume from."""


class LayerMaskSampler(optax.GradientTransformationExtraArgs):
    """An Optax transformation that also knows which layers each step updates.

    Made by :func:`layer_mask_sampler` and, with a whole optimizer before it, by
    :func:`drop_muon`. Every draw is a pure function of seed and step. A chain around it has no
    draws of its own: keep the sampler, or let :meth:`attach_to` add them.

    Attributes:
        layers: The :class:`Layers` that are drawn from.
        distribution: The :class:`LayerDistribution`.
        subsets: NumPy booleans of shape (num_subsets, num_layers): what can be drawn, by index. For
            a distribution over depths the index is the depth.
    """

    layers: Layers
    distribution: LayerDistribution
    subsets: np.ndarray
    _seed: int | jax.Array

    def sample(self, count: Int[Array, ""] | int) -> Int[Array, ""]:
        """The drawn index of a step, for use on the device; `count` may be traced.

        Returns:
            A scalar int32: the depth, or the row of `subsets`, for :func:`switch_depth`.
        """
        return draw_index(self._seed, count, self.probabilities(count))

    def depth(self, step: int) -> int:
        """The depth of a step, on the host, without touching the device that trains.

        Args:
            step: A Python integer, at least 0.

        Returns:
            A Python integer in [0, num_layers), equal to `sample(step)`.

        Raises:
            TypeError: If `step` is an array (reading it back would end asynchronous dispatch), or
                the distribution is not over depths.
            ValueError: If `step` is negative.
        """
        if not self._draws_depths:
            raise TypeError(
                "This distribution draws arbitrary subsets, not depths. Take sampler.active(step) "
                "as the static argument and layers.subset(active) as the mask."
            )
        return self._index(step)

    def active(self, step: int) -> tuple[bool, ...]:
        """The layers of a step, one boolean each, on the host; hashable, so a static argument.

        `layers.subset(active)` is the mask. Raises as :meth:`depth` does.
        """
        return tuple(self.subsets[self._index(step)].tolist())

    def check_processes(self, step: int) -> None:
        """Error unless every process of the pod is about to draw the same layers.

        All processes call it, before the first step and after restoring a checkpoint: from then on
        each draws by itself. With other depths they would run different programs, and wait for each
        other in collectives forever. With one process it does nothing.

        Args:
            step: The next one, a Python integer.

        Raises:
            ValueError: If processes differ in seed, step, layers or distribution, saying how.
        """
        draws = [self._index(step + i) for i in range(_STEPS_TO_COMPARE)]
        # Distributions that change along a run may part later than these draws.
        ahead = np.minimum(step + 2 ** np.arange(31), _LAST_STEP)
        probabilities = np.round([self.probabilities(int(later)) for later in ahead], 4)
        description = f"{self.layers}{self.subsets.tolist()}{probabilities.tolist()}"
        check_agreement(int(self._seed), step, draws, description)

    def probabilities(self, step: Array | int) -> Float[Array, " num_subsets"]:
        """The probability of each row of `subsets` at a step: of each depth."""
        return jnp.asarray(
            self.distribution.probabilities(step, self.layers.num_layers), jnp.float32
        )

    def inclusion_probabilities(self, step: Array | int) -> Float[Array, " num_layers"]:
        """How likely each layer is active at a step; exact."""
        return self.distribution.inclusion_probabilities(step, self.layers.num_layers)

    def attach_to(self, transformation: optax.GradientTransformation) -> "LayerMaskSampler":
        """A transformation with this sampler's draws beside its `init` and `update`.

        Examples:
            >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
            >>> params = {"stem": jnp.eye(2), "head": jnp.eye(2)}
            >>> layers = dm.layers_by_path(params, ["stem", "head"])
            >>> tx = dm.drop_muon(0.1, layers, dm.full_depth(), seed=0)
            >>> tx = tx.attach_to(optax.chain(optax.clip_by_global_norm(1.0), tx))
            >>> tx.depth(0)
            0
        """
        check_transformation("transformation", transformation)
        init, update = optax.with_extra_args_support(transformation)
        return _make_sampler(init, update, self.layers, self.distribution, self._seed)

    @functools.cached_property
    def _draws_depths(self) -> bool:
        return np.array_equal(self.subsets, depth_subsets(self.layers.num_layers))

    def _index(self, step: int) -> int:
        step = static_int(
            "step", step, minimum=0, hint="Count the steps in Python, or use sampler.sample."
        )
        if step > _LAST_STEP:
            raise ValueError(f"step must be at most {_LAST_STEP}, an int32, got {step}.")
        block, offset = divmod(step, _STEPS_PER_BLOCK)
        return int(self._draw_block(block)[offset])

    @functools.cached_property
    def _draw_block(self):
        draw = jax.jit(jax.vmap(lambda count: (self.sample(count), self.probabilities(count))))

        @functools.lru_cache(maxsize=4)
        def draw_block(block: int) -> np.ndarray:
            start = block * _STEPS_PER_BLOCK
            steps = np.arange(start, start + _STEPS_PER_BLOCK, dtype=np.int32)
            # On the host's processor, so that a busy accelerator is not waited for; now, even if a
            # user's trace is under way; and under a transfer guard, which guards the accelerator.
            with (
                jax.ensure_compile_time_eval(),
                jax.transfer_guard("allow"),
                jax.default_device(_host_device()),
            ):
                indices, probabilities = map(np.asarray, draw(steps))
            for step, of_step in enumerate(probabilities, start):
                _check_probabilities(of_step, step)
            return indices

        return draw_block


def layer_mask_sampler(
    layers: Layers, depth_distribution: LayerDistribution, *, seed: int | jax.Array
) -> LayerMaskSampler:
    """Draws the layers of each step, and lets only their updates through.

    It stands last in a chain: its zeros are static, so that XLA leaves inactive parameters alone,
    where zeros that a scheduled learning rate has multiplied would be added to them. Adding them
    keeps every bit of a parameter.

    The mask of a step is static, so the step is specialised to it: draw with `.depth(step)` on the
    host, hand it to the jitted step as a static argument, build the mask with `layers.mask(depth)`,
    and give that both to :func:`masked_value_and_grad` and to `update`. (With another mask in
    `update` a layer without a gradient would step on its old momentum; nothing can detect that.)
    In a loop on the device, `.sample(count)` draws the same depths for :func:`switch_depth`.

    Both draws are pure functions of seed and step: the same on every process of a pod, and after a
    restart from the step alone. They agree bit for bit, except that a distribution that computes
    probabilities with transcendental functions (:func:`epoch_shift_depth`) may round them
    differently on another backend, which can change a draw with probability about 1e-7 a step.

    Args:
        layers: The layers, over the whole parameters.
        depth_distribution: A :class:`LayerDistribution`, such as :func:`uniform_depth`.
        seed: A Python integer from 0 to 2^64 - 1. (A scalar array works too, for `sample` only.)

    Returns:
        A :class:`LayerMaskSampler`: a transformation whose `update` requires the extra argument
        `layer_mask`, sets the updates of inactive leaves to zero and counts its steps, with the
        methods `depth`, `active`, `sample`, `probabilities`, `inclusion_probabilities` and
        `attach_to`.

    Raises:
        TypeError: If `seed` is missing or no integer; in `update`, if `layer_mask` is missing.
        ValueError: If the distribution does not fit the number of layers, or its probabilities are
            negative or do not sum to one: at construction for step 0, at `depth` and `active` for
            every step; at `init`, for a leaf that is in no layer.

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
    check_layers(layers)
    if not isinstance(depth_distribution, LayerDistribution):
        raise TypeError(
            "depth_distribution must be a LayerDistribution such as dm.uniform_depth(), "
            f"got {describe(depth_distribution)}."
        )
    if not isinstance(seed, jax.Array):
        seed = static_int("seed", seed, minimum=0)
        if seed >= 1 << 64:
            raise ValueError(f"seed must be below 2^64, got {seed}.")
    _check_distribution(depth_distribution, layers)

    def init_fn(params: optax.Params) -> LayerMaskSamplerState:
        layers.units_of(params)  # an error if a leaf is in no layer
        return LayerMaskSamplerState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        del params
        if layer_mask is None:
            check_extra_args(extra_args)
            raise TypeError(
                "update() is missing the keyword argument 'layer_mask'. Pass the mask that the "
                "gradients were taken with: layer_mask=layers.mask(depth)."
            )
        layer_mask = resolve_mask(layer_mask, updates, extra_args, takes_rows=bool(layers.stacks))
        check_rows(layer_mask, layers)

        # p + (-0.0) is p, bit for bit; p + 0.0 is not for a p of -0.0.
        def let_through(flag: Any, update: Array) -> Array:
            if not is_static(flag):
                return where_active(flag, update, -0.0)
            return update if flag else jnp.full_like(update, -0.0)

        updates = jax.tree.map(let_through, layer_mask, updates)
        return updates, LayerMaskSamplerState(jnp.asarray(optax.safe_increment(state.count)))

    return _make_sampler(init_fn, update_fn, layers, depth_distribution, seed)


def _make_sampler(
    init: Any,
    update: Any,
    layers: Layers,
    distribution: LayerDistribution,
    seed: int | jax.Array,
) -> LayerMaskSampler:
    # Optax unpacks a transformation as the pair (init, update), so all else is an attribute.
    sampler = LayerMaskSampler(init, update)
    sampler.layers = layers
    sampler.distribution = distribution
    sampler.subsets = np.asarray(distribution.subsets(layers.num_layers))
    sampler._seed = seed
    return sampler


def _check_distribution(distribution: LayerDistribution, layers: Layers) -> None:
    """Error unless the distribution fits the layers and can be traced."""
    num_layers, names = layers.num_layers, ", ".join(layers.names)
    subsets = np.asarray(distribution.subsets(num_layers))
    if subsets.dtype != bool:
        raise TypeError(f"subsets of the distribution must be booleans, got {subsets.dtype}.")
    if subsets.ndim != 2 or subsets.shape[1] != num_layers:
        raise ValueError(
            f"The distribution is over subsets of shape {subsets.shape}, and there are "
            f"{num_layers} layers: {names}."
        )
    with jax.ensure_compile_time_eval():
        probabilities = np.asarray(distribution.probabilities(0, num_layers))
    if probabilities.shape != (len(subsets),):
        raise ValueError(
            f"The distribution gives {probabilities.size} probabilities, and {num_layers} layers "
            f"need {len(subsets)}: {names}."
        )
    _check_probabilities(probabilities, 0)
    try:
        jax.eval_shape(
            lambda step: distribution.probabilities(step, num_layers),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(
            "probabilities of the distribution must be a function of a traced step: write "
            "jnp.where(step < n, …) in place of a Python `if`."
        ) from error


def _check_probabilities(probabilities: np.ndarray, step: int) -> None:
    if not (probabilities >= 0).all():
        raise ValueError(f"probabilities must not be negative, got {probabilities} at step {step}.")
    if not np.isclose(probabilities.sum(), 1, atol=1e-5):
        raise ValueError(
            f"probabilities must sum to 1, got {probabilities.sum():g} at step {step}."
        )


def _host_device() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS without "cpu"
        return None
