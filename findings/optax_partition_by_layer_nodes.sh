#!/usr/bin/env bash
# How large the state of `optax.partition` is as a tree, with a group for each layer, as layer-wise
# learning rates have it.
#
# Guess: its nodes grow with the parameters, as its arrays do.
# Seen: with optax 0.2.8 every group keeps a node for every parameter, masked where it is another's:
# 48 layers of 16 parameters have 2,350 arrays in 79,000 nodes, a flat Adam 1,537 arrays in 1,600.
# Every call of a jitted step takes this tree apart and puts it together again.
exec "$(dirname "$0")/python_with" jax==0.10.2 optax==0.2.8 <<'PY'
import time

import jax
import jax.numpy as jnp
import optax

LAYERS, PARAMETERS = 48, 16
params = {f"{i}": {f"{j}": jnp.ones(()) for j in range(PARAMETERS)} for i in range(LAYERS)}
labels = {name: name for name in params}  # a prefix of the tree
adams = {name: optax.adam(1e-3 * 0.9 ** int(name)) for name in params}


def size(tx):
    leaves, tree = jax.tree.flatten(tx.init(params))
    start = time.perf_counter()
    for _ in range(3):
        tree.unflatten(tree.flatten_up_to(tree.unflatten(leaves)))
    return len(leaves), tree.num_nodes, (time.perf_counter() - start) / 3


flat, by_layer = size(optax.adam(1e-3)), size(optax.partition(adams, labels))
for name, (leaves, nodes, seconds) in (("flat", flat), ("by layer", by_layer)):
    print(f"{name}: {leaves} arrays, {nodes} nodes, {1e3 * seconds:.1f} ms to take apart and join")
assert by_layer[0] < 2 * flat[0]
assert by_layer[1] > 30 * flat[1]
PY
