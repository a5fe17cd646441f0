"""Records ten steps of every other Muon, each in an environment of its own.

    python tests/peers/record.py [--only torch …] [--checkouts DIR]

installs the pinned releases from PyPI into temporary folders, takes the steps of `problem.py`, and
writes one small JSON for each run into `trajectories/`: parameters, versions, settings, and how
much is left of a first update where gradients are 1e-12 times as large. Two Muons are on no package
index. They are recorded from checkouts, DIR/dion of github.com/microsoft/dion at 0a059a45 and
DIR/Moonlight of github.com/MoonshotAI/Moonlight at c2ad5b20, and left as they are without.

The libraries for PyTorch round the iteration to bfloat16. They are run as they are, and once more
with float32 in bfloat16's place ("float32" in the file's name): these steps have nothing random
about them, and can be followed to float32's last digits.
"""

import argparse
import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import problem

JAX = ["jax==0.10.2", "optax==0.2.8"]
TORCH = ["torch==2.13.0", "torchvision==0.28.0", "numpy==2.4.6"]
ENVIRONMENTS = {
    "jax": [*JAX, "keras==3.15.1"],
    "torch": [
        *TORCH,
        *("timm==1.0.31", "pytorch-optimizer==4.1.0", "heavyball==3.2.1", "muon-optimizer==0.1.0"),
    ],
}
Update = Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]]
RUNS: dict[str, tuple[str, Callable[[], tuple[Update, dict]]]] = {}


def run(environment: str):
    """Registers a function that makes one step after the other."""

    def register(function):
        RUNS[function.__name__] = environment, function
        return function

    return register


class _Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not there, and nothing in them."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return MagicMock(__name__=spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _placeholders(*packages: str):
    """Lets a module be imported without packages that its optimizer does not use."""
    finder = _Placeholders(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in packages]:
            del sys.modules[name]


# --- JAX ------------------------------------------------------------------------------------------


def _optax_steps(tx) -> Update:
    import jax
    import optax

    state = params = None

    def update(grads, step):
        nonlocal state, params
        if step == 0:
            params = problem.nested(jax.tree.map(jax.numpy.asarray, problem.params()))
            state = tx.init(params)
        updates, state = tx.update(problem.nested(grads), state, params)
        params = optax.apply_updates(params, updates)
        return {path: functools.reduce(dict.__getitem__, path.split("/"), params) for path in grads}

    return update


def _schedule():
    import optax

    return optax.linear_schedule(problem.FIRST_RATE, problem.LAST_RATE, problem.NUM_STEPS)


@run("jax")
def optax():
    import optax

    settings = {"weight_decay": problem.WEIGHT_DECAY, "adam_weight_decay": problem.WEIGHT_DECAY}
    return _optax_steps(optax.contrib.muon(_schedule(), **settings)), settings


@run("jax")
def optax_moonlight():
    import optax

    axes = optax.contrib.MuonDimensionNumbers
    numbers = dict.fromkeys(problem.SHAPES, None)
    numbers |= {f"{name}/kernel": axes(0, 1) for name in ("wide", "tall", "square")}
    numbers |= {"attn/query/kernel": axes(0, (1, 2)), "attn/out/kernel": axes((0, 1), 2)}
    numbers["conv/kernel"] = axes((0, 1, 2), 3)
    settings = {"nesterov": False, "consistent_rms": 0.2, "ns_coeffs": "dion", "beta": 0.9}
    tx = optax.contrib.muon(
        _schedule(), muon_weight_dimension_numbers=problem.nested(numbers), **settings
    )
    return _optax_steps(tx), settings | {"muon_weight_dimension_numbers": "attention, convolution"}


@run("jax")
def keras():
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    first, last, steps = problem.FIRST_RATE, problem.LAST_RATE, problem.NUM_STEPS
    schedule = keras.optimizers.schedules.PolynomialDecay(first, steps, last)
    tx, variables = keras.optimizers.Muon(schedule), {}
    for path, x in problem.params().items():
        *modules, name = path.split("/")
        with keras.name_scope("_".join(modules)):
            variables[path] = keras.Variable(x, name=name)

    def update(grads, step):
        tx.apply([grads[path] for path in variables], list(variables.values()))
        return {path: np.array(x.value) for path, x in variables.items()}

    return update, {}


