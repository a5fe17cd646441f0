#!/usr/bin/env bash
# The first step of torch.optim.NAdam at its defaults.
#
# Guess: 1.47 × the rate, as of optax.nadam: Dozat's formula with b1 = 0.9 adds 0.9 · 0.1 / 0.19 of
# the gradient to 1 of it.
# Seen: 1.056 × the rate. The momentum follows the schedule of Dozat's paper (`momentum_decay`) and
# is about 0.45 in the first steps, where Optax's is 0.9 in all.
exec "$(dirname "$0")/python_with" torch==2.13.0 numpy==2.4.6 <<'PY'
import torch

p = torch.nn.Parameter(torch.zeros(1))
p.grad = torch.ones(1)
torch.optim.NAdam([p], lr=1.0).step()
print(-p.item())
assert abs(-p.item() - 1.0565) < 1e-3
PY
