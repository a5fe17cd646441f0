"""The constants of (L⁰, L¹)-smoothness that fit a run's samples."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dropmuon_jax._checks import check_nonnegative
from dropmuon_jax._radii import AdaptiveRadius, adaptive_radius
from dropmuon_jax._smoothness._record import SmoothnessRecord, SmoothnessSamples

Samples = Float[np.ndarray, " samples"]


class LeafSmoothness(NamedTuple):
    """What was fitted to one leaf."""

    num_samples: int
    l0: float
    """L⁰, in the units ‖gradient‖* / ‖parameter‖."""
    l1: float
    """L¹, in the units 1 / ‖parameter‖."""
    underestimated: float
    """The share of samples above the line."""
    relative_error: float
    """Root mean square of L̂ - (L⁰ + L¹‖g‖*), in that of L̂."""
    median_dual_norm: float
    """Of the samples' ‖g‖*."""

    @property
    def radius(self) -> float:
        """‖g‖* / (L⁰ + L¹‖g‖*) at the median ‖g‖*; infinite where both constants are zero."""
        bound = self.l0 + self.l1 * self.median_dual_norm
        return self.median_dual_norm / bound if bound > 0 else float("inf")


@dataclasses.dataclass(frozen=True)
class SmoothnessFit:
    """L⁰ and L¹ of each leaf, as :func:`fit_smoothness` finds them; `print` shows a table.

    Attributes:
        leaves: From leaf path to what was fitted.
    """

    leaves: dict[str, LeafSmoothness]

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
        rows = [("leaf", "samples", "L⁰", "L¹", "above", "error", "radius")]
        for path, leaf in self.leaves.items():
            numbers = (f"{leaf.l0:.3g}", f"{leaf.l1:.3g}", f"{leaf.underestimated:.0%}")
            error = f"{leaf.relative_error:.0%}"
            rows.append((path, str(leaf.num_samples), *numbers, error, f"{leaf.radius:.3g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def fit_smoothness(
    samples: Mapping[str, SmoothnessSamples] | SmoothnessRecord, *, hinge: float = 5.0
) -> SmoothnessFit:
    r"""Fits L⁰ and L¹ of each leaf to its samples: a line that few of them lie above.

    .. math::
        \min_{L^0, L^1 \ge 0} \sum_k r_k^2 + \text{hinge} \sum_k \max(0, r_k)^2, \qquad
        r_k = \hat L_k - (L^0 + L^1 \|g_k\|_*)

    It is convex, and quadratic wherever no residual changes its sign: solved to the last digits by
    Newton's method, with non-negative least squares for its quadratics.

    **What it tells.** The constants are those of the steps that were measured: in
    `benchmarks/smoothness.py`, `--fit-radius 0.4` predicts radii several times as long as
    `--fit-radius 0.025`, and from different batches hardly more than that radius handed back: fit
    noiseless samples. At its default the
    radii of the fit to the same batches were within a factor of 2 of the best multiple, in final
    loss; those from exact gradients never raised the loss, nor did twice as long ones, and 8 times
    as long ones went furthest in 40 steps.

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
        >>> fit = dm.fit_smoothness({"w": dm.SmoothnessSamples(np.arange(9), x, 4.0 + 2.0 * x)})
        >>> print(fit)
        leaf  samples  L⁰  L¹  above  error  radius
        w           9   4   2     0%     0%    0.25
        >>> lmo = dm.sign_lmo(fit.radii())

    References:
        Riabinin et al., *Gluon: Making Muon & Scion Great Again!*, 2025, arXiv:2505.13416: the
        objective, and the weight 5, are those of their code.
    """
    check_nonnegative("hinge", hinge)
    if isinstance(samples, SmoothnessRecord):
        samples = samples.samples()
    if not samples:
        raise ValueError(
            "samples is empty; there is no leaf to fit. Call record.append(opt_state) in each step."
        )
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


def _fit_line(x: Samples, y: Samples, hinge: float) -> tuple[float, float]:
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
