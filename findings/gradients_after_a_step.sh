#!/usr/bin/env bash
# What is in `p.grad` after a step of Muon with Nesterov's form, where one may log its norm or go on
# accumulating.
#
# Guess: the gradient, as after a step of any optimizer of PyTorch's.
# Seen: with torch.optim.Muon it is. muon-optimizer and pytorch-optimizer compute Nesterov's average
# in its place: in the second step `p.grad` is 0.9 of its own length away from the gradient.
exec "$(dirname "$0")/python_with" torch==2.13.0 numpy==2.4.6 pytorch-optimizer==4.1.0 \
    muon-optimizer==0.1.0 <<'PY'
import muon
import pytorch_optimizer
import torch

MAKE = {
    "torch": lambda p: torch.optim.Muon([p]),
    "pytorch-optimizer": lambda p: pytorch_optimizer.Muon([{"params": [p], "use_muon": True}]),
    "muon-optimizer": lambda p: muon.SingleDeviceMuon([p]),
}
seen = {}
for name, make in MAKE.items():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 5))
    tx = make(p)
    for _ in range(2):
        p.grad = torch.randn(8, 5)
        grad = p.grad.clone()
        tx.step()
    seen[name] = float((p.grad - grad).norm() / grad.norm())
print(seen)
assert seen["torch"] == 0
assert seen["pytorch-optimizer"] > 0.8
assert seen["muon-optimizer"] > 0.8
PY
