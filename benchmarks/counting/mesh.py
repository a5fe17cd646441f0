"""Updates of matrices on a mesh of 8 CPU devices, in a process that has them."""

import functools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else XLA warns of what is counted here

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

import dropmuon_jax as dm
from counting.programs import Program, Row
from counting.ratios import by, value
from counting.settings import DEVICES, Arrangement, Counts
from drawing import new_table, show
from study import Work

LEARNING_RATE = 0.1
LAYOUTS = {"on_mesh": "auto", "owner": "owner"}  # of the methods that are told the shardings


class Sizes(NamedTuple):
    """Of an update: matrices of each shape, as many layers, and so on."""

    matrices: int
    shapes: int
    num_steps: int
    depth: int = 0


def count_mesh(settings: Counts, arrangement: Arrangement, work: Work) -> list[Row]:
    """By number of matrices, of shapes, of steps and by depth."""
    layers, steps = settings.layers, settings.num_steps[0]
    depths = sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers - 1})
    cases = []
    for method in ("set_mesh", *LAYOUTS, "optax"):
        sizes = [Sizes(number, 1, steps) for number in settings.matrices]
        sizes += [Sizes(DEVICES, number, steps) for number in settings.shapes]
        sizes += [Sizes(layers, 1, number) for number in settings.num_steps]
        sizes += [Sizes(layers, 1, steps, d) for d in depths if d == 0 or method != "optax"]
        cases += [(arrangement, method, of_one) for of_one in dict.fromkeys(sizes)]
    if arrangement == "stack_axis":  # whose rows devices share out evenly
        cases = [case for case in cases if case[2].matrices % DEVICES == 0]
    compared = [Sizes(layers, 1, steps, depth) for depth in (0, layers // 2)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _take_devices) as pool:
        rows = pool.map(_count, cases, (case[2] in compared for case in cases))
        return [row for _, row in zip(work.track(cases, arrangement), rows, strict=True)]


def _take_devices() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # Collectives that are read from a cache wait for ever.
    jax.config.update("jax_enable_compilation_cache", False)
    # Machine code is not what is counted: XLA rewrites and fuses as ever.
    jax.config.update("jax_disable_most_optimizations", True)


def _count(case: tuple[Arrangement, str, Sizes], is_compared: bool) -> Row:
    update = Update(*case)
    return update.count() | (update.compare() if is_compared else {})


class Update:
    """The update of layers with a matrix of each shape, by a method."""

    def __init__(self, arrangement: Arrangement, method: str, sizes: Sizes):
        self.arrangement, self.method, self.sizes = arrangement, method, sizes
        two_axes = arrangement == "fsdp_tensor"
        names = ("fsdp", "tensor") if two_axes else ("fsdp",)
        shape = (DEVICES // 2, 2) if two_axes else (DEVICES,)
        self.mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
        # Over two axes square ones, as query and output projections, before those of MLPs.
        sides = [(128, (128 if two_axes else 256) + 128 * i) for i in range(sizes.shapes)]
        tree: dict[str, Any] = {}
        if arrangement in ("stacked", "stack_axis"):
            spec = P("fsdp") if arrangement == "stack_axis" else P(None, "fsdp")
            tree["blocks"] = [((sizes.matrices, *side), spec) for side in sides]
        for layer in range(0 if tree else sizes.matrices):
            order = -1 if two_axes and layer % 2 else 1  # every other one is transposed
            tree[f"layer{layer:03}"] = [(side[::order], P(*names[::order])) for side in sides]
        patterns = [dm.stacked("blocks")] if "blocks" in tree else list(tree)

        def each(function: Any) -> Any:
            return {name: [function(*leaf) for leaf in leaves] for name, leaves in tree.items()}

        self.params = each(lambda shape, _: jax.ShapeDtypeStruct(shape, jnp.float32))
        self.shardings = each(lambda _, spec: NamedSharding(self.mesh, spec))
        self.layers = dm.layers_by_path(self.params, patterns)
        self.mask = self.layers.mask(sizes.depth)
        self.iteration = dm.orthogonalize.newton_schulz(num_steps=sizes.num_steps)
        self.tx = self.plain = self._transformation()
        if method in LAYOUTS:
            layout = LAYOUTS[method]
            self.tx = dm.on_mesh(self.plain, shardings=self.shardings, layout=layout)
        self.of_state = dm.state_shardings(self.tx, self.params, self.shardings)

    def _transformation(self) -> optax.GradientTransformation:
        if self.method == "optax":
            numbers = jax.tree.map(
                lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), self.params
            )
            options = {"ns_steps": self.sizes.num_steps, "muon_weight_dimension_numbers": numbers}
            return optax.contrib.muon(LEARNING_RATE, **options)
        options: dict[str, Any] = {"orthogonalize": self.iteration, "shape_factor": "spectral"}
        return dm.drop_muon(LEARNING_RATE, self.layers, **options)

    def _step(self, tx: Any, params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        extra = {} if self.method == "optax" else {"layer_mask": self.mask}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    @functools.cached_property
    def _program(self) -> Program:
        params = jax.tree.map(_placed, self.params, self.shardings)
        state = jax.tree.map(_placed, jax.eval_shape(self.tx.init, self.params), self.of_state)
        step = functools.partial(self._step, self.tx)
        function = jax.jit(step, out_shardings=(self.shardings, self.of_state))
        head = {"subject": "mesh", "network": self.arrangement, "program": self.method}
        head |= {"reference": "optax", "sizes": self.sizes._asdict()}
        return Program(head, function, [], params, params, state)

    def count(self) -> Row:
        """The row, with the least that a device could receive, and what `plan_layouts` says.

        The least is that each active matrix meets on one device and returns: of a matrix spread
        over D devices, (D − 1)/D come to its owner, and as much goes back.
        """
        with jax.set_mesh(self.mesh):
            row = self._program.count(DEVICES)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))
        active = size * (1 - self.sizes.depth / self.sizes.matrices)
        is_whole, planned = self.arrangement == "stack_axis", None
        if self.method in LAYOUTS:
            plan = dm.sharding.plan_layouts(
                self.params,
                shardings=self.shardings,
                layers=self.layers,
                layer_mask=self.mask,
                layout=LAYOUTS[self.method],
                orthogonalize=self.iteration,
            )
            planned = sum(of_shape.bytes_received for of_shape in plan)
        least = 0.0 if is_whole else 2 * active * (DEVICES - 1) / DEVICES**2
        return row | {"least_bytes": least, "planned_bytes": planned}

    def compare(self) -> Row:
        """The largest difference of parameters from those on one device, and the largest update."""
        rng = np.random.default_rng(0)
        params, grads = (
            jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), self.params)
            for _ in range(2)
        )
        given, put = (params, grads, self.tx.init(params)), (*[self.shardings] * 2, self.of_state)
        on_mesh, _ = self._program.compiled(*jax.tree.map(jax.device_put, given, put))
        plain = jax.jit(functools.partial(self._step, self.plain))
        on_one, _ = plain(params, grads, self.plain.init(params))
        return {"difference": _gap(on_mesh, on_one), "largest_update": _gap(on_one, params)}


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _gap(tree: Any, other: Any) -> float:
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), tree, other)
    return float(max(jax.tree.leaves(gaps)))


