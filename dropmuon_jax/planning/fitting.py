"""Samples of the smoothness along a run, collected on the host, and the constants that fit them."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from dropmuon_jax._checks import check_nonnegative
from dropmuon_jax.layers.layers import format_table
from dropmuon_jax.layers.trees import leaf_paths
from dropmuon_jax.planning.tracking import SmoothnessState
from dropmuon_jax.schedules import AdaptiveRadius, adaptive_radius

Vector = Float[np.ndarray, " samples"]

# A sample is read from the device only after so many later ones, when the device has long been done
# with it: reading the newest would make the host wait, and end asynchronous dispatch.
_LAG = 16


class SmoothnessSamples(NamedTuple):
    """The samples of one leaf, in the order in which they were taken."""

    steps: Int[np.ndarray, " samples"]
    """The step in which each was taken."""
    dual_norms: Vector
    """‖g‖*."""
    smoothness: Vector
    """L̂."""


class SmoothnessRecord:
    """Collects the samples of :func:`track_smoothness` along a run.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> tracker = dm.planning.track_smoothness(dm.norms.euclidean_norm(), every=4)
        >>> tx, record = optax.chain(tracker, optax.sgd(0.1)), dm.planning.SmoothnessRecord()
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> opt_state, update = tx.init(params), jax.jit(tx.update)
        >>> for step in range(10):
        ...     updates, opt_state = update(jax.tree.map(jnp.square, params), opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     record.append(opt_state)
        >>> print(record.samples()["w"].steps)
        [1 5 9]
    """

    def __init__(self):
        self._samples: dict[str, list[tuple[int, float, float]]] = {}
        self._last_steps: dict[tuple[str, ...], int] = {}
        self._unread: collections.deque[tuple[tuple[str, ...], list[Any]]] = collections.deque()

    def append(self, opt_state: Any) -> None:
        """Takes the samples of an optimizer state, unless they have been taken already.

        Call it after every step, or after every n-th: a sample stays in the state until the next.
        It does not wait for the device, and what it keeps survives the donation of the state.

        Args:
            opt_state: The state of an optimizer with :func:`track_smoothness` anywhere in it, once
                or in several subtrees.

        Raises:
            TypeError: If the state is traced.
            ValueError: If :func:`track_smoothness` is not in it, or tracks a leaf twice, or the
                state is a stack of several.
        """
        states = _smoothness_states(opt_state)
        paths = [tuple(leaf_paths(state.remembered.params)) for state in states]
        repeated = [path for path, n in collections.Counter(sum(paths, ())).items() if n > 1]
        if repeated:
            raise ValueError(
                f"Leaf '{repeated[0]}' is tracked twice: keep a record for each tracker, and hand "
                "it that tracker's part of the state."
            )
        for state, of_state in zip(states, paths, strict=True):
            arrays = (*state.sample, state.leaf_of_matrix)
            self._unread.append((of_state, [jnp.copy(array) for array in arrays]))
        while len(self._unread) > _LAG * len(states):
            self._read(*self._unread.popleft())

    def samples(self) -> dict[str, SmoothnessSamples]:
        """All samples, by leaf path; a leaf that never had one has empty arrays."""
        while self._unread:
            self._read(*self._unread.popleft())
        samples = {}
        for path in sorted(self._samples, key=_in_reading_order):
            columns = np.array(self._samples[path], float).reshape(-1, 3).T
            samples[path] = SmoothnessSamples(columns[0].astype(int), columns[1], columns[2])
        return samples

    def _read(self, paths: tuple[str, ...], arrays: list[jax.Array]) -> None:
        for path in paths:
            self._samples.setdefault(path, [])
        step, dual_norms, smoothness, leaf_of_matrix = map(np.asarray, arrays)
        if step == self._last_steps.get(paths, -1):
            return
        self._last_steps[paths] = int(step)
        for i in np.flatnonzero((smoothness >= 0) & np.isfinite(dual_norms + smoothness)):
            entry = int(step), float(dual_norms[i]), float(smoothness[i])
            self._samples[paths[leaf_of_matrix[i]]].append(entry)


def _in_reading_order(path: str) -> list[str | int]:
    """A key that sorts `layer_2` before `layer_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _smoothness_states(opt_state: Any) -> list[SmoothnessState]:
    """Every state of a tracker; an error if there is none that can be read."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, SmoothnessState))
    states = [node for node in nodes if isinstance(node, SmoothnessState)]
    if not states:
        raise ValueError(
            "There is no SmoothnessState in this optimizer state: put dm.planning.track_smoothness "
            "first into the chain."
        )
    for state in states:
        if isinstance(state.sample.step, Tracer):
            raise TypeError("A SmoothnessRecord is on the host: call append outside of jax.jit.")
        if state.sample.step.ndim:
            raise ValueError(
                f"This optimizer state is a stack of {len(state.sample.step)}: append one at a "
                "time, such as jax.tree.map(lambda leaf: leaf[i], opt_state)."
            )
    return states


class LeafSmoothness(NamedTuple):
    """What was fitted to one leaf."""

    num_samples: int
    """The number of samples."""
    l0: float
    """L⁰, in the units ‖gradient‖* / ‖parameter‖."""
    l1: float
    """L¹, in the units 1 / ‖parameter‖."""
    underestimated: float
    """The share of samples above the line."""
    relative_error: float
    """Root mean square of L̂ - (L⁰ + L¹‖g‖*), in that of L̂."""
    median_dual_norm: float
    """The median of the samples' ‖g‖*."""

    @property
    def radius(self) -> float:
        """‖g‖* / (L⁰ + L¹‖g‖*) at the median ‖g‖*; infinite where both constants are zero."""
        bound = self.l0 + self.l1 * self.median_dual_norm
        return self.median_dual_norm / bound if bound > 0 else float("inf")


@dataclasses.dataclass(frozen=True)
class SmoothnessFit:
    """L⁰ and L¹ of each leaf, as :func:`fit_smoothness` finds them; `print` shows a table."""

    leaves: dict[str, LeafSmoothness]
    """What was fitted, by leaf path."""

    def radii(self) -> dict[str, AdaptiveRadius]:
        """The :func:`adaptive_radius` of each leaf: what the argument `radius` of LMOs takes.

        Raises:
            ValueError: If both constants of a leaf are zero, which would make its radius infinite.
        """
        for path, leaf in self.leaves.items():
            if leaf.l0 == 0 and leaf.l1 == 0:
                raise ValueError(
                    f"The gradient of leaf '{path}' never changed: L⁰ = L¹ = 0 would make its "
                    "radius infinite. Leave it out of the samples, and give it a radius by hand."
                )
        return {f"/{path}": adaptive_radius(leaf.l0, leaf.l1) for path, leaf in self.leaves.items()}

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("leaf", "samples", "L⁰", "L¹", "above", "error", "radius")]
        for path, leaf in self.leaves.items():
            numbers = [f"{number:.3g}" for number in (leaf.l0, leaf.l1, leaf.radius)]
            shares = [f"{share:.0%}" for share in (leaf.underestimated, leaf.relative_error)]
            table.append((path, str(leaf.num_samples), *numbers[:2], *shares, numbers[2]))
        return format_table(table, "<>>>>>>")


def fit_smoothness(
    samples: Mapping[str, SmoothnessSamples] | SmoothnessRecord, *, hinge: float = 5.0
) -> SmoothnessFit:
    r"""Fits L⁰ and L¹ of each leaf to its samples: a line that few of them lie above.

    .. math::
        \min_{L^0, L^1 \ge 0} \sum_k r_k^2 + \text{hinge} \sum_k \max(0, r_k)^2, \qquad
        r_k = \hat L_k - (L^0 + L^1 \|g_k\|_*)

    It is convex, and quadratic wherever no residual changes its sign: solved to the last digits by
    Newton's method, with non-negative least squares for its quadratics.

    The constants are those of the steps that were measured. Fit samples without noise: those from
    different batches predict hardly more than the radius of the run itself.

    Args:
        samples: A record, or from leaf path to samples, as :meth:`SmoothnessRecord.samples` gives
            them.
        hinge: The extra weight of underestimates, at least 0; they make steps too long. With more
            of it the line becomes an upper bound, and the steps shorter.

    Returns:
        A :class:`SmoothnessFit`: `print(fit)` is a table, with the share of samples above the line,
        the relative root-mean-square error, and the radius at the median ‖g‖*; `fit.radii()` goes
        into an LMO; `fit.leaves[path].l0` and `.l1` are numbers.

    Raises:
        ValueError: If there are no leaves, or a leaf has less than two samples, or one that is not
            finite or negative, naming it; or if `hinge` is negative.

    Examples:
        >>> import numpy as np, dropmuon_jax as dm
        >>> x = np.linspace(1.0, 3.0, 9)
        >>> samples = dm.planning.SmoothnessSamples(np.arange(9), x, 4.0 + 2.0 * x)
        >>> fit = dm.planning.fit_smoothness({"w": samples})
        >>> print(fit)
        leaf  samples  L⁰  L¹  above  error  radius
        w           9   4   2     0%     0%    0.25
        >>> lmo = dm.norm_lmo(dm.norms.sign_norm(), fit.radii())

    References:
        Riabinin et al., *Gluon: Making Muon & Scion Great Again!*, 2025, arXiv:2505.13416: the
        objective, and the weight 5, are those of their code.
    """
    check_nonnegative("hinge", hinge)
    if isinstance(samples, SmoothnessRecord):
        samples = samples.samples()
    if not samples:
        raise ValueError("samples is empty. Call record.append(opt_state) in each step.")
    return SmoothnessFit({path: _fit_leaf(path, leaf, hinge) for path, leaf in samples.items()})


def _fit_leaf(path: str, samples: SmoothnessSamples, hinge: float) -> LeafSmoothness:
    dual_norms = np.asarray(samples.dual_norms, np.float64)
    smoothness = np.asarray(samples.smoothness, np.float64)
    if dual_norms.shape != smoothness.shape or dual_norms.ndim != 1:
        raise ValueError(
            f"The samples of leaf '{path}' must be two vectors of one length, got shapes "
            f"{dual_norms.shape} and {smoothness.shape}."
        )
    if len(dual_norms) < 2:
        raise ValueError(
            f"Leaf '{path}' has {len(dual_norms)} samples, and its two constants need at least 2: "
            "run on, sample more often, or leave it out. A leaf has a sample where it was active "
            "in two steps on end, and moved."
        )
    for name, values in (("dual_norms", dual_norms), ("smoothness", smoothness)):
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name} of leaf '{path}' must be finite and not negative.")
    l0, l1 = _fit_line(dual_norms, smoothness, hinge)
    residuals = smoothness - (l0 + l1 * dual_norms)
    size = np.sqrt(np.mean(smoothness**2))
    # What lies on the line lies above it by rounding, half of the time.
    return LeafSmoothness(
        num_samples=len(dual_norms),
        l0=l0,
        l1=l1,
        underestimated=float(np.mean(residuals > 1e-6 * size)),
        relative_error=float(np.sqrt(np.mean(residuals**2)) / (size or 1.0)),
        median_dual_norm=float(np.median(dual_norms)),
    )


def _fit_line(x: Vector, y: Vector, hinge: float) -> tuple[float, float]:
    """The minimiser over a, b ≥ 0 of Σ r² + hinge Σ max(0, r)², r = y - (a + bx)."""
    from scipy import optimize  # takes a second, and only a fit needs it

    scale_x, scale_y = x.max() or 1.0, y.max() or 1.0  # for any units
    columns = np.stack([np.ones_like(x), x / scale_x], axis=1)
    y = y / scale_y

    def weights(line: np.ndarray) -> np.ndarray:
        return np.where(y > columns @ line, 1 + hinge, 1)

    def loss(line: np.ndarray) -> float:
        return float(weights(line) @ (y - columns @ line) ** 2)

    line = np.zeros(2)
    for _ in range(100):
        # The quadratic that the loss is around this line. Its minimiser lies downhill, and is the
        # loss's if no residual changes sign on the way.
        root = np.sqrt(weights(line))
        target, _ = optimize.nnls(root[:, None] * columns, root * y)
        step = 1.0
        while step > 1e-9 and loss(line + step * (target - line)) >= loss(line):
            step /= 2
        if step <= 1e-9:
            break
        line = line + step * (target - line)
    return float(line[0] * scale_y), float(line[1] * scale_y / scale_x)
