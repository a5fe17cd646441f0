#!/usr/bin/env bash
# keras.optimizers.Muon, whose `exclude_embeddings=True` sends embeddings to Adam, on dense layers.
#
# Guess: it is the layers of class Embedding that are excluded, and both kernels take Muon's steps.
# Seen: it is every variable with "embedding" in its path. A dense layer that is called
# "embedding_projection" takes Adam's.
exec "$(dirname "$0")/python_with" jax==0.10.2 keras==3.15.1 <<'PY'
import os

os.environ["KERAS_BACKEND"] = "jax"
import keras

seen = {}
for name in ("projection", "embedding_projection"):
    model = keras.Sequential([keras.layers.Dense(5, name=name)])
    model.build((None, 8))
    tx = keras.optimizers.Muon(0.1)
    tx.build(model.trainable_variables)
    kernel = model.layers[0].kernel
    # Adam has two averages of a variable, and Muon one.
    seen[name] = sum(variable.shape == kernel.shape for variable in tx.variables)
print(seen)
assert seen == {"projection": 1, "embedding_projection": 2}
PY
