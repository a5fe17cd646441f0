#!/usr/bin/env bash
# How large the state of `optax.partition` is as a tree, with a group for each layer, as layer-wise
# learning rates have it.
#
# Guess: its nodes grow with the parameters, as its arrays do.
# Seen: with optax 0.2.8 every group keeps a node for every parameter, masked where it is another's:
# 48 layers of 16 parameters have 1,584 arrays in 78,674 nodes, one Adam for all 1,537 in 1,638.
# Every call of a jitted step takes this tree apart and puts it together again. Labels for whole
# layers, as a prefix of the parameters, leave 6,482.
exec "$(dirname "$0")/python_with" jax==0.10.2 optax==0.2.8 <<'PY'
import time

import jax
import jax.numpy as jnp
import optax

LAYERS, PARAMETERS = 48, 16
params = {f"{i}": {f"{j}": jnp.ones(()) for j in range(PARAMETERS)} for i in range(LAYERS)}
labels = jax.tree.map_with_path(lambda path, _: path[0].key, params)
prefix = {name: name for name in params}
adams = {name: optax.adam(1e-3 * 0.9 ** int(name)) for name in params}


def size(tx):
    leaves, tree = jax.tree.flatten(tx.init(params))
    start = time.perf_counter()
    for _ in range(3):
        tree.unflatten(tree.flatten_up_to(tree.unflatten(leaves)))
    return len(leaves), tree.num_nodes, (time.perf_counter() - start) / 3


found = {
    "one Adam": size(optax.adam(1e-3)),
    "labels of leaves": size(optax.partition(adams, labels)),
    "labels of layers": size(optax.partition(adams, prefix)),
}
for name, (leaves, nodes, seconds) in found.items():
    print(f"{name}: {leaves} arrays, {nodes} nodes, {1e3 * seconds:.1f} ms to take apart and join")
assert found["labels of leaves"][0] < 1.1 * found["one Adam"][0]
assert found["labels of leaves"][1] > 40 * found["one Adam"][1]
assert found["labels of layers"][1] < 0.1 * found["labels of leaves"][1]
PY
