"""The study of steps on a mesh counts what programs say, and models what it writes down."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scale_study.hlo import read_traffic
from scale_study.model import Work, gradient_work, model_step, work_of_iteration
from scale_study.networks import NETWORKS, Network
from scale_study.programs import Case
from scale_study.settings import Settings, check_settings
from scale_study.tables import cases

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale.py"
TINY = Settings(Path(), devices=4, rows=16, cols=32, matrices=(4, 8), layers=8)
ARGUMENTS = [
    *("--devices", "4", "--rows", "16", "--cols", "32", "--matrices", "1", "4", "8"),
    *("--shapes", "1", "--num-steps", "5", "7", "--layers", "8"),
    *("--arrangements", "fsdp", "stack_axis", "--methods", "owner", "optax"),
    *("--pod-devices", "8", "--networks", "124M"),
]

HLO = """HloModule jit_f, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %x.1 = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %sum.1 = f32[4,8]{1,0} all-reduce(%x.1), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%carry, %sum.1)
}

%condition (carry.1: (s32[], f32[4,8])) -> pred[] {
  ROOT %less = pred[] constant(false)
}

%few (p: f32[2]) -> f32[2] {
  ROOT %moved = f32[2]{0} collective-permute(%p), source_target_pairs={{0,1}}
}

%many (p.1: f32[2]) -> f32[4] {
  ROOT %both = bf16[4]{0} all-gather(%p.1), replica_groups={}, dimensions={0}
}

ENTRY %main (p0: f32[4,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0), metadata={op_name="an all-reduce(not one)"}
  %turned = (f32[1,2]{1,0}, f32[1,2]{1,0}, /*index=2*/f32[1,2]{1,0}) all-to-all(%a, %b, %c), \
replica_groups={{0,1,2},{3,4,5}}
  %five = (s32[], f32[4,8]{1,0}) while(%p0), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
  %some = (s32[], f32[4,8]{1,0}) while(%p0), condition=%condition, body=%body
  %one = f32[4]{0} conditional(%i, %p, %p), branch_computations={%few, %many}
  %whole = f32[8]{0} all-gather(%q), replica_groups=mesh['a'=2,'b'=4], \
device_ids=([4,2]T(1,0)) {'a','b':(2)2}, dimensions={0}
  %part = f32[3]{0} reduce-scatter(%r), replica_groups={{0,1},{2,3}}, to_apply=%add
  %alone = f32[8]{0} all-reduce(%s), replica_groups={{0},{1}}, to_apply=%add
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%five), index=1
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a tiny study, made by a process with devices of its own."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(SCRIPT), *ARGUMENTS, "--output-dir", str(folder)]
    environment = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def record(folder) -> dict:
    return json.loads((folder / "scale.json").read_text())


def _rows(record: dict, question: str, arrangement: str, method: str) -> list[dict]:
    wanted = {"question": question, "arrangement": arrangement, "method": method}
    return [row for row in record["counts"] if wanted.items() <= row.items()]


def test_owners_need_as_many_collectives_at_any_number_of_steps_and_matrices(record):
    for question in ("num_steps", "matrices"):
        rows = _rows(record, question, "fsdp", "owner")
        assert len(rows) > 1
        assert {json.dumps(row["collectives"]) for row in rows} == {'{"all-to-all": 2}'}


def test_owners_move_each_matrix_there_and_back_once(record):
    ratios = {
        row["num_matrices"]: row["bytes_over_least"]
        for row in _rows(record, "matrices", "fsdp", "owner")
    }
    # One matrix travels with three empty places.
    assert ratios == pytest.approx({1: 4.0, 4: 1.0, 8: 1.0})


def test_optax_moves_more_at_every_step_of_the_iteration(record):
    pairs = zip(
        _rows(record, "num_steps", "fsdp", "optax"),
        _rows(record, "num_steps", "fsdp", "owner"),
        strict=True,
    )
    for optax, owner in pairs:
        steps, matrices = optax["num_steps"], optax["num_matrices"]
        assert optax["num_collectives"] >= 3 * steps * matrices > owner["num_collectives"]
        assert optax["num_bytes"] > steps * owner["num_bytes"]


def test_frozen_layers_move_no_bytes(record):
    alone = {
        row["num_matrices"]: row["num_bytes"] for row in _rows(record, "alone", "fsdp", "owner")
    }
    rows = _rows(record, "depth", "fsdp", "owner")
    assert [row["depth"] for row in rows] == [0, 2, 4, 6, 7]
    for row in rows:
        assert row["num_bytes"] == alone[8 - row["depth"]]
    assert rows[2]["num_bytes"] == rows[0]["num_bytes"] / 2


def test_stacks_that_are_sharded_by_rows_move_nothing(record):
    rows = _rows(record, "depth", "stack_axis", "owner")
    assert rows
    assert {row["num_bytes"] for row in rows} == {0.0}
    assert {row["bytes_over_least"] for row in rows} == {None}


def test_results_are_those_of_one_device(record):
    rows = record["agreement_with_one_device"]
    assert {row["depth"] for row in rows} == {0, 4}
    for row in rows:
        assert row["max_abs_update"] > 1e-2
        assert row["max_abs_difference"] < 1e-5


def test_study_leaves_its_verdicts_its_model_and_a_plot_without_paths(record, folder):
    assert record["environment"]["device_count"] == 4
    assert record["model"]["note"] == "model, not measured"
    for words in (
        "layout owner: the number of collectives does not depend",
        "optax.contrib.muon: the number of collectives DEPENDS",
        "none of 7 moves more bytes than the step of a network without the frozen layers",
        "Model, not measured: 124M on 8 devices",
    ):
        assert any(words in sentence for sentence in record["verdicts"]), words
    assert str(folder) not in json.dumps(record)
    assert (folder / "scale.png").stat().st_size > 10_000


