"""What is guaranteed: how private a run is, and the step with which errors stay bounded."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from dropmuon_jax._checks import (
    check_choice,
    check_nonnegative,
    check_positive,
    is_python_number,
    static_int,
)
from dropmuon_jax.layers.trees import leaf_paths

Relation = Literal["add_or_remove", "replace"]


@dataclasses.dataclass(frozen=True)
class PrivacyPlan:
    r"""How much noise keeps a number of rounds (ε, δ)-differentially private, and what is spent.

    The mechanism is one Gaussian release each round, of length at most 1 with noise of standard
    deviation `noise_multiplier` in each entry, composed over the rounds; later messages may depend
    on what was released before.

    **What is protected**: whatever a client sends, so its whole data at once (the level of users,
    if each client is one; of examples only where each client has one). "add_or_remove" compares a
    run with a client to the same run without its messages, "replace" to one in which all of its
    data is other, which needs twice the noise.

    **What is not**: the choice of hyper-parameters and of the round to stop at by looking at the
    data; anything released besides, such as losses, counts, or gradients that
    :func:`~dropmuon_jax.compression.start_from_gradients` sends; floating-point attacks on the
    noise; people who know the seed, as all clients do; and a round that is taken again on other
    data, from an older state: it has the same noise.

    Attributes:
        epsilon: ε after all rounds.
        delta: δ, in (0, 1).
        rounds: How many there are.
        sampling_probability: With which each client takes part in a round, all independently, for
            mechanisms that sample so; 1 for all in every round, as in :func:`norm_ec`.
        relation: Which runs are compared.
        accountant: "pld", of privacy loss distributions, or "rdp", of Rényi divergences, which says
            more noise and does not know "replace".

    Raises:
        ValueError: For values out of range.
        ImportError: Where dp-accounting is not installed.

    Examples:
        >>> import dropmuon_jax as dm
        >>> plan = dm.privacy.PrivacyPlan(8.0, 1e-5, rounds=300, accountant="rdp")
        >>> round(plan.noise_multiplier, 1), round(plan.epsilon_after(100), 1)
        (11.0, 4.2)
    """

    epsilon: float
    delta: float
    rounds: int
    _: dataclasses.KW_ONLY
    sampling_probability: float = 1.0
    relation: Relation = "add_or_remove"
    accountant: Literal["pld", "rdp"] = "pld"

    def __post_init__(self):
        check_positive("epsilon", self.epsilon)
        for name in ("delta", "sampling_probability"):
            if not is_python_number(value := getattr(self, name)):
                raise TypeError(f"{name} must be a Python number, got {value!r}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}.")
        static_int("rounds", self.rounds, minimum=1)
        if not 0 < self.sampling_probability <= 1:
            raise ValueError(
                f"sampling_probability must lie in (0, 1], got {self.sampling_probability}."
            )
        check_choice("relation", self.relation, ("add_or_remove", "replace"))
        check_choice("accountant", self.accountant, ("pld", "rdp"))
        if self.relation == "replace" and self.accountant == "rdp":
            raise ValueError(
                "accountant='rdp' counts a plain Gaussian as 'add_or_remove' whatever it is told: "
                "take accountant='pld' for relation='replace'."
            )

    def _new_accountant(self) -> Any:
        dp, one = _dp_accounting(), self.relation == "add_or_remove"
        of = dp.NeighboringRelation.ADD_OR_REMOVE_ONE if one else dp.NeighboringRelation.REPLACE_ONE
        if self.accountant == "rdp":
            return dp.rdp.RdpAccountant(neighboring_relation=of)
        return dp.pld.PLDAccountant(of)

    def _event(self, noise_multiplier: float, rounds: int) -> Any:
        dp = _dp_accounting()
        event = dp.GaussianDpEvent(noise_multiplier)
        if self.sampling_probability < 1:
            event = dp.PoissonSampledDpEvent(self.sampling_probability, event)
        return dp.SelfComposedDpEvent(event, rounds)

    @functools.cached_property
    def noise_multiplier(self) -> float:
        """σ for releases of length at most 1, the least that the accountant allows, within 1e-4."""
        return _dp_accounting().calibrate_dp_mechanism(
            self._new_accountant,
            lambda sigma: self._event(sigma, self.rounds),
            self.epsilon,
            self.delta,
            tol=1e-4,
        )

    def epsilon_after(self, rounds: int) -> float:
        """ε of the first rounds, at the same δ.

        Raises:
            ValueError: For more rounds than are accounted for.
        """
        if static_int("rounds", rounds, minimum=0) > self.rounds:
            raise ValueError(
                f"{rounds} rounds are more than the {self.rounds} that are accounted for. Plan "
                "for all of them before the first, with rounds= of dm.privacy.PrivacyPlan."
            )
        if rounds == 0:
            return 0.0
        accountant = self._new_accountant()
        accountant.compose(self._event(self.noise_multiplier, rounds))
        return float(accountant.get_epsilon(self.delta))

    def spent(self, opt_state: optax.OptState) -> float:
        """ε so far, by the rounds that the state of an optimizer has counted.

        Raises:
            ValueError: If there are more than are accounted for, the state counts none, or its
                noise is that of another plan.
        """
        nodes: list[Any] = [of for _, of in optax.tree.get_all_with_path(opt_state, "NormECState")]
        if len(nodes) != 1:
            raise ValueError(
                f"opt_state has {len(nodes)} parts that send private messages, and one is meant: "
                "give the state of an optimizer with dm.privacy.norm_ec in it."
            )
        has, said = float(nodes[0].noise_multiplier), self.noise_multiplier
        if not math.isclose(has, said, rel_tol=1e-5):
            raise ValueError(
                f"The optimizer has noise of multiplier {has:g}, and this plan says {said:g}: ask "
                "the plan that the optimizer was made with."
            )
        return self.epsilon_after(int(nodes[0].count))


def checked_seed(plan: PrivacyPlan | None, seed: int | None) -> int:
    """The seed of what a plan asks for; an error for a plan that does not fit, or one without."""
    if not isinstance(plan, PrivacyPlan | None):
        raise TypeError(f"plan must be a dm.privacy.PrivacyPlan, got {plan!r}.")
    if plan is not None and plan.sampling_probability < 1:
        raise ValueError(
            "plan has clients drawn for each round, and here all of them take part: leave out "
            "sampling_probability."
        )
    if seed is None:
        if plan is not None:
            raise ValueError(
                "plan needs a seed. Whoever knows it can take the noise away: give one that nobody "
                "can guess, such as secrets.randbits(32), the same in all processes and restarts."
            )
        return 0
    # No array: a hyperparameter lies in the state, is logged, and must not be known.
    hint = "It is static: under optax.inject_hyperparams name it in static_args."
    seed = static_int("seed", seed, minimum=0, hint=hint)
    if seed >= 1 << 32:
        raise ValueError(f"seed must be below 2**32, got {seed}: keys leave out what is above.")
    return seed


def with_noise(tree: Any, key: PRNGKeyArray, deviation: float) -> Any:
    """Gaussian noise on every entry, another one for each leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = [jax.random.fold_in(key, np.uint32(zlib.crc32(of.encode()))) for of in leaf_paths(tree)]
    noisy = [
        x + jnp.asarray(deviation, x.dtype) * jax.random.normal(of, x.shape, x.dtype)
        for x, of in zip(leaves, keys, strict=True)
    ]
    return treedef.unflatten(noisy)


