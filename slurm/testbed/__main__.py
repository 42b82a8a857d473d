"""The command line: ``python -m slurm.testbed up|down|status``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from slurm.errors import SlurmError
from slurm.testbed.cluster import Testbed
from slurm.testbed.settings import Settings


def parser() -> argparse.ArgumentParser:
    default = Settings()
    made = argparse.ArgumentParser(
        prog="python -m slurm.testbed",
        description="A real Slurm of several nodes, with accounting, on this machine (as root).",
    )
    made.add_argument("verb", choices=("up", "down", "status"))
    made.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()) / "slurm-testbed", help="its folder"
    )
    made.add_argument(
        "--nodes", type=int, default=default.nodes, help="how many nodes (default: %(default)s)"
    )
    made.add_argument(
        "--cpus", type=int, default=default.cpus, help="CPUs each claims (default: %(default)s)"
    )
    made.add_argument("--no-accounting", action="store_true", help="without slurmdbd, as on some sites")
    made.add_argument(
        "--max-array-size", type=int, default=default.max_array_size, help="(default: %(default)s)"
    )
    made.add_argument(
        "--gpu-nodes", type=int, default=default.gpu_nodes, help="that claim two GPUs (default: %(default)s)"
    )
    made.add_argument("--networks", action="store_true", help="each node has its own, to be cut off")
    made.add_argument(
        "--requeue-seconds",
        type=int,
        default=default.requeue_seconds,
        help="how long a requeued job waits (default: Slurm's own %(default)s)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    testbed = Testbed(given.dir)
    try:
        if given.verb == "down":
            testbed.down()
            print(f"the testbed in {testbed.folder} is down")
        elif given.verb == "up":
            clock = time.monotonic()
            testbed.up(
                Settings(
                    nodes=given.nodes,
                    cpus=given.cpus,
                    accounting=not given.no_accounting,
                    max_array_size=given.max_array_size,
                    requeue_seconds=given.requeue_seconds,
                    networks=given.networks,
                    gpu_nodes=given.gpu_nodes,
                )
            )
            print(
                f"# up after {time.monotonic() - clock:.1f} s; sinfo shows it, sbatch and srun use it after:"
            )
            print(f"export SLURM_CONF={testbed.conf}")
        elif testbed.is_up():
            print(f"# {testbed.settings()}")
            print(f"export SLURM_CONF={testbed.conf}")
        else:
            print(f"no testbed is up in {testbed.folder}")
            return 1
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
