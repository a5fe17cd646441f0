"""The algorithms of other papers in float64 NumPy, one layer at a time.

Drop-Muon's own is `dropmuon_jax.algorithm`, which is NumPy too; nothing of ours is imported.
"""

import numpy as np

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
    """X ← aX + bXXᵀX + c(XXᵀ)²X + … for each row (a, b, c, …), from X = matrix / its norm."""
    if matrix.shape[0] > matrix.shape[1]:
        return polynomial_polar_factor(matrix.T, rows, start).T
    gram = matrix @ matrix.T
    norms = {
        "frobenius": np.linalg.norm(matrix),
        "schatten": np.linalg.norm(gram) ** 0.5,
        "aol": np.abs(gram).sum(axis=1, keepdims=True) ** 0.5,  # one for each row
    }
    x = matrix / norms[start]
    for row in rows:
        powers = (np.linalg.matrix_power(x @ x.T, i) @ x for i in range(len(row)))
        x = sum(c * power for c, power in zip(row, powers, strict=True))
    return x


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
    """Steps lr · M of the layers that are drawn, with M by MVR.

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
            self.params[name] = self.params[name] - lr * self.averages[name][0]


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


def keep_largest(x, k):
    """The k largest entries; of equal ones the first."""
    order = np.argsort(-np.abs(x), axis=None, kind="stable")[:k]
    kept = np.zeros(x.size)
    kept[order] = x.reshape(-1)[order]
    return kept.reshape(x.shape)


def keep_longest_rows(x, k):
    """Of a kernel (in, out), whose rows are the papers' columns."""
    order = np.argsort(-np.linalg.norm(x, axis=1), kind="stable")[:k]
    kept = np.zeros_like(x)
    kept[order] = x[order]
    return kept


def keep_largest_singular_values(x, k):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vt[:k]


def project_on_drawn_span(x, omega):
    """PPᵀX, of orthonormal P that span XΩ."""
    p, _ = np.linalg.qr(x @ omega)
    return p @ (p.T @ x)


def to_power_of_two(x, uniform):
    """±2^e or ±2^(e+1), the latter if |x| / 2^e - 1 + u ≥ 1; with u = 1/2 the nearest."""
    _, exponent = np.frexp(x)  # |x| = m 2^exponent with m in [1/2, 1)
    lower = np.ldexp(1.0, exponent - 1)
    rounded = np.where(np.abs(x) / lower - 1 + uniform >= 1, 2 * lower, lower)
    return np.where(x == 0, 0, np.sign(x) * rounded)


def scaled_signs(x):
    return np.mean(np.abs(x)) * np.where(x < 0, -1, 1)


class EF21Muon:
    """EF21-Muon (arXiv:2510.00643, as secondary sources tell it), with layers that are left out.

    `compress(name, x, step, worker)` and `compress_model(name, x, step)` are C_j and C. A step
    takes gradients at W: M_j, G_j and G, then X, then W.
    """

    def __init__(self, params, num_workers, compress, compress_model, *, direction):
        self.x = {name: np.array(p, np.float64) for name, p in params.items()}
        self.w = {name: p.copy() for name, p in self.x.items()}
        self.m = [
            {name: np.zeros_like(p) for name, p in self.x.items()} for _ in range(num_workers)
        ]
        self.g = [
            {name: np.zeros_like(p) for name, p in self.x.items()} for _ in range(num_workers)
        ]
        self.mean = {name: np.zeros_like(p) for name, p in self.x.items()}
        self.compress, self.compress_model = compress, compress_model
        self.direction = direction

    def step(self, k, active, gradients, *, radius, decay):
        """Step k of the layers named in `active`; `gradients` are functions of W, one a worker."""
        at = [gradient(self.w) for gradient in gradients]
        for name in active:
            sent = []
            for j, gradient in enumerate(at):
                self.m[j][name] = decay * self.m[j][name] + (1 - decay) * gradient[name]
                new = self.compress(name, self.m[j][name] - self.g[j][name], k, j)
                self.g[j][name] = self.g[j][name] + new
                sent.append(new)
            self.mean[name] = self.mean[name] + sum(sent) / len(sent)
            self.x[name] = self.x[name] - radius * self.direction(self.mean[name])
            news = self.compress_model(name, self.x[name] - self.w[name], k)
            self.w[name] = self.w[name] + news


class NormEC:
    """α-NormEC (arXiv:2502.13482, as secondary sources tell it); `noise(k, i)` is z_i."""

    def __init__(self, x, num_clients, *, alpha, beta, gamma, normalize, noise=lambda k, i: 0.0):
        self.x = np.array(x, np.float64)
        self.g = [np.zeros_like(self.x) for _ in range(num_clients)]
        self.estimate = np.zeros_like(self.x)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.normalize, self.noise = normalize, noise

    def step(self, k, gradients):
        messages = []
        for i, gradient in enumerate(gradients):
            error = gradient(self.x) - self.g[i]
            delta = error / (self.alpha + np.linalg.norm(error))
            self.g[i] = self.g[i] + self.beta * delta
            messages.append(delta + self.noise(k, i))
        self.estimate = self.estimate + self.beta * sum(messages) / len(messages)
        length = np.linalg.norm(self.estimate) if self.normalize else 1
        self.x = self.x - self.gamma * self.estimate / length