def _dp_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError:
        raise ImportError(
            "Privacy is accounted for by dp-accounting: pip install 'dropmuon-jax[privacy]'."
        ) from None
    return dp_accounting


def safe_step(alpha: float, beta: float, radius: float, smoothness: float) -> float:
    r"""The longest step with which no client's error leaves its radius: γ of :func:`norm_ec`.

    .. math::
        \gamma \le \frac{R - \max_{r \le R} |\varphi(r)|}{L}, \qquad
        \varphi(r) = r - \frac{\beta r}{\alpha + r}

    where φ maps a client's error to the one after its message. For β > α, φ also has a minimum of
    -(√β - √α)², which the condition β / (α + R) < 1 of the literature does not see.

    Args:
        alpha: α, at least 0.
        beta: β > 0.
        radius: R, the largest error ‖∇f_i(x⁰) - g_i⁰‖ of a client at first.
        smoothness: L, the largest Lipschitz constant of a client's gradient.

    Raises:
        ValueError: For bad numbers, and where no step is safe.

    Examples:
        >>> import dropmuon_jax as dm
        >>> round(dm.privacy.safe_step(0.01, 0.9, radius=1.0, smoothness=2.0), 3)
        0.14

    References:
        Derived here, since the step of the theorem is known from secondary sources only.
    """
    check_nonnegative("alpha", alpha)
    for name, value in (("beta", beta), ("radius", radius), ("smoothness", smoothness)):
        check_positive(name, value)
    largest = abs(radius - beta * radius / (alpha + radius))
    lowest = math.sqrt(alpha * beta) - alpha
    if 0 < lowest < radius:
        largest = max(largest, (math.sqrt(beta) - math.sqrt(alpha)) ** 2)
    if largest >= radius:
        raise ValueError(
            f"beta={beta} is too large for alpha={alpha} and radius={radius}: an error may leave "
            "its radius at any step. Take a smaller beta."
        )
    return (radius - largest) / smoothness
