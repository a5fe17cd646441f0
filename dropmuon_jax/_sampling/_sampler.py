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
from dropmuon_jax._sampling._adaptive import AdaptiveDistribution
from dropmuon_jax._sampling._distributions import (
    LayerDistribution,
    depth_subsets,
    inclusion_probabilities,
)
from dropmuon_jax._sampling._draws import draw_index
from dropmuon_jax._sampling._fit import check_distribution
from dropmuon_jax._sampling._host_draws import LAST_STEP, HostDraws, check_step
from dropmuon_jax._sampling._processes import check_agreement
from dropmuon_jax._sampling._record import find_record, record_gains
from dropmuon_jax._sampling._recorded_draws import RecordedDraws, to_host

_STEPS_TO_COMPARE = 64  # how many draws processes compare


class LayerMaskSamplerState(NamedTuple):
    """State of :func:`layer_mask_sampler`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of steps taken, a scalar int32; the step to resume from."""


class LayerMaskSampler(optax.GradientTransformationExtraArgs):
    """An Optax transformation that also knows which layers each step updates.

    Made by :func:`layer_mask_sampler` and, with a whole optimizer before it, by
    :func:`drop_muon`. Every draw is a pure function of seed and step, and with an
    :class:`AdaptiveDistribution` of the record in the optimizer state, which then must be given.
    (With others it may be.) A chain around it has no draws of its own: keep the sampler, or let
    :meth:`attach_to` add them.

    Attributes:
        layers: The :class:`Layers` that are drawn from.
        distribution: The :class:`LayerDistribution` or :class:`AdaptiveDistribution`.
        subsets: NumPy booleans of shape (num_subsets, num_layers): what can be drawn, by index. For
            a distribution over depths the index is the depth.
        steps_per_draw: How many steps in a row share a draw.
    """

    layers: Layers
    distribution: LayerDistribution | AdaptiveDistribution
    subsets: np.ndarray
    steps_per_draw: int
    _seed: int | jax.Array
    _keeps_record: bool

    def sample(self, count: Int[Array, ""] | int, opt_state: Any = None) -> Int[Array, ""]:
        """The drawn index of a step, for use on the device; `count` may be traced.

        Args:
            count: The step.
            opt_state: The optimizer state before it, for an adaptive distribution.

        Returns:
            A scalar int32: the depth, or the row of `subsets`, for :func:`switch_depth`.
        """
        draw = count // self.steps_per_draw
        return draw_index(self._seed, draw, self.probabilities(count, opt_state))

    def depth(self, step: int, opt_state: Any = None) -> int:
        """The depth of a step, on the host, without waiting for the device that trains.

        With an adaptive distribution the sampler follows one run, step by step: it reads the plans
        in `opt_state` a period ahead, and waits for the device only at the first step, or at one
        that does not follow the last.

        Args:
            step: A Python integer, at least 0.
            opt_state: The optimizer state before the step, for an adaptive distribution.

        Returns:
            A Python integer in [0, num_layers), equal to `sample(step, opt_state)`. (Where a
            wrapper leaves steps out, as `optax.apply_if_finite` does, the record counts fewer steps
            than the host, and plans begin a few steps apart on host and device.)

        Raises:
            TypeError: If `step` is an array (reading it back would end asynchronous dispatch), if
                the distribution is not over depths, or is adaptive and `opt_state` missing.
            ValueError: If `step` is negative, not that of `opt_state`, or `opt_state` has no record
                or that of another run.
        """
        if not self._draws_depths:
            raise TypeError(
                "This distribution draws arbitrary subsets, not depths. Take sampler.active(step) "
                "as the static argument and layers.subset(active) as the mask."
            )
        return self._index(step, opt_state)

    def active(self, step: int, opt_state: Any = None) -> tuple[bool, ...]:
        """The layers of a step, one boolean each, on the host; hashable, so a static argument.

        `layers.subset(active)` is the mask. Arguments and errors as in :meth:`depth`.
        """
        return tuple(self.subsets[self._index(step, opt_state)].tolist())

    def check_processes(self, step: int, opt_state: Any = None) -> None:
        """Error unless every process of the pod is about to draw the same layers.

        All processes call it, before the first step and after restoring a checkpoint: from then on
        each draws by itself. With other depths they would run different programs, and wait for each
        other in collectives forever. (Plans of an adaptive distribution agree if the gains do, to
        the last bit, as replicated arrays should: call it now and then.) One process agrees.

        Args:
            step: The next one, a Python integer.
            opt_state: The optimizer state before it, for an adaptive distribution.

        Raises:
            ValueError: If processes differ in seed, step, layers or distribution, saying how.
        """
        if isinstance(self.distribution, AdaptiveDistribution):
            self._check_given(opt_state)
            record, draws = find_record(opt_state), [step]
            # The plans that are made, and those of gains that differ, which know all costs.
            orders = np.arange(self.layers.num_layers, dtype=np.float32)
            rising, one_by_one = 2.0 ** -orders[::-1], 0.9 * np.eye(len(orders), dtype=np.float32)
            differing = jnp.asarray([rising, rising[::-1], *(one_by_one + 0.1)])
            kept = (to_host(x) for x in (record.probabilities, record.next_probabilities))
            plans = [np.asarray(self.distribution.plan(gains)) for gains in differing]
            probabilities = [*kept, *plans]
            periods = f"{self.distribution.steps_per_plan} {self.distribution.decay}"
        else:
            draws = [self._index(step + i, None) for i in range(_STEPS_TO_COMPARE)]
            # Distributions that change along a run may part later than these draws.
            ahead = np.minimum(step + 2 ** np.arange(31), LAST_STEP)
            probabilities = [np.asarray(self.probabilities(int(later))) for later in ahead]
            periods = ""
        compared = np.round(probabilities, 4).tolist()
        layers = f"{self.layers}{self.subsets.tolist()}{self.steps_per_draw}"
        check_agreement(int(self._seed), step, draws, f"{layers}{compared}{periods}")

    def probabilities(
        self, step: Array | int, opt_state: Any = None
    ) -> Float[Array, " num_subsets"]:
        """The probability of each row of `subsets` at a step: of each depth.

        With an adaptive distribution, in the period that the state is in.
        """
        if isinstance(self.distribution, AdaptiveDistribution):
            self._check_given(opt_state)
            return jnp.asarray(find_record(opt_state).probabilities)
        first = step // self.steps_per_draw * self.steps_per_draw
        return jnp.asarray(
            self.distribution.probabilities(first, self.layers.num_layers), jnp.float32
        )

    def inclusion_probabilities(
        self, step: Array | int, opt_state: Any = None
    ) -> Float[Array, " num_layers"]:
        """How likely each layer is active at a step; exact."""
        return inclusion_probabilities(self.probabilities(step, opt_state), self.subsets)

    def attach_to(self, transformation: optax.GradientTransformation) -> "LayerMaskSampler":
        """A transformation with this sampler's draws beside its `init` and `update`.

        With an adaptive distribution, the first transformation that the sampler is attached to also
        keeps the record, a :class:`LayerGainsState` around its state: give it the whole chain, from
        the gradient to the update.

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
        if isinstance(self.distribution, AdaptiveDistribution) and not self._keeps_record:
            transformation = record_gains(transformation, self.layers, self.distribution)
        init, update = optax.with_extra_args_support(transformation)
        return _make_sampler(
            *(init, update, self.layers, self.distribution, self._seed, self.steps_per_draw),
            keeps_record=isinstance(self.distribution, AdaptiveDistribution),
        )

    @functools.cached_property
    def _draws_depths(self) -> bool:
        return np.array_equal(self.subsets, depth_subsets(self.layers.num_layers))

    def _index(self, step: int, opt_state: Any) -> int:
        step = check_step(step)
        if isinstance(self.distribution, AdaptiveDistribution):
            self._check_given(opt_state)
            return self._recorded_draws.index(step, opt_state)
        return self._host_draws.index(step // self.steps_per_draw)

    def _check_given(self, opt_state: Any) -> None:
        if opt_state is None:
            raise TypeError(
                "This distribution follows the run: give the optimizer state before the step, "
                "sampler.depth(step, opt_state)."
            )

    @functools.cached_property
    def _host_draws(self) -> HostDraws:
        return HostDraws(self._seed, self.probabilities, self.steps_per_draw)

    @functools.cached_property
    def _recorded_draws(self) -> RecordedDraws:
        assert isinstance(self.distribution, AdaptiveDistribution)
        return RecordedDraws(self._seed, self.distribution.steps_per_plan, self.steps_per_draw)


def layer_mask_sampler(
    layers: Layers,
    depth_distribution: LayerDistribution | AdaptiveDistribution,
    *,
    seed: int | jax.Array,
    steps_per_draw: int | None = None,
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
        depth_distribution: A :class:`LayerDistribution`, such as :func:`uniform_depth`; or one that
            follows the run, such as :func:`time_aware_depth`, for which the whole chain is made by
            `sampler.attach_to(optax.chain(…, sampler))`, and draws need `opt_state`.
        seed: A Python integer from 0 to 2^64 - 1. (A scalar array works too, for `sample` only.)
        steps_per_draw: How many steps in a row share a draw, by default 1. It divides the
            `steps_per_plan` of an adaptive distribution.

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
    if not isinstance(seed, jax.Array):
        seed = static_int("seed", seed, minimum=0)
        if seed >= 1 << 64:
            raise ValueError(f"seed must be below 2^64, got {seed}.")
    # None in the place of 1, of which optax.inject_hyperparams would make an array.
    steps_per_draw = (
        1 if steps_per_draw is None else static_int("steps_per_draw", steps_per_draw, minimum=1)
    )
    if not isinstance(depth_distribution, LayerDistribution | AdaptiveDistribution):
        raise TypeError(
            "depth_distribution must be a LayerDistribution such as dm.uniform_depth(), or an "
            f"AdaptiveDistribution such as dm.time_aware_depth(…), got "
            f"{describe(depth_distribution)}."
        )
    check_distribution(depth_distribution, layers, steps_per_draw)

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

    return _make_sampler(
        *(init_fn, update_fn, layers, depth_distribution, seed, steps_per_draw), keeps_record=False
    )


def _make_sampler(
    init: Any,
    update: Any,
    layers: Layers,
    distribution: LayerDistribution | AdaptiveDistribution,
    seed: int | jax.Array,
    steps_per_draw: int,
    *,
    keeps_record: bool,
) -> LayerMaskSampler:
    # Optax unpacks a transformation as the pair (init, update), so all else is an attribute.
    sampler = LayerMaskSampler(init, update)
    sampler.layers = layers
    sampler.distribution = distribution
    sampler.subsets = np.asarray(distribution.subsets(layers.num_layers))
    sampler.steps_per_draw = steps_per_draw
    sampler._seed = seed
    sampler._keeps_record = keeps_record
    return sampler