# --- PyTorch --------------------------------------------------------------------------------------


def _torch_steps(make, dtype="float32") -> Update:
    """The steps of the optimizers that `make` makes of parameters by path, under LambdaLR."""
    import torch

    params = {
        path: torch.nn.Parameter(
            torch.tensor(problem.to_torch(path, x).copy(), dtype=getattr(torch, dtype))
        )
        for path, x in problem.params().items()
    }
    optimizers = make(params)
    schedules = [torch.optim.lr_scheduler.LambdaLR(tx, problem.rate) for tx in optimizers]

    def update(grads, step):
        for path, p in params.items():
            p.grad = torch.tensor(problem.to_torch(path, grads[path]).copy(), dtype=p.dtype)
        for tx, schedule in zip(optimizers, schedules, strict=True):
            tx.step()
            schedule.step()
        return {
            path: problem.from_torch(path, p.detach().numpy().copy()) for path, p in params.items()
        }

    return update


def _matrices(params, *, conv: bool):
    """The matrices, and everything else, embeddings included."""
    named = {path for path in params if path.endswith("kernel") and (conv or "conv" not in path)}
    return [p for path, p in params.items() if path in named], [
        p for path, p in params.items() if path not in named
    ]


def with_float32(function):
    """Registers a run a second time, with float32 in the place of bfloat16."""

    def in_float32():
        import torch

        torch.bfloat16 = torch.float32
        torch.Tensor.bfloat16 = lambda x: x.to(torch.float32, copy=True)
        update, settings = function()
        return update, settings | {"bfloat16": "float32 in its place"}

    RUNS[function.__name__ + "_float32"] = RUNS[function.__name__][0], in_float32
    return function


def _torch_muon(**options):
    import torch

    def make(params):
        matrices, others = _matrices(params, conv=False)
        return (
            torch.optim.Muon(matrices, lr=1.0, **options),
            torch.optim.AdamW(others, lr=1.0, weight_decay=problem.WEIGHT_DECAY),
        )

    return _torch_steps(make), options | {"others": "torch.optim.AdamW, weight_decay 0.1"}


@with_float32
@run("torch")
def torch():
    return _torch_muon()


@with_float32
@run("torch")
def torch_match_rms():
    return _torch_muon(adjust_lr_fn="match_rms_adamw", nesterov=False)


def _timm(opt):
    # Its models need torchvision, whose wheels are for PyTorch with CUDA; its optimizers do not.
    with _placeholders("torchvision"):
        from timm.optim import create_optimizer_v2

    options = {"opt": opt, "lr": 1.0, "weight_decay": problem.WEIGHT_DECAY}
    return _torch_steps(lambda params: [create_optimizer_v2(list(params.values()), **options)]), {
        "create_optimizer_v2": options
    }


@with_float32
@run("torch")
def timm():
    return _timm("muon")


@with_float32
@run("torch")
def timm_nmuon():
    return _timm("nmuon")


@with_float32
@run("torch")
def pytorch_optimizer():
    import pytorch_optimizer

    def make(params):
        matrices, others = _matrices(params, conv=True)
        decay = {"weight_decay": problem.WEIGHT_DECAY, "lr": 1.0}
        groups = [
            {"params": matrices, "use_muon": True, **decay},
            {"params": others, "use_muon": False, **decay},
        ]
        return [pytorch_optimizer.Muon(groups)]

    return _torch_steps(make), {"weight_decay": problem.WEIGHT_DECAY}


@with_float32
@run("torch")
def muon_optimizer():
    import muon

    def make(params):
        matrices, others = _matrices(params, conv=False)
        decay = {"weight_decay": problem.WEIGHT_DECAY, "lr": 1.0}
        groups = [
            {"params": matrices, "use_muon": True, **decay},
            {"params": others, "use_muon": False, **decay},
        ]
        return [muon.SingleDeviceMuonWithAuxAdam(groups)]

    return _torch_steps(make), {"weight_decay": problem.WEIGHT_DECAY}


def _heavyball(name, dtype):
    import heavyball
    import torch

    torch.manual_seed(0)  # of its stochastic rounding
    options = {"lr": 1.0, "weight_decay": problem.WEIGHT_DECAY}
    make = getattr(heavyball, name)
    return _torch_steps(lambda params: [make(list(params.values()), **options)], dtype), {
        **options,
        "class": name,
        "parameters": dtype,
    }


