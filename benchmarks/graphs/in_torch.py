"""The graphs in eager PyTorch, as a program of its own that answers on its standard output.

Run by the Python of an environment with PyTorch and NumPy, which needs nothing else. Of each line
of JSON, {"problem": an .npz, "graph": its name, "steps": so many}, it says {"seconds", "loss"}: of
those steps from where it was, and the loss of the last one.
"""

import json
import math
import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

HEADS = 6


def _tiny(p, x, y):
    c, d = p["a"] + p["b"], p["a"] * p["b"] + p["b"] ** 3
    return (c - d) ** 2 / 2


def _small(p, x, y):
    a, b = p["a"], p["b"]
    c, d = a + b, a * b + b**3
    c = c + c + 1
    c = c + 1 + c - a
    d = d + 2 * d + F.relu(b + a)
    d = d + 3 * d + F.relu(b - a)
    f = (c - d) ** 2
    return f / 2 + 10 / f


def _mlp(p, x, y):
    hidden = F.embedding(x, p["embedding"]).flatten(1) @ p["hidden/kernel"] + p["hidden/bias"]
    return F.cross_entropy(torch.tanh(hidden) @ p["head/kernel"] + p["head/bias"], y)


def _gpt(p, x, y):
    batch, length = x.shape
    width = p["tokens"].shape[1]

    def norm(name, h):
        return F.layer_norm(h, (width,), p[name + "/scale"], p[name + "/bias"])

    h = F.embedding(x, p["tokens"]) + p["positions"]
    hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    for block in range(sum(name.endswith("up/bias") for name in p)):
        of = f"{block}/"
        parts = (norm(of + "norm_1", h) @ p[of + "attention/kernel"]).chunk(3, -1)
        q, k, v = (z.view(batch, length, HEADS, -1).transpose(1, 2) for z in parts)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, width)
        h = h + mixed @ p[of + "out/kernel"] + p[of + "out/bias"]
        up = torch.relu(norm(of + "norm_2", h) @ p[of + "up/kernel"] + p[of + "up/bias"])
        h = h + up @ p[of + "down/kernel"] + p[of + "down/bias"]
    logits = norm("norm", h) @ p["head/kernel"] + p["head/bias"]
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


GRAPHS = {"tiny": _tiny, "small": _small, "mlp": _mlp, "gpt": _gpt}


class Training:
    """A graph on its way."""

    def __init__(self, graph, path):
        arrays = np.load(path)
        names = [name for name in arrays.files if name not in ("inputs", "labels", "rate")]
        self.params = {name: torch.tensor(arrays[name], requires_grad=True) for name in names}
        self.inputs, self.labels = (
            torch.tensor(arrays[name], dtype=torch.long) for name in ("inputs", "labels")
        )
        self.optimizer = torch.optim.SGD(self.params.values(), lr=float(arrays["rate"]))
        self.loss, self.count = GRAPHS[graph], 0

    def run(self, num_steps):
        """So many steps, and the last loss."""
        loss, begin = torch.tensor(math.nan), time.perf_counter()
        for _ in range(num_steps):
            i = self.count % len(self.inputs)
            loss = self.loss(self.params, self.inputs[i], self.labels[i])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.count += 1
        return {"seconds": time.perf_counter() - begin, "loss": loss.item()}


def _main():
    known = {}
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        path = asked["problem"]
        if path not in known:
            known[path] = Training(asked["graph"], path)
        print(json.dumps(known[path].run(asked["steps"])), flush=True)


if __name__ == "__main__":
    _main()
