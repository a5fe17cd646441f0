#!/usr/bin/env bash
# pytorch_optimizer.create_optimizer(model, "muon", lr=0.05, weight_decay=0.1) on a small network.
#
# Guess: matrices go to Muon, everything else to AdamW, both with this rate and decay.
# Seen: the group of AdamW has the rate 3e-4 and no decay, whatever was given: it takes `adamw_lr`
# and `adamw_wd`.
exec "$(dirname "$0")/python_with" torch==2.13.0 numpy==2.4.6 pytorch-optimizer==4.1.0 <<'PY'
import pytorch_optimizer
import torch

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
tx = pytorch_optimizer.create_optimizer(model, "muon", lr=0.05, weight_decay=0.1)
groups = {group["use_muon"]: (group["lr"], group["weight_decay"]) for group in tx.param_groups}
print(groups)
assert groups == {True: (0.05, 0.1), False: (3e-4, 0.0)}
PY