def tables(rows: Sequence[Row], settings: Row) -> Iterator[Table | str]:
    """Collectives and bytes by number of matrices, and then by everything else."""
    others = "mesh: collectives by shapes and steps; bytes from all depths ÷ plan"
    others = new_table(others, "", "by shapes", "by steps", "bytes ÷ plan")
    for arrangement, of_one in by("network", rows).items():
        title = f"{arrangement}: collectives, bytes ÷ least (kB if it is 0) by number of matrices"
        table = new_table(title, "", *map(str, settings["matrices"]))
        for method, line in by("program", of_one).items():
            by_size = [
                {row["sizes"][size]: row for row in varied(line, settings, size)}
                for size in ("matrices", "shapes", "num_steps")
            ]
            table.add_row(method, *(_cell(by_size[0].get(n)) for n in settings["matrices"]))
            numbers = (
                ", ".join(str(value(row, "collectives")) for row in of_size.values())
                for of_size in by_size[1:]
            )
            plan = [r["collective_bytes"] / r["planned_bytes"] for r in line if r["planned_bytes"]]
            span = f"{min(plan):.3f}–{max(plan):.3f}" if plan else ""
            others.add_row(f"{arrangement}, {method}", *numbers, span)
        yield table
    yield others
    compared = [row for row in rows if "difference" in row]
    yield (
        f"Results of {len(compared)} updates on {DEVICES} devices differ from those on one by at "
        f"most {max(row['difference'] for row in compared):.1e}, of updates up to "
        f"{max(row['largest_update'] for row in compared):.1e}."
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    times = row["collective_bytes"] / (row["least_bytes"] or 1e3)
    return f"{value(row, 'collectives')}, {show(times, 2 if 0 < times < 10 else 0)}"


def varied(rows: Sequence[Row], settings: Row, name: str) -> list[Row]:
    """The rows by one of their sizes, in which the others are what they usually are."""
    matrices = settings["layers"] if name == "num_steps" else DEVICES
    usual = {"matrices": matrices, "shapes": 1, "num_steps": settings["num_steps"][0], "depth": 0}
    wanted = [usual | {name: size} for size in settings[name]]
    own = [row for row in rows if row["sizes"] in wanted]
    return sorted(own, key=lambda row: row["sizes"][name])
