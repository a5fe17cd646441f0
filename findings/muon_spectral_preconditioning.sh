#!/usr/bin/env bash
# The singular values of a step of optax.contrib.muon with preconditioning="spectral", which divides
# by the spectral norm in the place of the larger Frobenius norm, with the default polynomial.
#
# Guess: nearer to 1 than with "frobenius", as the documentation says ("better orthogonalization
# quality"), since every singular value starts nearer to 1.
# Seen: further away. Muon's polynomial takes 1 to 0.70, and values well below to 0.7 … 1.2: of a
# normal 8 × 5 matrix the mean distance from 1 is 0.25 in place of 0.11, and the step is a quarter
# shorter.
exec "$(dirname "$0")/python_with" jax==0.10.2 optax==0.2.8 <<'PY'
import jax
import jax.numpy as jnp
import optax

params, seen = {"w": jax.random.normal(jax.random.key(0), (8, 5))}, {}
for preconditioning in ("frobenius", "spectral"):
    tx = optax.contrib.muon(1.0, preconditioning=preconditioning)
    updates, _ = tx.update(params, tx.init(params), params)
    seen[preconditioning] = jnp.linalg.svd(updates["w"], compute_uv=False)
print(seen)
distances = {name: float(abs(values - 1).mean()) for name, values in seen.items()}
print(distances)
assert distances["spectral"] > 2 * distances["frobenius"]
assert 0.6 < seen["spectral"].mean() / seen["frobenius"].mean() < 0.85
PY
