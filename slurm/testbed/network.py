"""A network of its own for each node of a testbed, so that a node can be cut off without being ended.

Each node is a network namespace with one interface, eth0; a bridge on the host joins them. Jobs that talk
over gloo need GLOO_SOCKET_IFNAME=eth0. One testbed of a machine can have such networks at a time.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from slurm.errors import SlurmError
from slurm.testbed.processes import not_installed

BRIDGE = "slurmtestbed"
SUBNET = "10.203.0"
HOST = f"{SUBNET}.254"


def address(number: int) -> str:
    """Of the node with this number, from 1."""
    return f"{SUBNET}.{number}"


def inside(name: str) -> list[str]:
    """What a command is preceded by to run on a node's network (`ip netns exec` would also hide cgroups)."""
    return ["nsenter", f"--net=/run/netns/{_space(name)}"]


def build(names: Sequence[str]) -> None:
    """Make the bridge and the nodes' networks.

    Raises:
        SlurmError: ``ip`` is missing, or not allowed to.
    """
    remove(names)
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("address", "add", f"{HOST}/24", "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")
    for number, name in enumerate(names, start=1):
        space = _space(name)
        _ip("netns", "add", space)
        _ip("link", "add", _cable(name), "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", _cable(name), "master", BRIDGE, "up")
        _ip("-n", space, "address", "add", f"{address(number)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", space, "link", "set", device, "up")


def remove(names: Sequence[str]) -> None:
    """Remove what ``build`` made, as far as it is there."""
    for name in names:
        subprocess.run(["ip", "netns", "delete", _space(name)], capture_output=True)
        subprocess.run(["ip", "link", "delete", _cable(name)], capture_output=True)
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)


def cut(name: str) -> None:
    """Pull a node's cable: nobody is told."""
    _ip("link", "set", _cable(name), "down")


def mend(name: str) -> None:
    """Plug it in again."""
    _ip("link", "set", _cable(name), "up")


def _space(name: str) -> str:
    return f"testbed-{name}"


def _cable(name: str) -> str:
    return f"tb-{name}"


def _ip(*words: str) -> None:
    try:
        ran = subprocess.run(["ip", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise SlurmError(not_installed("ip")) from None
    if ran.returncode:
        raise SlurmError(f"'ip {' '.join(words)}' failed: {' '.join(ran.stderr.split())}")
