"""Several processes train as one does, draw the same layers, and restore what others saved."""

import numpy as np
import pytest

from pods.launch import Pod, run_pods
from pods.process import NETWORKS, OTHER_SEED, SAVE_AT, SEED, STEPS

ONE, EIGHT, TWO_BY_FOUR = ({"data": d, "fsdp": f} for d, f in ((1, 1), (4, 2), (2, 4)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("pods")


@pytest.fixture(scope="module")
def one(directory):
    """The run of each network on one device."""
    return run_pods(Pod(ONE, directory / "one"))[0][0]


@pytest.fixture(scope="module")
def pod(directory):
    """Of each of two processes of four devices, what it answers."""
    return run_pods(Pod(TWO_BY_FOUR, directory / "pod", num_processes=2))[0]


@pytest.fixture(scope="module")
def resumed(directory, pod):
    """The runs of one process that starts from what the pod has saved, by its devices."""
    on = {"one": ONE, "eight": EIGHT}
    answers = run_pods(*(Pod(axes, directory / "pod", resumes=True) for axes in on.values()))
    return {name: answer for name, [answer] in zip(on, answers, strict=True)}


def test_a_run_that_is_resumed_in_a_new_process_is_bit_identical(directory, one):
    [[resumed]] = run_pods(Pod(ONE, directory / "one", resumes=True))
    assert set(one["flat"]["depths"]) == {0, 1, 2}  # so that frozen layers are active again
    for network in NETWORKS:
        assert resumed[network]["depths"] == one[network]["depths"][SAVE_AT:]
        assert resumed[network]["losses"] == one[network]["losses"][SAVE_AT:]
        assert resumed[network]["last"] == one[network]["last"]


def assert_same_run(run, expected, start=0):
    """Depths and losses of its steps, and the last parameters and state, as on one device."""
    assert run["depths"] == expected["depths"][start:]
    np.testing.assert_allclose(run["losses"], expected["losses"][start:], rtol=1e-12)
    for leaf, of_one in zip(run["last"], expected["last"], strict=True):
        np.testing.assert_allclose(leaf, of_one, rtol=0, atol=1e-11, strict=True)


@pytest.mark.deep
@pytest.mark.parametrize("network", NETWORKS)
def test_two_processes_train_as_one_does(one, pod, network):
    losses = one[network]["losses"]
    assert losses[-1] < 0.9 * losses[0]
    assert pod[0][network] == pod[1][network]
    assert_same_run(pod[0][network], one[network])


@pytest.mark.deep
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("devices", ["one", "eight"])
def test_one_process_resumes_what_a_pod_has_saved(one, resumed, devices, network):
    assert_same_run(resumed[devices][network], one[network], SAVE_AT)


@pytest.mark.deep
@pytest.mark.parametrize("network", NETWORKS)
def test_each_depth_is_compiled_once(pod, resumed, network):
    for run in (pod[0][network], pod[1][network], resumed["eight"][network]):
        assert run["programs"] == (1 if network == "stacked" else len(set(run["depths"])))


@pytest.mark.deep
def test_processes_that_would_draw_otherwise_get_an_error_that_names_both(pod):
    said = pod[0]["disagreements"]
    assert pod[1]["disagreements"] == said
    assert said.pop("nothing") == said.pop("nothing, on a mesh") == ""
    for name, message in said.items():
        seed = OTHER_SEED if name.startswith("seed") else SEED
        step = STEPS + 1 if name == "step" else STEPS
        assert f"process 0 has seed {SEED} and step {STEPS}, layers" in message
        assert f"process 1 has seed {seed} and step {step}, layers" in message
        assert "do not draw the same layers" in message


# Workers that send compressed, each in a process of its own.
FOUR = {"workers": 4}


@pytest.fixture(scope="module")
def workers(directory):
    """Of each of four processes, what it answers."""
    return run_pods(Pod(FOUR, directory / "four", num_processes=4, module="workers"))[0]


@pytest.mark.deep
def test_four_processes_that_send_compressed_are_four_devices_of_one_bit_for_bit(
    directory, workers
):
    """Since each adds up what all have sent by itself, in one order, which collectives do not."""
    [[one]] = run_pods(Pod(FOUR, directory / "devices", module="workers"))
    assert one["losses"] == workers[0]["losses"]
    for of_what in ("bits", "averaged"):  # of norm_ec, which sends everything
        assert {of[of_what] for of in workers} == {one[of_what]}
    first, last = (np.mean(workers[0]["losses"][i]) for i in (0, -1))
    assert last < first


@pytest.mark.deep
def test_processes_that_start_again_from_a_checkpoint_go_on_bit_for_bit(directory, workers):
    pod = Pod(FOUR, directory / "four", resumes=True, num_processes=4, module="workers")
    [resumed] = run_pods(pod)
    assert [of["bits"] for of in resumed] == [of["bits"] for of in workers]
    assert resumed[0]["losses"] == workers[0]["losses"][3:]
    assert all(of["differ"] for of in (*resumed, *workers))


@pytest.mark.deep
def test_processes_with_other_seeds_or_compressors_get_an_error_that_names_both(workers):
    said = workers[0]["disagreements"]
    assert said.pop("nothing") == ""
    for message in said.values():
        assert "process 0 has seed 0 and compressor" in message
        assert "process 1 has seed" in message
        assert "would not understand each other's payloads" in message
    assert "process 1 has seed 1" in said["seed"]
