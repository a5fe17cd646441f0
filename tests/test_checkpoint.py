"""A run that is saved, restored in a new process and continued is the uninterrupted run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import chex
import orbax.checkpoint as ocp
import pytest

import checkpointed_run


def run_in_a_process(*arguments):
    program = Path(checkpointed_run.__file__)
    command = [sys.executable, str(program), *map(str, arguments)]
    # Bits do not depend on how quickly they were compiled, only on that being the same each time.
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    return ast.literal_eval(answer.stdout.strip().splitlines()[-1])


def test_a_resumed_run_is_bit_identical(tmp_path):
    # Saves on its way, and goes on.
    whole_depths = run_in_a_process(0, 12, tmp_path / "whole", 5)
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "5").rename(tmp_path / "parts" / "5")
    later_depths = run_in_a_process(5, 12, tmp_path / "parts")
    assert later_depths == whole_depths[5:]
    assert len(set(whole_depths)) == 3  # every depth occurs, so frozen layers are reactivated

    restore = ocp.StandardCheckpointer().restore
    whole, parts = restore(tmp_path / "whole" / "12"), restore(tmp_path / "parts" / "12")
    chex.assert_trees_all_equal(whole, parts)
    before = restore(tmp_path / "parts" / "5")
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(before["params"], whole["params"])
