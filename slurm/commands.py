"""Asking Slurm's own commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from slurm.errors import SlurmError

PATIENCE_S = 60  # a slurmctld that has not answered by then will not


def available() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None


def require_slurm() -> None:
    """Make sure that Slurm is here.

    Raises:
        SlurmError: it is not.
    """
    if not available():
        raise SlurmError("no Slurm here: 'sbatch' is not on the PATH; use --cluster local")


def require_controller() -> None:
    """Make sure that Slurm is here and answers.

    Raises:
        SlurmError: it is not, or its controller cannot be reached.
    """
    require_slurm()
    several = os.environ.get("SLURM_CLUSTERS", "")
    if "," in several or several == "all":
        raise SlurmError(
            f"SLURM_CLUSTERS is {several!r}, and the jobs of an experiment wait for each other on one"
            " cluster: name one"
        )
    try:
        ask(["scontrol", "ping"])
    except SlurmError as error:
        raise SlurmError(
            f"'sbatch' is on the PATH, but no Slurm controller answers ({error});"
            " mend that, or use --cluster local"
        ) from None


def site_config() -> dict[str, str]:
    """What Slurm's own configuration says, by key, such as ClusterName and MaxArraySize.

    Raises:
        SlurmError: scontrol does not answer.
    """
    pairs = (line.partition("=") for line in ask(["scontrol", "show", "config"]).splitlines())
    return {key.strip(): value.strip() for key, separator, value in pairs if separator}


def ask(command: Sequence[str]) -> str:
    """What a Slurm command prints.

    Raises:
        SlurmError: it is not there, fails, or does not answer.
    """
    # Without the first, a long list of pending array elements ends in "…"; the others make times comparable.
    environment = {**os.environ, "SLURM_BITSTR_LEN": "0", "TZ": "UTC", "SLURM_TIME_FORMAT": "standard"}
    try:
        ran = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=PATIENCE_S,
        )
    except FileNotFoundError:
        raise SlurmError(f"no Slurm here: '{command[0]}' is not on the PATH; use --cluster local") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"'{command[0]}' has not answered for {PATIENCE_S} s; is slurmctld up?") from None
    if ran.returncode:
        raise SlurmError(f"'{command[0]}' failed: {one_line(ran.stderr) or f'exit code {ran.returncode}'}")
    return ran.stdout


def one_line(said: str) -> str:
    """What a Slurm command complained about, without its ``sbatch: error:`` and on one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line] or lines
    return "; ".join(dict.fromkeys(line.split("error: ", 1)[-1] for line in errors))
