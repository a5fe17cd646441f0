#!/usr/bin/env bash
# A run with optax.contrib.muon is stopped, and goes on from its checkpoint with other `ns_coeffs`.
#
# Guess: the new coefficients count, as a new learning rate or beta does, since they are arguments.
# Seen: they lie in the state. The restored ones count, the argument has no effect, and nothing says
# so, since state and checkpoint fit.
exec "$(dirname "$0")/python_with" jax==0.10.2 optax==0.2.8 orbax-checkpoint==0.12.8 <<'PY'
import pathlib

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

params = {"w": jax.random.normal(jax.random.key(0), (8, 5))}
old = optax.contrib.muon(1.0)
new = optax.contrib.muon(1.0, ns_coeffs=(2.0, -1.5, 0.5))
path = pathlib.Path("checkpoint").absolute()
checkpointer = ocp.StandardCheckpointer()
checkpointer.save(path, old.init(params))
checkpointer.wait_until_finished()
restored = checkpointer.restore(path, jax.eval_shape(new.init, params))


def length(tx, state):
    return float(jnp.linalg.norm(tx.update(params, state, params)[0]["w"]))


seen = length(old, old.init(params)), length(new, new.init(params)), length(new, restored)
print("old, new, new from the checkpoint of old:", seen)
assert abs(seen[0] - seen[1]) > 0.01
assert abs(seen[0] - seen[2]) < 1e-5
PY
