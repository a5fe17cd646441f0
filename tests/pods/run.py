"""One process of a pod: `python -m pods.run SETTINGS`, as launch.py starts it.

Each of its "jobs" is {"do": a function of JOBS, "mesh": shape, **keywords of the function}. They
are done in their order, and the last line on standard output is a JSON list of what they return.
"""

import faulthandler
import json
import os
import sys
import traceback
from typing import Any

import jax

from pods import agreement
from pods.train import make_mesh, train

JOBS = {"train": train, "draw": agreement.draw, "disagree": agreement.disagree}


def main(settings: dict[str, Any]) -> None:
    """Joins the pod, if it has several processes, and does the jobs."""
    # Says where it hangs, and ends by itself even if nobody is left to end it.
    faulthandler.dump_traceback_later(0.9 * settings["time_limit"], exit=True)
    num_processes = settings["num_processes"]
    if num_processes > 1:
        jax.distributed.initialize(
            settings["address"],
            num_processes,
            settings["process"],
            coordinator_bind_address=settings["address"],  # by default that is any address
            initialization_timeout=int(settings["time_limit"] / 2),
        )
    assert (jax.process_count(), jax.local_device_count()) == (
        num_processes,
        settings["num_devices"],
    )
    answers = []
    for job in settings["jobs"]:
        keywords = {name: value for name, value in job.items() if name not in ("do", "mesh")}
        answers.append(JOBS[job["do"]](make_mesh(*job["mesh"]), **keywords))
    print(json.dumps(answers), flush=True)
    if num_processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # `sys.exit` would wait for the others, and they for this one
