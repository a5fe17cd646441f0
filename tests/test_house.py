"""The house itself: how many rooms, how long the files, how far a gradient leaf travels."""

import sys
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import dropmuon_jax as dm

PACKAGE = Path(dm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_core_has_at_most_66_modules_and_contrib_10_of_30_to_300_lines():
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    too_long = {path.name: n for path, n in lines.items() if n > 300}
    too_short = {path.name: n for path, n in lines.items() if n < 30 and path.stem != "__init__"}
    modules = [path for path in FILES if path.stem != "__init__"]
    in_contrib = sum(PACKAGE / "contrib" in path.parents for path in modules)
    assert len(modules) - in_contrib <= 66
    assert in_contrib <= 10
    assert not too_long
    assert not too_short


def test_the_root_has_about_forty_names_and_all_are_there():
    assert len(dm.__all__) <= 52
    assert all(hasattr(dm, name) for name in dm.__all__)


def test_what_stands_in_public_signatures_can_be_named():
    for namespace, names in {
        dm.layers: ("DimensionNumbers", "LeafNumbers", "StackedPatterns", "Layers", "Roles"),
        dm.schedules: ("Radius", "LeafRadius", "AdaptiveRadius"),
        dm.orthogonalize: ("Orthogonalize", "Coefficients", "NewtonSchulz"),
        dm.sampling: ("LayerDistribution", "AdaptiveDistribution", "DepthSampler"),
    }.items():
        for name in names:
            assert hasattr(namespace, name), name


def visited_modules(function, *args, **kwargs):
    """The modules of the package in which code runs."""
    seen = set()

    def profile(frame, event, _):
        name = frame.f_globals.get("__name__") or ""
        if event == "call" and name.startswith("dropmuon_jax."):
            seen.add(name.removeprefix("dropmuon_jax."))

    sys.setprofile(profile)
    try:
        function(*args, **kwargs)
    finally:
        sys.setprofile(None)
    return seen


# Of shapes for which nothing is traced yet.
PARAMS = {"stem": jnp.ones((3, 17)), "head": jnp.ones((17, 2))}
MESH = {"sharding.on_mesh"}  # is asked whether there is one
LAYERS = dm.layers_by_path(PARAMS, ["stem", "head"])


CHAIN = optax.chain(
    dm.momentum(0.9),
    dm.newton_schulz_lmo(),
    optax.scale_by_learning_rate(0.1),
    dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=0),
)
# The part of drop_muon for everything that is no matrix, of which there is nothing here.
AUXILIARY = {"transforms.per_layer", "layers.layers", "_checks"}
LABELS = {"layers.prefixes"}  # looks up the label of each leaf
STATE = {"layers.states"}  # looks up whether the state fits


@pytest.mark.parametrize(
    ("tx", "beside"),
    [(CHAIN, MESH | STATE), (dm.drop_muon(0.1, LAYERS), MESH | AUXILIARY | LABELS | STATE)],
    ids=["chain", "drop_muon"],
)
def test_a_matrix_visits_at_most_ten_modules(tx, beside):
    state, mask = tx.init(PARAMS), LAYERS.mask(1)
    visited = visited_modules(tx.update, PARAMS, state, PARAMS, layer_mask=mask)
    assert len(visited - beside) <= 10


def test_the_way_from_newton_schulz_lmo_to_the_iteration_is_short():
    """`newton_schulz_lmo` calls `_steepest`, which makes the update; below are all calls behind it.

    One resolves the mask, three are of one line: the seam to a mesh, what runs behind it, and the
    choice of the platform.
    """
    calls = []

    def profile(frame, event, _):
        if event != "call" or frame.f_code.co_name != "_iterate" or calls:
            return
        while frame is not None:
            if (frame.f_globals.get("__name__") or "").startswith("dropmuon_jax."):
                calls.append(frame.f_code.co_name)
            frame = frame.f_back

    tx, params = dm.newton_schulz_lmo(), {"w": jnp.ones((3, 19))}
    state = tx.init(params)
    sys.setprofile(profile)
    try:
        tx.update(params, state)
    finally:
        sys.setprofile(None)
    one_line = {"_call", "directions", "<lambda>"}
    assert [call for call in reversed(calls) if call not in one_line] == [
        "update_fn",
        "update",
        "orthogonalize_all",
        "__call__",
        "_iterate",
    ]
