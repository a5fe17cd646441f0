"""The algorithms of other papers in float64 NumPy, one layer at a time.

Drop-Muon's own is `dropmuon_jax.algorithm`, which is NumPy too; nothing else of ours is imported.
"""

import numpy as np

from dropmuon_jax.algorithm import polar_factor

# As published: Muon (Jordan et al., 2024), Dion (You, 2025), Polar Express (Amsel et al., 2025),
# Turbo-Muon (Boissin et al., 2025).
MUON = [(3.4445, -4.7750, 2.0315)]
DION = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
TURBO_MUON = [
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
]
# Name: rows, the norm to divide by first, and the steps that are published.
COEFFICIENTS = {
    "muon": (MUON, "frobenius", 5),
    "dion": (DION, "frobenius", 5),
    "polar_express": (POLAR_EXPRESS, "schatten", 5),
    "turbo_muon": (TURBO_MUON, "aol", 4),
}


def published_rows(name, num_steps=None):
    """The rows of a named set; the last is repeated."""
    rows, _, default = COEFFICIENTS[name]
    return [rows[min(step, len(rows) - 1)] for step in range(num_steps or default)]


def polynomial_polar_factor(matrix, rows, start="frobenius"):
    """X ← aX + bXXᵀX + c(XXᵀ)²X for each row (a, b, c), from X = matrix / its norm."""
    if matrix.shape[0] > matrix.shape[1]:
        return polynomial_polar_factor(matrix.T, rows, start).T
    gram = matrix @ matrix.T
    norms = {
        "frobenius": np.linalg.norm(matrix),
        "schatten": np.linalg.norm(gram) ** 0.5,
        "aol": np.abs(gram).sum(axis=1, keepdims=True) ** 0.5,  # one for each row
    }
    x = matrix / norms[start]
    for a, b, c in rows:
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def pytorch_layout(kernel):
    """A Flax kernel (*window, in, out) as PyTorch keeps it, (out, in, *window)."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def flax_layout(weight):
    """The way back."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def scion_lmo(role, g):
    """Scion's `lmo` of a gradient in PyTorch's layout (arXiv:2502.07529 and its repository)."""
    if role == "bias":  # BiasRMS
        return g / np.sqrt(np.mean(g**2))
    d_out, d_in, *window = g.shape
    if role == "hidden":  # Spectral and SpectralConv
        return (
            (d_out / d_in) ** 0.5
            / np.prod(window)
            * polar_factor(g.reshape(d_out, -1)).reshape(g.shape)
        )
    if role == "head":  # Sign
        return np.sign(g) / d_in
    # ColNorm: each column of the matrix (features, tokens).
    return g / (np.sqrt(np.sum(g**2, axis=0, keepdims=True)) / np.sqrt(d_out))


class Scion:
    """Algorithms 1 and 2 of Scion (arXiv:2502.07529); `momentum` is its α, of the new gradient.

    Gluon (arXiv:2505.13416) is the unconstrained one with α and γ that change from step to step.
    """

    def __init__(self, params, roles, radii, *, constrained):
        self.params = {name: self._layout(roles[name], x) for name, x in params.items()}
        self.average = {name: np.zeros_like(x) for name, x in self.params.items()}
        self.roles = roles
        self.radii = radii
        self.constrained = constrained

    @staticmethod
    def _layout(role, x):
        x = np.asarray(x, np.float64)
        return x if role == "bias" else pytorch_layout(x)

    def step(self, grads, *, lr, momentum):
        """One step with gradients in Flax's layout."""
        for name, role in self.roles.items():
            gradient = self._layout(role, grads[name])
            self.average[name] = (1 - momentum) * self.average[name] + momentum * gradient
            update = self.radii[role] * scion_lmo(role, self.average[name])
            if self.constrained:
                self.params[name] = (1 - lr) * self.params[name]
            self.params[name] = self.params[name] - lr * update

    def flax_params(self):
        """The parameters in Flax's layout."""
        return {
            name: x if self.roles[name] == "bias" else flax_layout(x)
            for name, x in self.params.items()
        }


def mvr_average(variant, g, g_prev, m, estimator, *, decay, q):
    """M and G of MVR-1, MVR-2 and MVR-3 (arXiv:2512.16598); g and g_prev are of one batch."""
    if variant == 1:
        return g + decay * (m - g_prev), None
    estimator = g + (1 - q) * (estimator - g_prev)
    m = decay * m + (1 - decay) * estimator
    if variant == 3:
        m = m + decay * (g - g_prev)
    return m, estimator


class DropMVR:
    """Steps of radius lr · UVᵀ(M) of the layers that are drawn, with M by MVR.

    A layer's previous parameters are those before its own last step; `on_reactivate` says what
    becomes of M and G after k - j > 1 steps.
    """

    def __init__(self, params, variant, *, on_reactivate, start):
        self.params = {name: np.asarray(x, np.float64) for name, x in params.items()}
        self.before = dict(self.params)
        self.last_step = dict.fromkeys(params, None)
        self.averages = {name: (np.zeros_like(x),) * 2 for name, x in self.params.items()}
        self.variant = variant
        self.on_reactivate = on_reactivate
        self.start = start

    def step(self, k, active, gradient, *, lr, decay, q):
        """Step k, of the layers named in `active`; `gradient` is a function of all parameters."""
        g = gradient(self.params)
        point = {name: (self.before if name in active else self.params)[name] for name in g}
        g_prev = gradient(point)
        for name in active:
            past, m_and_g = (decay, q), self.averages[name]
            other = g_prev[name]
            last_step = self.last_step[name]
            was_inactive = last_step is not None and k - last_step > 1
            if self.on_reactivate == "decay" and was_inactive:
                power = k - self.last_step[name]
                past = decay**power, 1 - (1 - q) ** power
            if self.last_step[name] is None and self.start == "zero":
                other = g[name]
            restart = self.last_step[name] is None and self.start == "gradient"
            if restart or (was_inactive and self.on_reactivate == "restart"):
                self.averages[name] = g[name], g[name]
            else:
                self.averages[name] = mvr_average(
                    self.variant, g[name], other, *m_and_g, decay=past[0], q=past[1]
                )
            self.last_step[name] = k
        self.before |= {name: self.params[name] for name in active}
        for name in active:
            self.params[name] = self.params[name] - lr * polar_factor(self.averages[name][0])


def mars_average(g, g_last, m, *, decay, gamma):
    """M of MARS-M (arXiv:2411.10438 and its code), clipped to norm 1."""
    c = g + gamma * decay / (1 - decay) * (g - g_last)
    return decay * m + (1 - decay) * c / max(1, np.linalg.norm(c))


def epoch_shift(step, num_steps, num_layers, alpha):
    """p_s ∝ exp(α[(1 - τ)(b - 1 - s) + τs])."""
    tau = min(step / num_steps, 1)
    s = np.arange(num_layers)
    weights = np.exp(alpha * ((1 - tau) * (num_layers - 1 - s) + tau * s))
    return weights / weights.sum()
