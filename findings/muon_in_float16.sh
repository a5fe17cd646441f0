#!/usr/bin/env bash
# What optax.contrib.muon does with gradients in float16.
#
# Guess: a step whose length does not depend on the gradient's, as in float32, and no step where the
# gradient is zero.
# Seen: the norm is taken in float16 without scaling. Entries of 100 square to infinity, and the
# update is zero, which nothing tells. The eps of 1e-8 is 0 in float16, and a zero gradient is NaN.
exec "$(dirname "$0")/python_with" jax==0.10.2 optax==0.2.8 <<'PY'
import jax
import jax.numpy as jnp
import optax

tx, w = optax.contrib.muon(1.0), jax.random.normal(jax.random.key(0), (8, 5))
lengths = {}
for size in (1.0, 100.0, 0.0):
    for dtype in (jnp.float32, jnp.float16):
        params = {"w": (size * w).astype(dtype)}
        updates, _ = tx.update(params, tx.init(params), params)
        length = float(jnp.linalg.norm(updates["w"].astype(jnp.float32)))
        lengths[size, jnp.dtype(dtype).name] = length
print(lengths)
assert abs(lengths[1.0, "float16"] - lengths[1.0, "float32"]) < 0.1
assert lengths[100.0, "float32"] > 2 and lengths[100.0, "float16"] == 0
assert lengths[0.0, "float32"] == 0 and lengths[0.0, "float16"] != lengths[0.0, "float16"]
PY
