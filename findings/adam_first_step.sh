#!/usr/bin/env bash
# How long the first step of Optax's Adam is.
#
# Guess: the learning rate, to the last digits of float32, whatever b2 is: m̂/√v̂ is ±1.
# Seen: 1 - b2ᵗ is taken in float32, where 1 - 0.99999 has two digits less. The first step is
# 1.0007 × the rate at b2 = 0.99999 and 1.0066 × at 0.999999, and 0.999993 × at 0.999.
exec "$(dirname "$0")/python_with" jax==0.10.2 optax==0.2.8 <<'PY'
import jax.numpy as jnp
import optax

seen = {}
for b2 in (0.95, 0.999, 0.99999, 0.999999):
    tx = optax.scale_by_adam(b2=b2, eps=0.0)
    updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    seen[b2] = float(updates[0])
print(seen)
assert abs(seen[0.95] - 1) < 1e-6
assert abs(seen[0.999] - 1) > 5e-6
assert 5e-4 < seen[0.99999] - 1 < 1e-3
assert 5e-3 < seen[0.999999] - 1 < 1e-2
PY
