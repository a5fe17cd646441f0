"""The script that people copy: it learns, logs, and goes on bit for bit where it was killed."""

import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytestmark = pytest.mark.deep
ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "train_gpt.py"
SMALL = (
    "--steps 16 --width 32 --blocks 2 --heads 2 --layers 2 --batch-size 8 --context 16 "
    "--log-every 1 --save-every 4 --warmup 2"
).split()


def start(folder, devices, *arguments):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--folder", str(folder), *SMALL, *arguments],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process):
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0
    return said


def last_checkpoint(folder):
    """As NumPy, whatever devices it was saved from."""
    path = folder / "checkpoints" / "15" / "default"
    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(path).item_metadata.tree
        to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return jax.tree.leaves(reader.restore(path, restore_args=to_numpy))


def scalars(folder):
    """What TensorBoard shows: the value of each tag in each step, the last one written."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((folder / "logs").glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    return found


@pytest.mark.parametrize(("depths", "devices"), [("time_aware", 2), ("uniform", 1)])
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, depths, devices):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, devices, "--depths", depths))

    with start(killed, devices, "--depths", depths) as process:
        for line in process.stdout:
            if line.startswith("step 10:"):  # checkpoints of 0, 4 and 8 are begun
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    said = finish(start(killed, devices, "--depths", depths))

    first = int(re.search(r"Goes on with step (\d+)\.", said).group(1))
    assert first in (5, 9)
    assert f"step {first}:" in said
    assert "step 4:" not in said
    for left, right in zip(last_checkpoint(whole), last_checkpoint(killed), strict=True):
        np.testing.assert_array_equal(left, right)
    logged, again = scalars(whole), scalars(killed)
    assert logged[("validation", 15)] < logged[("validation", 0)]
    losses = [of for of in logged if of[0] != "steps_per_second"]
    assert len(losses) == 32
    assert [logged[of] for of in losses] == [again[of] for of in losses]


def test_files_of_the_user_are_learned(tmp_path):
    (tmp_path / "text").write_text("abcdefgh" * 400)
    text = ("--text", str(tmp_path / "text"), "--depths", "full", "--learning-rate", "0.1")
    finish(start(tmp_path / "run", 1, *text))
    logged = scalars(tmp_path / "run")
    assert logged[("train", 15)] < 0.7 * logged[("train", 0)]
