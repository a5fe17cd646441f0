"""How epoch-shift moves from full steps to the last layer over the epochs, for several α."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

import dropmuon_jax as dm
from panels import finish
from paper_study.presets import SCALES
from paper_study.settings import Settings
from plots import DEPTH_COLOURS


def probabilities(settings: Settings, alpha: float) -> np.ndarray:
    """Of every depth, in the middle of each epoch: (epochs, depths)."""
    num_epochs, num_layers = _sizes(settings)
    # A run of two steps an epoch, of which the odd ones are in the middle.
    distribution = dm.epoch_shift_depth(2 * num_epochs, alpha=alpha)
    middles = range(1, 2 * num_epochs, 2)
    return np.array([distribution.probabilities(step, num_layers) for step in middles])


def sampling_record(settings: Settings) -> dict[str, Any]:
    """As plain numbers."""
    return {
        "probability_of_depth_by_epoch": [
            {"alpha": alpha, "probabilities": probabilities(settings, alpha).tolist()}
            for alpha in settings.alphas
        ]
    }


def sampling_figure(settings: Settings) -> Figure:
    """A panel for each α."""
    num_epochs, num_layers = _sizes(settings)
    figure = Figure(figsize=(3.2 * len(settings.alphas) + 1.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(settings.alphas), sharey=True, squeeze=False)[0]
    epochs = np.arange(num_epochs) + 0.5
    for axes, alpha in zip(panels, settings.alphas, strict=True):
        for depth, of_depth in enumerate(probabilities(settings, alpha).T):
            # Thinner with the depth, so that equal ones show one behind the other.
            axes.plot(
                *(epochs, of_depth, "-o"),
                color=DEPTH_COLOURS[depth % len(DEPTH_COLOURS)],
                linewidth=0.9 * (num_layers - depth) + 0.6,
                markersize=3,
                label=f"depth {depth}",
            )
        axes.set_title(f"α = {alpha:g}")
        axes.set_xlabel("epoch")
        finish(axes)
    panels[0].set_ylim(bottom=0)  # of all, and once all are drawn: this also settles the top
    panels[0].set_ylabel("probability")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="0 = all layers")
    return figure


def _sizes(settings: Settings) -> tuple[int, int]:
    """Epochs and layers: the convolutions and the dense one."""
    preset = SCALES[settings.scale]
    return settings.epochs or preset["epochs"], len(settings.channels or preset["channels"]) + 1
