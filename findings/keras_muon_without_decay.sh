#!/usr/bin/env bash
# keras.optimizers.Muon(weight_decay=None), and a bias whose gradient is zero.
#
# Guess: nothing decays, as with None in Keras's other optimizers, and the bias stays.
# Seen: the bias shrinks by rate × 0.004. What Adam steps has a decay of its own,
# `adam_weight_decay`, which must be None as well.
exec "$(dirname "$0")/python_with" jax==0.10.2 keras==3.15.1 <<'PY'
import os

os.environ["KERAS_BACKEND"] = "jax"
import keras
import numpy as np

seen = {}
for name, options in {"weight_decay": {}, "both": {"adam_weight_decay": None}}.items():
    bias = keras.Variable(np.ones(5, np.float32), name="bias")
    tx = keras.optimizers.Muon(0.1, weight_decay=None, **options)
    tx.apply([np.zeros(5, np.float32)], [bias])
    seen[name] = float(bias.value[0])
print(seen)
assert abs(seen["weight_decay"] - 0.9996) < 1e-6
assert seen["both"] == 1
PY
