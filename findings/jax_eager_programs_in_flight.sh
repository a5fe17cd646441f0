#!/usr/bin/env bash
# How far Python may be ahead of a device.
#
# Guess: as far as it likes, since JAX dispatches asynchronously and every operation returns at once.
# Seen: 32 programs may be in flight on a device. Outside of `jax.jit` every operation is a program,
# so the 32nd that waits for a value makes Python wait for it too, on a CPU of jax 0.10.2.
exec "$(dirname "$0")/python_with" jax==0.10.2 <<'PY'
import time

import jax
import jax.numpy as jnp

x = jnp.ones((1500, 1500))


@jax.jit
def slow(x):
    for _ in range(12):
        x = x @ x / 1500
    return x[0, :3]


slow(x).block_until_ready()
start = time.perf_counter()
slow(x).block_until_ready()
whole = time.perf_counter() - start
jax.block_until_ready(slow(x) + 1)
y, took = slow(x), []
for _ in range(80):
    start = time.perf_counter()
    y = y + 1
    took.append((time.perf_counter() - start) / whole)
waited = took.index(max(took))
print(f"operation {waited + 1} behind the slow program took {max(took):.2f} of its time")
assert waited + 1 == 32
assert max(took) > 0.3
assert sum(took) - max(took) < 0.3
PY
