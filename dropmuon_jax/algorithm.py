"""Algorithm 1 of Drop-Muon in NumPy, one layer at a time: to be read beside the paper.

The package computes this with many layers at once, on accelerators, and without the gradients that
nobody needs; its tests compare the two.

    Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
    arXiv:2510.02239.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Matrix = np.ndarray


def polar_factor(matrix: Matrix) -> Matrix:
    """UVᵀ of a matrix UΣVᵀ: -UVᵀ minimises ⟨M, Z⟩ over the unit ball of the spectral norm."""
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def drop_muon(
    params: Sequence[Matrix],
    gradients: Callable[[list[Matrix], int], Sequence[Matrix]],
    active: Iterable[Iterable[int]],
    *,
    radius: float,
    decay: float,
    direction: Callable[[Matrix], Matrix] = polar_factor,
) -> list[Matrix]:
    """The parameters X_0, …, X_{b-1} of b layers after a step for each drawn set of layers.

    Args:
        params: X of each layer, from the input to the output.
        gradients: From parameters and the number of a step to the gradient of each layer.
        active: The layers S that each step updates: {s, …, b - 1} for a drawn depth s.
        radius: t, the size of the ball in which each layer steps.
        decay: The weight of the past; the paper's β, the weight of the new gradient, is 1 - decay.
        direction: D(M), the element of the unit ball with the largest ⟨M, D⟩.

    Examples:
        >>> import numpy as np
        >>> params = [np.zeros((2, 2)), np.zeros((2, 2))]
        >>> stem, head = drop_muon(
        ...     params, lambda x, step: [np.eye(2)] * 2, [{1}, {0, 1}], radius=0.5, decay=0.9
        ... )
        >>> print(stem.diagonal(), head.diagonal())
        [-0.5 -0.5] [-1. -1.]
    """
    x = [np.array(layer, np.float64) for layer in params]
    m = [np.zeros_like(layer) for layer in x]
    for step, layers in enumerate(active):
        gradient = gradients(x, step)
        for i in layers:  # the others stay as they are, momentum included
            m[i] = decay * m[i] + (1 - decay) * gradient[i]
            x[i] = x[i] - radius * direction(m[i])  # LMO over the ball of radius t around X
    return x
