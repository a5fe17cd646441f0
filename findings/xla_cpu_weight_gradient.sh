#!/usr/bin/env bash
# What the product of a weight gradient, transposed inputs times gradients, costs on a CPU.
#
# Guess: as much as the product of the forward pass, which has as many multiplications.
# Seen: for 64 examples, 1024 inputs and 4 outputs, many times as much, jax 0.10.2. Where a barrier
# makes XLA copy the transposed matrix first, copy and product take a fraction of that.
exec "$(dirname "$0")/python_with" jax==0.10.2 <<'PY'
import time

import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 1024), (1024, 4), (64, 4)))
ROUNDS = 500
FORMS = {
    "forward, x @ w": lambda x: x @ w,
    "gradient, x.T @ g": lambda x: x.T @ g,
    "gradient of a copy": lambda x: jax.lax.optimization_barrier(x.T) @ g,
}


def repeated(product):
    def turn(x, _):
        return x + 1e-30 * product(x).sum(), None

    return jax.jit(lambda x: jax.lax.scan(turn, x, None, length=ROUNDS)[0])


programs = {name: repeated(product) for name, product in FORMS.items()}
seconds = {name: [] for name in FORMS}
for _ in range(9):
    for name, program in programs.items():
        start = time.perf_counter()
        program(x).block_until_ready()
        seconds[name].append((time.perf_counter() - start) / ROUNDS)
least = {name: min(of) for name, of in seconds.items()}
for name, of in least.items():
    print(f"{name}: {of / least['forward, x @ w']:.1f} × the forward product")
assert least["gradient, x.T @ g"] > 3 * least["forward, x @ w"]
assert least["gradient, x.T @ g"] > 3 * least["gradient of a copy"]
PY