def test_traffic_is_read_from_a_program():
    traffic = read_traffic(HLO, num_devices=8)
    assert traffic.collectives == {
        "all-to-all": 1,
        "all-reduce": 5,
        "collective-permute": 1,
        "all-gather": 1,
        "reduce-scatter": 1,
    }
    assert traffic.received == pytest.approx(
        {
            "all-to-all": 3 * 2 * 4 * 2 / 3,
            "all-reduce": 5 * (2 * 4 * 8 * 4 * 3 / 4),
            "collective-permute": 2 * 4,  # the branch that moves more: the other gathers 7 bytes
            "all-gather": 8 * 4 * 3 / 4,
            "reduce-scatter": 3 * 4,
        }
    )
    assert traffic.collectives_per_turn == {"all-reduce": 1}
    assert traffic.received_per_turn == pytest.approx({"all-reduce": 2 * 4 * 8 * 4 * 3 / 4})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%x = f32[8]{0} all-gather(%y), replica_groups=?", "groups of devices cannot be read"),
        ("%x = f32[8]{0} all-gather-start(%y), replica_groups={}", "Asynchronous"),
    ],
)
def test_programs_that_cannot_be_read_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        read_traffic(f"ENTRY %main (y: f32[1]) -> f32[8] {{\n  {line}\n}}\n", 8)


def test_texts_without_a_program_are_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_traffic("HloModule empty\n", 8)


def test_modelled_gradient_is_that_by_hand():
    network = Network(d_model=2, num_blocks=3, vocabulary=5)  # blocks of 48, a table of 10
    settings = dataclasses.replace(TINY, tokens_per_device=7, bytes_per_parameter=2)
    all_layers = gradient_work(network, 0, 4, settings)
    assert all_layers == Work(7 * 6 * (3 * 48 + 10), 2 * 3 * (3 * 48 + 10) * 3 / 4)
    last_block = gradient_work(network, 3, 4, settings)
    # Forward 154; backward one block and the input of the head; gathered 154 + 48 + 10.
    assert last_block == Work(7 * (2 * 154 + 4 * 48 + 2 * 10), 2 * (154 + 58 + 48) * 3 / 4)
    assert gradient_work(network, 1, 4, settings).flops == 7 * (6 * 3 * 48 + 4 * 10)


def test_modelled_iteration_of_optax_is_that_by_hand():
    assert work_of_iteration(6, 2, 4) == Work(2 * (2 * 4 * 6 / 4 + 8), 2 * 4 * 4 * 3 / 4)
    assert work_of_iteration(2, 2, 4) == Work(6 * 8 / 4, 3 * 4 * 4 * 3 / 4)


def test_modelled_iteration_of_optax_is_the_one_counted(record):
    [row] = _rows(record, "depth", "fsdp", "optax")
    # There the shorter side is sharded: as of a square, with X of 16 × 32 gathered twice.
    received = (2 * 16 * 32 + 16 * 16) * 4 * 3 / 4
    norms = 2 * 4 * 3 / 4
    assert row["num_bytes"] == row["num_matrices"] * (row["num_steps"] * received + norms)


def test_modelled_step_is_the_sum_of_its_parts():
    settings = dataclasses.replace(TINY, device_flops=1e15, link_bytes=1e11)
    step = model_step("124M", 8, "Muon", "replicated", settings)
    network = NETWORKS["124M"]
    assert math.isclose(network.num_parameters, 124e6, rel_tol=0.01)
    gradient = gradient_work(network, 0, 8, settings)
    assert step.gradient_seconds == max(gradient.flops / 1e15, gradient.received / 1e11)
    assert step.seconds == pytest.approx(
        step.gradient_seconds + step.optimizer_flops / 1e15 + step.optimizer_bytes / 1e11
    )
    # Each device receives all matrices but the part that it has.
    assert step.optimizer_bytes == pytest.approx(4 * 12 * network.block_size * 7 / 8)
    drop = model_step("124M", 8, "Drop-Muon", "owner", settings)
    assert drop.seconds < model_step("124M", 8, "Muon", "owner", settings).seconds < step.seconds


def test_each_question_asks_only_for_what_is_possible():
    asked = cases(dataclasses.replace(TINY, matrices=(1, 4), arrangements=("stack_axis",)))
    assert {case.num_matrices for case in asked["matrices"]} == {4}
    assert {case.depth for case in asked["depth"] if case.method == "optax"} == {0}
    asked = cases(dataclasses.replace(TINY, arrangements=("stacked",), methods=("owner",)))
    assert Case("stacked", "owner", 8, 1, 5, 0, is_traced=True) in asked["depth"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 6}, "--devices must be a power of two, at least 2, got 6"),
        ({"devices": 1}, "--devices must be a power of two"),
        ({"pod_devices": (8, 12)}, "--pod-devices must be a power of two, at least 2, got 12"),
        ({"matrices": (0, 4)}, "--matrices must be at least 1"),
        ({"matrices": ()}, "--matrices needs at least one value"),
        ({"num_steps": (5, 5)}, "--num-steps names a value twice"),
        ({"rows": 18}, "--rows must be a multiple of the 4 devices, got 18"),
        ({"cols": 8}, "--cols must be at least"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"link_bytes": 0.0}, "--link-bytes must be positive"),
        (
            {"arrangements": ("stack_axis",), "matrices": (1, 2)},
            "--matrices of stack_axis must be divisible",
        ),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(SystemExit, match=message):
        check_settings(dataclasses.replace(TINY, **changes))
