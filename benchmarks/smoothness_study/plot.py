"""Pictures of the smoothness along a run."""

import math

from matplotlib.figure import Figure

import dropmuon_jax as dm
from smoothness_study.training import Samples

_MOST_COLUMNS = 4


def plot_smoothness(samples: Samples, fit: dm.planning.SmoothnessFit) -> Figure:
    """Draws L̂ against ‖g‖*, a panel for each leaf, from early steps (dark) to late ones (light).

    With the lines L⁰ + L¹‖g‖* of the fit, of the leaves that it has.
    """
    num_columns = min(_MOST_COLUMNS, len(samples))
    num_rows = math.ceil(len(samples) / num_columns)
    figure = Figure(figsize=(3.2 * num_columns, 2.6 * num_rows), layout="constrained")
    last_step = max(of_leaf.steps.max(initial=1) for of_leaf in samples.values())
    for i, (path, of_leaf) in enumerate(samples.items()):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        axes.scatter(
            of_leaf.dual_norms, of_leaf.smoothness, s=9, c=of_leaf.steps, vmin=0, vmax=last_step
        )
        if path in fit.leaves:
            l0, l1 = fit.leaves[path].l0, fit.leaves[path].l1
            end = of_leaf.dual_norms.max(initial=0)
            label = f"{l0:.3g} + {l1:.3g} ‖g‖*"
            axes.plot([0, end], [l0, l0 + l1 * end], color="#D55E00", label=label)
            axes.legend(fontsize="small")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_title(path, fontsize="medium")
        axes.grid(alpha=0.3)
    figure.supxlabel("‖g‖* (dark: early steps, light: late ones)", fontsize="medium")
    figure.supylabel("L̂", fontsize="medium")
    return figure
