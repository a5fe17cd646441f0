#!/usr/bin/env bash
# optax.contrib.muon(adaptive=True), which scales a step by the gradient's dual norm, on two
# matrices in one array, of which the second is three times the first.
#
# Guess: each matrix is scaled by its own dual norm, as it is orthogonalized on its own: steps of
# length 1 : 3, the first as long as that of the matrix alone.
# Seen: both are scaled by the sum of the two dual norms. The steps are equally long, and four
# times that of the first matrix alone.
exec "$(dirname "$0")/python_with" jax==0.10.2 optax==0.2.8 <<'PY'
import jax
import jax.numpy as jnp
import optax

w = jax.random.normal(jax.random.key(0), (8, 5))
axes = {"w": optax.contrib.MuonDimensionNumbers(1, 2)}


def lengths(params, **options):
    tx = optax.contrib.muon(1.0, adaptive=True, **options)
    updates, _ = tx.update(params, tx.init(params), params)
    return jnp.linalg.norm(updates["w"], axis=(-2, -1))


alone = lengths({"w": w})
both = lengths({"w": jnp.stack([w, 3 * w])}, muon_weight_dimension_numbers=axes)
print(alone, both)
assert jnp.allclose(both[0], both[1], rtol=1e-3)
assert jnp.allclose(both[0], 4 * alone, rtol=1e-3)
PY