@run("torch")
def heavyball():
    return _heavyball("Muon", "float32")


@run("torch")
def heavyball_float64():
    return _heavyball("Muon", "float64")  # in which it does not round to bfloat16


@run("torch")
def heavyball_adamw_float64():
    return _heavyball("MuonAdamW", "float64")


# --- From checkouts -------------------------------------------------------------------------------


@with_float32
@run("dion")
def dion():
    importlib.import_module("torch._inductor.compile_fx")  # it looks for triton itself
    with _placeholders("triton"):
        from dion import Muon

    def make(params):
        matrices, others = _matrices(params, conv=True)
        conv = [p for p in matrices if p.ndim == 4]
        groups = [
            {"params": [p for p in matrices if p.ndim == 2]},
            {"params": conv, "flatten": True},
            {"params": others, "algorithm": "adamw"},
        ]
        return [Muon(groups, lr=1.0, weight_decay=problem.WEIGHT_DECAY)]

    return _torch_steps(make), {"weight_decay": problem.WEIGHT_DECAY}


@with_float32
@run("Moonlight")
def moonlight():
    with _placeholders("loguru", "datasets", "transformers", "tqdm"):  # of the model that it trains
        from examples.toy_train import Muon

    def make(params):
        matrices, others = _matrices(params, conv=False)
        return [Muon(lr=1.0, muon_params=matrices, adamw_params=others)]

    return _torch_steps(make), {}


# --- The command ----------------------------------------------------------------------------------


def _first_updates_of(size: float, name: str) -> dict[str, np.ndarray]:
    """What gradients of this size add to the parameters in a first step, beside weight decay."""
    after = []
    for scale in (size, 0.0):
        update, _ = RUNS[name][1]()
        grads = {path: np.float32(scale) * g for path, g in problem.gradients(0).items()}
        after.append(update(grads, 0))
    return {path: after[0][path] - after[1][path] for path in problem.SHAPES}


def _record(name: str) -> None:
    """Takes the steps of a run, in the environment that has its library."""
    update, settings = RUNS[name][1]()
    recorded = {}
    for step in range(problem.NUM_STEPS):
        params = update(problem.gradients(step), step)
        if step + 1 in problem.RECORDED:
            recorded[step + 1] = {
                path: [round(float(number), 6) for number in np.ravel(x)]
                for path, x in params.items()
            }
    tiny, whole = _first_updates_of(1e-12, name), _first_updates_of(1.0, name)
    shares = {
        path: float(f"{np.linalg.norm(tiny[path]) / np.linalg.norm(whole[path]):.2g}")
        for path in ("square/kernel", "wide/bias")
    }
    names = {requirement.split("==")[0] for of in ENVIRONMENTS.values() for requirement in of}
    versions = {}
    for package in sorted(names):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    record = {"versions": versions, "settings": settings, "share_at_1e-12": shares}
    problem.TRAJECTORIES.mkdir(exist_ok=True)
    text = json.dumps(record | {"params": recorded}, separators=(",", ":"))
    text = text.replace(':{"', ':{\n"').replace('],"', '],\n"')
    (problem.TRAJECTORIES / f"{name}.json").write_text(text + "\n")
    print(f"recorded {name}", flush=True)


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--checkouts", type=Path, help="a folder with checkouts dion and Moonlight")
    parser.add_argument("--in-this-environment", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_environment:
        return _record(args.in_this_environment)
    with tempfile.TemporaryDirectory() as folder:
        for environment, requirements in ENVIRONMENTS.items():
            others = ("dion", "Moonlight") if environment == "torch" and args.checkouts else ()
            names = [name for name in args.only if RUNS[name][0] in (environment, *others)]
            if not names:
                continue
            venv = Path(folder) / environment
            python = venv / "bin" / "python"
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
            for name in names:
                checkout = RUNS[name][0]
                path = str(args.checkouts / checkout) if checkout in others else ""
                command = [python, __file__, "--in-this-environment", name]
                # Compiled, steps differ by roundings, and programs have their dtypes in their text.
                options = {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}
                subprocess.run(command, check=True, env=os.environ | options)


if __name__ == "__main__":
    _main()
