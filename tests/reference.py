"""The algorithms in float64 NumPy, one layer at a time, importing nothing of ours."""

import numpy as np


def polar_factor(matrix):
    """UVᵀ of a matrix UΣVᵀ, by SVD."""
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def polynomial_polar_factor(matrix, rows, safety):
    """X ← aX + bXXᵀX + c(XXᵀ)²X for each row (a, b, c), from X = matrix / (‖matrix‖_F · safety)."""
    x = matrix / (np.linalg.norm(matrix) * safety)
    for a, b, c in rows:
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


class DropMuon:
    """Algorithm 1 of Drop-Muon (arXiv:2510.02239) for matrices, in its LMO form.

    Convolution kernels (h, w, in, out) are matrices (h·w·in, out). The radius of a matrix is the
    learning rate times Muon's max(1, √(fan-out/fan-in)).
    """

    def __init__(self, params, learning_rate, decay, direction=polar_factor):
        self.params = {name: np.asarray(x, np.float64) for name, x in params.items()}
        self.momentum = {name: np.zeros_like(x) for name, x in self.params.items()}
        self.learning_rate = learning_rate
        self.decay = decay
        self.direction = direction

    def step(self, grads, active):
        """One step with the layers named in `active`."""
        for name in active:
            gradient = np.asarray(grads[name], np.float64)
            self.momentum[name] = self.decay * self.momentum[name] + (1 - self.decay) * gradient
            matrix = self.momentum[name].reshape(-1, gradient.shape[-1])
            fan_in, fan_out = matrix.shape
            radius = self.learning_rate * max(1, np.sqrt(fan_out / fan_in))
            step = radius * self.direction(matrix)
            self.params[name] = self.params[name] - step.reshape(gradient.shape)


def epoch_shift(step, num_steps, num_layers, alpha):
    """p_s ∝ exp(α[(1 - τ)(b - 1 - s) + τs])."""
    tau = min(step / num_steps, 1)
    s = np.arange(num_layers)
    weights = np.exp(alpha * ((1 - tau) * (num_layers - 1 - s) + tau * s))
    return weights / weights.sum()
