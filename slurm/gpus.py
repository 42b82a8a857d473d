"""How a job asks for its GPUs: by number or by type, in the option that the site takes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from slurm.errors import SlurmError

if TYPE_CHECKING:
    from slurm.profiles import Profile
    from slurm.resources import Request

MIG = re.compile(r"\d+g\.\d+gb")  # in the type of a slice of a GPU (Multi-Instance GPU), such as a100_1g.5gb


def gpu_options(request: Request, profile: Profile) -> dict[str, Any]:
    """The options of sbatch that ask for a job's GPUs, and the profile's ``extra`` without any others.

    Exactly one option asks for GPUs: ``gpus-per-node`` or ``gres`` of ``extra`` if it names some, else
    ``gpu_option`` with ``gpu_type``. GPUs are asked for by node and not by task: so each rank sees all its
    node's GPUs, and LOCAL_RANK indexes them. A job that computes on no GPU gets none of these options.

    Raises:
        SlurmError: slices of a GPU (MIG) for several ranks, which cannot talk to each other over NCCL; or an
            ``extra`` with fewer GPUs than the job has ranks on a node.
    """
    options = {name: value for name, value in profile.extra.items() if value is not False}
    others, named = _split(str(options.pop("gres", "")))
    if "gpus-per-node" in options:
        by_node = str(options.pop("gpus-per-node"))
        named, option = [by_node], "gpus-per-node"
    else:
        option = "gres"
    number = request.gpus_per_rank * request.ranks_per_node
    if number and not named:
        type_ = profile.gpu_type if request.gpu_type is None else request.gpu_type
        option = profile.gpu_option
        text = f"{type_}:{number}" if type_ else str(number)
        named = [f"gpu:{text}" if option == "gres" else text]
    elif number:
        _require_one_a_rank(option, named, number)
    if not number:
        named = []
    elif request.gpus > 1 and any(MIG.search(text) for text in named):
        raise SlurmError(
            f"{', '.join(named)}: slices of a GPU (MIG) serve one rank each and cannot be joined, and"
            f" {request.ranks} ranks are asked for: set nodes and ranks_per_node to 1, or ask for whole GPUs"
        )
    if named and option == "gpus-per-node":
        options[option] = named[0]
        named = []
    if others + named:
        options["gres"] = ",".join(others + named)
    return options


def _split(gres: str) -> tuple[list[str], list[str]]:
    """The entries of a ``--gres``: those of other things, and those of GPUs."""
    entries = [entry for entry in gres.split(",") if entry]
    gpus = [entry for entry in entries if re.match(r"(gres[:/])?gpu(?![^:=])", entry)]
    return [entry for entry in entries if entry not in gpus], gpus


def _require_one_a_rank(option: str, named: list[str], number: int) -> None:
    """Raises SlurmError where a profile's own request gives a node fewer GPUs than it has ranks."""
    asked = 0
    for text in ",".join(named).split(","):
        last = re.split("[:=]", text)[-1]
        asked += int(last) if last.isdecimal() else 1
    if asked < number:
        raise SlurmError(
            f"extra.{option}: {','.join(named)!r} asks for fewer GPUs a node than the {number} ranks that a"
            " job has there, which need one each: name the type in gpu_type and leave the number out"
        )
