"""Steps of each method, compiled for a mesh and for one device."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import dropmuon_jax as dm
from scale_study.arrangements import Arranged, arrange
from scale_study.hlo import Traffic, read_traffic
from scale_study.settings import Arrangement, Method, Settings

LEARNING_RATE = 0.1
LAYOUTS: dict[Method, str] = {"on_mesh": "auto", "owner": "owner"}
"""Those that know how leaves are sharded."""
# Machine code is not what is counted: the instructions are the same as with all optimizations.
OPTIONS: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A step."""

    arrangement: Arrangement
    method: Method
    num_matrices: int
    """Of each shape; as many layers."""
    num_shapes: int
    num_steps: int
    """Of the Newton-Schulz iteration."""
    depth: int = 0
    """The first active layer."""
    is_traced: bool = False
    """Whether the depth is an argument of the program."""


class Counts(NamedTuple):
    """Of a case."""

    traffic: Traffic
    flops: float
    """Of a device, by XLA, which counts a loop once and every branch of a conditional."""
    least_bytes: float
    """As :meth:`Arranged.least_bytes`."""
    planned_bytes: float | None
    """Received by the busiest device, as `plan_layouts` says; where it was told the shardings, and
    the depth is known."""


class Agreement(NamedTuple):
    """Parameters after a step on the mesh against those after it on one device."""

    case: Case
    max_abs_difference: float
    max_abs_update: float


class Programs:
    """Programs of one text are compiled once."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._compiled: dict[str, tuple[Any, Traffic]] = {}

    def count(self, case: Case) -> Counts:
        """What the step of a case does."""
        arranged = self._arranged(case)
        compiled, traffic = self._compile(case, arranged)
        costs = compiled.cost_analysis() or {}
        return Counts(
            traffic,
            float(costs.get("flops", 0.0)),
            arranged.least_bytes(case.depth),
            _planned_bytes(case, arranged),
        )

    def compare(self, case: Case) -> Agreement:
        """The step on the mesh and on one device, from the same random numbers."""
        arranged = self._arranged(case)
        rng = np.random.default_rng(0)
        params, grads = (
            jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), arranged.params)
            for _ in range(2)
        )
        compiled, _ = self._compile(case, arranged)
        tx = transformation(case, arranged)
        state = jax.tree.map(
            jax.device_put, tx.init(params), _state_shardings(tx, arranged), is_leaf=_is_array
        )
        placed = [jax.tree.map(jax.device_put, x, arranged.shardings) for x in (params, grads)]
        on_mesh, _ = compiled(*placed, state, *_depth(case))
        plain = case
        if case.method != "optax":
            plain = dataclasses.replace(case, method="set_mesh")  # without a mesh to be set
        tx = transformation(plain, arranged)
        step = jax.jit(functools.partial(_step, tx, plain, arranged.layers))
        on_one, _ = step(params, grads, tx.init(params), *_depth(plain))
        return Agreement(case, _largest(on_mesh, on_one), _largest(on_one, params))

    def _arranged(self, case: Case) -> Arranged:
        return arrange(case.arrangement, case.num_matrices, case.num_shapes, self._settings)

    def _compile(self, case: Case, arranged: Arranged) -> tuple[Any, Traffic]:
        tx = transformation(case, arranged)
        placed = _placed(arranged.params, arranged.shardings)
        shardings = _state_shardings(tx, arranged)
        state = _placed(jax.eval_shape(tx.init, arranged.params), shardings)
        step = functools.partial(_step, tx, case, arranged.layers)
        with jax.set_mesh(arranged.mesh):
            jitted = jax.jit(step, out_shardings=(arranged.shardings, shardings))
            lowered = jitted.lower(placed, placed, state, *_depth(case))
            text = lowered.as_text()
            if text not in self._compiled:
                compiled = lowered.compile(compiler_options=OPTIONS)
                traffic = read_traffic(compiled.as_text() or "", self._settings.devices)
                self._compiled[text] = compiled, traffic
        return self._compiled[text]


def transformation(case: Case, arranged: Arranged) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a case."""
    if case.method == "optax":
        muon = optax.contrib.muon(
            LEARNING_RATE,
            ns_steps=case.num_steps,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                lambda leaf: optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1),
                params,
            ),
        )
        return optax.with_extra_args_support(muon)
    tx = dm.drop_muon(
        LEARNING_RATE,
        arranged.layers,
        orthogonalize=dm.orthogonalize.newton_schulz(num_steps=case.num_steps),
        shape_factor="spectral",
    )
    if case.method == "set_mesh":
        return tx
    return dm.on_mesh(tx, shardings=arranged.shardings, layout=LAYOUTS[case.method])


def _step(
    tx: optax.GradientTransformationExtraArgs,
    case: Case,
    layers: dm.Layers,
    params: Any,
    grads: Any,
    state: Any,
    *traced: Any,
) -> tuple[Any, Any]:
    mask = {} if case.method == "optax" else {"layer_mask": layers.mask(*traced or (case.depth,))}
    updates, state = tx.update(grads, state, params, **mask)
    return optax.apply_updates(params, updates), state


def _planned_bytes(case: Case, arranged: Arranged) -> float | None:
    if case.method not in LAYOUTS or case.is_traced:
        return None
    plan = dm.sharding.plan_layouts(
        arranged.params,
        shardings=arranged.shardings,
        layers=arranged.layers,
        layer_mask=arranged.layers.mask(case.depth),
        layout=LAYOUTS[case.method],
        orthogonalize=dm.orthogonalize.newton_schulz(num_steps=case.num_steps),
    )
    return sum(of_shape.bytes_received for of_shape in plan)


def _depth(case: Case) -> tuple[np.ndarray, ...]:
    return (np.asarray(case.depth, np.int32),) if case.is_traced else ()


def _state_shardings(tx: optax.GradientTransformation, arranged: Arranged) -> Any:
    return dm.state_shardings(tx, arranged.params, arranged.shardings)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _largest(tree: Any, other: Any) -> float:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
