#!/usr/bin/env bash
# optax.contrib.muon of complex matrices, whose iteration takes conjugates.
#
# Guess: what works with preconditioning="frobenius" works with "schatten", which is another norm.
# Seen: "frobenius" gives singular values near 1, "schatten" NaN in every entry: its first step
# has no conjugate, as the others have.
exec "$(dirname "$0")/python_with" jax==0.10.2 optax==0.2.8 <<'PY'
import jax
import jax.numpy as jnp
import optax

real, imaginary = jax.random.normal(jax.random.key(0), (2, 8, 5))
params, seen = {"w": real + 1j * imaginary}, {}
for preconditioning in ("frobenius", "schatten"):
    tx = optax.contrib.muon(1.0, preconditioning=preconditioning)
    updates, _ = tx.update(params, tx.init(params), params)
    seen[preconditioning] = jnp.linalg.svd(updates["w"], compute_uv=False)
print(seen)
assert (abs(seen["frobenius"] - 1) < 0.5).all()
assert jnp.isnan(seen["schatten"]).all()
PY
