"""Several processes train as one does, draw the same layers, and restore what others saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pods.agreement import OTHER_SEED, STEP
from pods.launch import Pod, run_pods
from pods.train import SEED, STEPS, make_sampler

ONE, EIGHT, POD = "one device", "eight devices", "two processes of four devices"
MESHES = {ONE: (1, 1), EIGHT: (4, 2), POD: (2, 4)}  # data, fsdp
RUNS = {
    "cnn": {"name": "cnn"},
    "gpt, depth traced": {"name": "gpt", "traced": True},
}
SAVE_AT = 4
# Runs that save, for other topologies to resume.
SAVED = {POD: ("cnn", "gpt, depth traced"), ONE: (), EIGHT: ()}

# In float64 the "cnn" comes within 1e-14 of each loss and 5e-14 of parameters and state. Softmax in
# `jax.nn.dot_product_attention` is in float32 all the same, and orthogonalizing magnifies its
# rounding: the "gpt" came within 4e-7 and 6e-6.
LOSS_RTOL = {"cnn": 1e-12, "gpt": 1e-5}
STATE_ATOL = {"cnn": 1e-11, "gpt": 1e-4}


def result_of(directory: Path, topology: str, run: str, *, resumed: bool = False) -> Path:
    return directory / f"{topology}, {run}{', resumed' if resumed else ''}.npz"


def whole_run(directory: Path, topology: str, run: str) -> dict[str, Any]:
    saves = {"save": str(directory / f"{topology}, {run}"), "save_at": SAVE_AT}
    return RUNS[run] | {
        "do": "train",
        "mesh": MESHES[topology],
        "result": str(result_of(directory, topology, run)),
        **(saves if run in SAVED[topology] else {}),
    }


def resumed_run(directory: Path, topology: str, run: str, *, saved_on: str) -> dict[str, Any]:
    return RUNS[run] | {
        "do": "train",
        "mesh": MESHES[topology],
        "restore": str(directory / f"{saved_on}, {run}"),
        "result": str(result_of(directory, topology, run, resumed=True)),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("pods")


def make_pod(directory, name, num_processes, num_devices, jobs):
    (directory / name).mkdir()
    return Pod(num_processes, num_devices, directory / name, jobs)


@pytest.fixture(scope="module")
def pod(directory):
    """Of each process, what the pod answers: its runs by name, draws and disagreements."""
    mesh = MESHES[POD]
    jobs = [
        {"do": "draw", "mesh": mesh},
        {"do": "disagree", "mesh": mesh},
        *(whole_run(directory, POD, run) for run in RUNS),
    ]
    [answers] = run_pods(make_pod(directory, "pod", 2, 4, jobs))
    return [
        {"draw": drawn, "disagree": said, **dict(zip(RUNS, runs, strict=True))}
        for drawn, said, *runs in answers
    ]


@pytest.fixture(scope="module")
def alone(directory, pod):
    """What one process answers, of one and of eight devices: whole runs, and resumed ones."""

    def jobs(topology):
        return [
            *(whole_run(directory, topology, run) for run in RUNS),
            *(resumed_run(directory, topology, run, saved_on=POD) for run in SAVED[POD]),
        ]

    answers = run_pods(
        make_pod(directory, "one", 1, 1, jobs(ONE)), make_pod(directory, "eight", 1, 8, jobs(EIGHT))
    )
    names = [*RUNS, *(f"{run}, resumed" for run in SAVED[POD])]
    return {
        topology: dict(zip(names, runs, strict=True))
        for topology, [runs] in zip((ONE, EIGHT), answers, strict=True)
    }


def assert_same_losses(run, found, expected):
    np.testing.assert_allclose(found, expected, rtol=LOSS_RTOL[RUNS[run]["name"]])


def assert_resumed(run, resumed, whole):
    assert resumed["depths"] == whole["depths"][SAVE_AT:]
    assert_same_losses(run, resumed["losses"], whole["losses"][SAVE_AT:])


def assert_same_results(directory, topology, run, *, resumed=False):
    """After the last step, parameters and state are those of the whole run on one device."""
    atol = STATE_ATOL[RUNS[run]["name"]]
    with (
        np.load(result_of(directory, ONE, run)) as expected,
        np.load(result_of(directory, topology, run, resumed=resumed)) as found,
    ):
        assert list(found) == list(expected)
        for name in expected:
            assert found[name].shape == expected[name].shape
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_as_one_does(directory, pod, alone, run):
    expected = alone[ONE][run]
    assert len(set(expected["depths"])) == {"cnn": 3}.get(run, 4)
    assert expected["losses"][-1] < 0.9 * expected["losses"][0]
    for topology, found in ((EIGHT, alone[EIGHT][run]), (POD, pod[0][run])):
        assert found["depths"] == expected["depths"]
        assert_same_losses(run, found["losses"], expected["losses"])
        assert_same_results(directory, topology, run)
    assert pod[0][run] == pod[1][run]


@pytest.mark.parametrize("run", RUNS)
def test_a_pod_compiles_each_depth_once(pod, alone, run):
    """With the runs that were resumed from a checkpoint in the same process."""
    num_programs = 1 if run == "gpt, depth traced" else len(set(pod[0][run]["depths"]))
    resumed = f"{run}, resumed" if run in SAVED[POD] else run
    for found in (pod[0][run], pod[1][run], alone[ONE][resumed], alone[EIGHT][resumed]):
        assert found["programs"] == num_programs


def test_processes_draw_the_same(pod):
    sampler = make_sampler("cnn")
    expected = [sampler.depth(step) for step in range(STEPS)]
    for process in pod:
        assert process["draw"] == [expected, expected]


def test_processes_that_would_draw_otherwise_get_an_error_that_names_both(pod):
    for said in (process["disagree"] for process in pod):
        for mesh in ("", ", on a mesh"):
            assert said[f"nothing{mesh}"] == ""
            for name, second in {
                "seed": f"process 1 has seed {OTHER_SEED} and step {STEP}",
                "step": f"process 1 has seed {SEED} and step {STEP + 1}",
                "layers": f"process 1 has seed {SEED} and step {STEP}",
                "distribution": f"process 1 has seed {SEED} and step {STEP}",
            }.items():
                message = said[f"{name}{mesh}"]
                assert f"process 0 has seed {SEED} and step {STEP}, layers" in message
                assert f"{second}, layers" in message
                assert "do not draw the same layers" in message
        assert said["seed, in a training step"] == said["seed"]
    assert pod[0]["disagree"] == pod[1]["disagree"]


@pytest.mark.parametrize("run", SAVED[POD])
@pytest.mark.parametrize("topology", [ONE, EIGHT])
def test_one_process_resumes_what_a_pod_has_saved(directory, alone, topology, run):
    assert_resumed(run, alone[topology][f"{run}, resumed"], alone[ONE][run])
    assert_same_results(directory, topology, run, resumed=True)
