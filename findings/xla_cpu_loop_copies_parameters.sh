#!/usr/bin/env bash
# Whether training steps in one `jax.lax.scan` update parameters in place on a CPU.
#
# Guess: a loop's carry is updated in place, which is what a scan over steps is for.
# Seen: of the twelve parameters of a multilayer perceptron five are copied in every round of a loop.
# With XLA's option xla_cpu_copy_insertion_use_region_analysis, off by default in jax 0.10.2, none is.
exec "$(dirname "$0")/python_with" jax==0.10.2 <<'PY'
import re

import jax
import jax.numpy as jnp

DEPTH, WIDTH = 6, 32
params = {f"{i}": {"w": jnp.ones((WIDTH, WIDTH)), "b": jnp.ones(WIDTH)} for i in range(DEPTH)}


def loss(params, x):
    for of in params.values():
        x = jnp.tanh(x @ of["w"] + of["b"])
    return (x**2).mean()


def steps(params, batches):
    def step(params, x):
        grads = jax.grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

    return jax.lax.scan(step, params, batches)[0]


found = {}
for name, options in {
    "as it comes": {},
    "with region analysis": {"xla_cpu_copy_insertion_use_region_analysis": True},
}.items():
    jitted = jax.jit(steps, donate_argnums=0, compiler_options=options)
    text = jitted.lower(params, jnp.ones((10, 8, WIDTH))).compile().as_text()
    bodies = [part for part in text.split("\n\n") if not part.startswith("ENTRY")]
    found[name] = len(re.findall(r" = f32\[32(?:,32)?\]\S* copy\(", "".join(bodies)))
    print(f"{name}: {found[name]} of {2 * DEPTH} parameters are copied in a round")
assert found["as it comes"] > 3
assert found["with region analysis"] < found["as it comes"] / 2
PY
