"""`DepthSampler`: which layers each step updates, as a function of seed and step."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, UInt32

from dropmuon_jax._checks import check_index, describe, static_int
from dropmuon_jax.layers.layers import Layers, check_layers
from dropmuon_jax.sampling.adaptive import AdaptiveDistribution, check_distribution
from dropmuon_jax.sampling.distributions import (
    LayerDistribution,
    check_probabilities,
    depth_subsets,
    inclusion_probabilities,
)
from dropmuon_jax.sampling.reading import (
    LAST_STEP,
    Reading,
    check_agreement,
    check_step,
    record_of,
    to_host,
)
from dropmuon_jax.sampling.record import DrawnBy, drawn_by_of, seed_words

_BITS = 24  # of a float32's mantissa: probabilities are rounded to multiples of 2^-24
_DRAWS_PER_BLOCK = 1024  # how many the host computes at once
_STEPS_TO_COMPARE = 64  # of which processes compare the draws


@dataclasses.dataclass(frozen=True)
class DepthSampler:
    """The draws of layers from a distribution: an immutable value that any number of runs may use.

    Draw with `.depth(step)` on the host, give the depth to the jitted step as a static argument,
    and build the mask with `layers.mask(depth)`. In a loop on the device, `.sample(count)` draws
    the same depths for :func:`switch_depth`. Both are pure functions of seed and step: the same on
    every process of a pod, and after a restart from the step alone. They agree bit for bit. (Only
    :func:`epoch_shift_depth`, whose probabilities another backend may round differently, can part
    with probability about 1e-7 a step.)

    An :class:`AdaptiveDistribution`, such as :func:`time_aware_depth`, draws by the record in the
    optimizer state: make the optimizer with :func:`record_gains`, and give each draw the state
    before the step, for which `.depth` waits. A :class:`PlanReader` does not wait.

    Attributes:
        layers: The layers, over the whole parameters.
        distribution: A :class:`LayerDistribution`, such as :func:`uniform_depth`, or adaptive.
        seed: An integer from 0 to 2^64 - 1, or a key: `jax.random.key(3)` is the seed 3. (Traced
            ones, as in `jax.vmap` over seeds, are for `sample` only.)
        steps_per_draw: How many steps in a row share a draw. It divides the `steps_per_plan` of an
            adaptive distribution.

    Raises:
        TypeError: If `seed` is no integer and no key.
        ValueError: If the distribution does not fit the layers, or its probabilities are negative
            or do not sum to one, which for later steps is seen when they are drawn.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.ones(2), "mid": jnp.ones(2), "head": jnp.ones(2)}
        >>> layers = dm.layers_by_path(params, ["stem", "mid", "head"])
        >>> sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
        >>> [sampler.depth(k) for k in range(99)] == [*jax.vmap(sampler.sample)(jnp.arange(99))]
        True
        >>> sampler == dm.DepthSampler(layers, dm.uniform_depth(), seed=jax.random.key(0))
        True

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1: S^k ~ D.
    """

    layers: Layers
    distribution: LayerDistribution | AdaptiveDistribution
    _: dataclasses.KW_ONLY
    seed: int | jax.Array
    steps_per_draw: int = 1

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if not isinstance(self.distribution, LayerDistribution | AdaptiveDistribution):
            raise TypeError(
                "distribution must be a LayerDistribution such as dm.uniform_depth(), or an "
                "AdaptiveDistribution such as dm.time_aware_depth(…), got "
                f"{describe(self.distribution)}."
            )
        hint = "It is static: under optax.inject_hyperparams name it in static_args."
        static_int("steps_per_draw", self.steps_per_draw, minimum=1, hint=hint)
        object.__setattr__(self, "seed", _as_seed(self.seed))
        check_distribution(self.distribution, self.layers, self.steps_per_draw)

    @functools.cached_property
    def subsets(self) -> np.ndarray:
        """What can be drawn, by index: booleans of shape (num_subsets, num_layers)."""
        return np.asarray(self.distribution.subsets(self.layers.num_layers))

    @functools.cached_property
    def draws_depths(self) -> bool:
        """Whether the distribution is over depths, so that the index of a subset is the depth."""
        return np.array_equal(self.subsets, depth_subsets(self.layers.num_layers))

    def depth(self, step: int, opt_state: Any = None) -> int:
        """The depth of a step, on the host.

        Args:
            step: A Python integer, at least 0.
            opt_state: The optimizer state before the step, for an adaptive distribution.

        Raises:
            TypeError: If `step` is an array (reading it back would end asynchronous dispatch), the
                distribution is not over depths, or `opt_state` is missing.
            ValueError: If `step` is negative, or `opt_state` has no record or that of another step.
        """
        if not self.draws_depths:
            raise TypeError(
                "This distribution draws arbitrary subsets, not depths. Take sampler.active(step) "
                "as the static argument and layers.subset(active) as the mask."
            )
        return self.index(step, opt_state)

    def active(self, step: int, opt_state: Any = None) -> tuple[bool, ...]:
        """The layers of a step, one boolean each, on the host; hashable, so a static argument.

        The mask is `layers.subset(active)`. Arguments and errors are those of :meth:`depth`.
        """
        return tuple(self.subsets[self.index(step, opt_state)].tolist())

    def index(self, step: int, opt_state: Any = None) -> int:
        """The index in `subsets` that is drawn in a step, on the host."""
        step = check_step(step)
        if isinstance(self.distribution, AdaptiveDistribution):
            plan = Reading.begin(opt_state).arrive(step, self).probabilities
            return int(self.draw_with(plan, np.array([step]))[0])
        block, offset = divmod(step // self.steps_per_draw, _DRAWS_PER_BLOCK)
        if block not in self._blocks:
            self._blocks[block] = _block_of_draws(self, block)
        return int(self._blocks[block][offset])

    _blocks = functools.cached_property[dict[int, np.ndarray]](lambda self: {})

    @property
    def drawn_by(self) -> DrawnBy:
        """What an adaptive sampler writes into a state, to be known again."""
        # That of a traced seed belongs to one trace, and is not kept.
        return drawn_by_of(self) if isinstance(self.seed, Tracer) else self._drawn_by

    @functools.cached_property
    def _drawn_by(self) -> DrawnBy:
        with jax.ensure_compile_time_eval():
            return drawn_by_of(self)

    # The warnings that have been given, so that each comes once.
    told = functools.cached_property[list[str]](lambda self: [])
    # The first record that a draw on the device has been compared with; it waits for no other one.
    compared = functools.cached_property[list[DrawnBy]](lambda self: [])

    def draw_with(self, probabilities: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """The indices that are drawn in steps with given probabilities, on the host."""
        return _draw_on_host(self, steps // self.steps_per_draw, probabilities)[0]

    def sample(self, count: Int[Array, ""] | int, opt_state: Any = None) -> Int[Array, ""]:
        """The depth of a step, or the index in `subsets`, on the device; the step may be traced."""
        draw = count // self.steps_per_draw
        words = jnp.asarray(seed_words(self.seed))
        return draw_index(words, draw, self.probabilities(count, opt_state))

    def probabilities(
        self, step: Array | int, opt_state: Any = None
    ) -> Float[Array, " num_subsets"]:
        """The probability of each subset, or depth, at a step; by the plan of an adaptive one."""
        if isinstance(self.distribution, AdaptiveDistribution):
            return jnp.asarray(record_of(opt_state, self).probabilities)
        first = step // self.steps_per_draw * self.steps_per_draw
        probabilities = self.distribution.probabilities(first, self.layers.num_layers)
        return jnp.asarray(probabilities, jnp.float32)

    def inclusion_probabilities(
        self, step: Array | int, opt_state: Any = None
    ) -> Float[Array, " num_layers"]:
        """How likely each layer is active at a step; exact."""
        return inclusion_probabilities(self.probabilities(step, opt_state), self.subsets)

    def check_processes(self, step: int, opt_state: Any = None) -> None:
        """Error unless every process of the pod is about to draw the same layers.

        All processes call it, before the first step and after restoring a checkpoint: from then on
        each draws by itself. With other depths they would run different programs, and wait for each
        other in collectives forever. (Plans of an adaptive distribution agree if the gains do, to
        the last bit, as replicated arrays should: call it now and then.) The error says where. A
        state of another adaptive sampler is an error too, on one process as on many.
        """
        step, of_state = check_step(step), None
        if isinstance(self.distribution, AdaptiveDistribution):
            # What is wrong on one process alone raises below, or in `depth`: raised here, the
            # other processes would wait for this one.
            count, *plans, of_state = jax.tree.map(to_host, Reading.begin(opt_state))
            draws, plans = [int(count)], [*plans, of_state.plans, self.drawn_by.plans]
        else:
            draws = [self.index(step + i) for i in range(_STEPS_TO_COMPARE)]
            # Distributions that change along a run may part later than these draws.
            ahead = np.minimum(step + 2 ** np.arange(31), LAST_STEP)
            plans = [self.probabilities(int(later)) for later in ahead]
        rounded = [np.round(to_host(plan), 4).tolist() for plan in plans]
        about = f"{self.layers}{self.subsets.tolist()}{self.steps_per_draw}{rounded}"
        if of_state is not None:
            about += f"{[x.tolist() for x in (*of_state[:2], self.drawn_by.settings)]}"
        check_agreement(self.seed, step, draws, about)
        if of_state is not None:
            of_state.refuse_other(self.drawn_by, self.told)


def _as_seed(seed: Any) -> int | jax.Array:
    """The seed as a Python integer; as an array if it is traced."""
    is_array = isinstance(seed, jax.Array | np.ndarray)
    if is_array and seed.shape == () and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        words = jax.random.key_data(seed)
        if jax.random.key_impl(seed) != "threefry2x32":
            # Not drawn from the key, as other generators differ from backend to backend.
            start = jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl="threefry2x32")
            words = jax.random.key_data(functools.reduce(jax.random.fold_in, words.ravel(), start))
    elif is_array and seed.shape == (2,) and seed.dtype == np.uint32:
        words = seed
    elif isinstance(seed, Tracer) and jnp.issubdtype(seed.dtype, jnp.integer):
        check_index("seed", seed)
        return seed
    else:
        if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jnp.integer):
            check_index("seed", seed)
            seed = int(to_host(seed))
        way_out = "Give an integer from 0 to 2^64 - 1, or a key such as jax.random.key(0)."
        seed = static_int("seed", seed, minimum=0, hint=way_out)
        if seed >= 1 << 64:
            raise ValueError(f"seed must be below 2^64, got {seed}.")
        return seed
    if isinstance(words, Tracer):
        return words
    high, low = to_host(words).tolist()
    return (high << 32) + low


@jax.jit  # for draws outside of it: as many programs as are in here would wait for the device
def draw_index(
    seed: UInt32[Array, " 2"], count: Int[Array, ""], probabilities: Float[Array, " outcomes"]
) -> Int[Array, ""]:
    """An index with the given probabilities, drawn in integers and so the same everywhere."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    key = jax.random.fold_in(key, count)
    # The folded key is itself 64 random bits, the same under every JAX configuration.
    bits = jax.random.key_data(key)[0] >> (32 - _BITS)
    # A sum of integers is exact, in whatever order a backend takes it. What rounding has lost or
    # added goes to the likeliest index, so that one of probability zero is never drawn.
    total = 1 << _BITS
    shares = jnp.round(probabilities * total).astype(jnp.int32)
    missing = total - jnp.sum(shares, dtype=jnp.int32)
    shares = shares.at[jnp.argmax(shares)].add(missing)
    thresholds = jnp.cumsum(shares, dtype=jnp.int32)[:-1]
    return jnp.sum(bits.astype(jnp.int32) >= thresholds, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _draw(sampler: DepthSampler, draws: Array, plan: Array | None) -> tuple[Array, Array]:
    def one(draw: Array) -> tuple[Array, Array]:
        step = draw * sampler.steps_per_draw
        probabilities = sampler.probabilities(step) if plan is None else plan
        return draw_index(seed_words(sampler.seed), draw, probabilities), probabilities

    return jax.vmap(one)(draws)


def _draw_on_host(
    sampler: DepthSampler, draws: np.ndarray, plan: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws and their probabilities, computed now, and without waiting for an accelerator."""
    if not isinstance(sampler.seed, int):
        raise TypeError("seed is traced, for sampler.sample only: give an integer or a key.")
    host = None
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS without "cpu"
        host = jax.local_devices(backend="cpu")[0]
    now, allow = jax.ensure_compile_time_eval(), jax.transfer_guard("allow")
    with now, allow, jax.default_device(host):
        return jax.tree.map(np.asarray, _draw(sampler, draws.astype(np.int32), plan))


def _block_of_draws(sampler: DepthSampler, number: int) -> np.ndarray:
    """The draws of a block of steps, all checked."""
    # Nobody asks for draws beyond the last step, whose number would overflow.
    draws = number * _DRAWS_PER_BLOCK + np.arange(_DRAWS_PER_BLOCK)
    draws = np.minimum(draws, LAST_STEP // sampler.steps_per_draw)
    indices, probabilities = _draw_on_host(sampler, draws)
    for draw, of_draw in zip(draws.tolist(), probabilities, strict=True):
        check_probabilities(of_draw, draw * sampler.steps_per_draw)
    return indices
