"""Bringing a testbed up and taking it down."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from slurm.errors import SlurmError
from slurm.testbed import network
from slurm.testbed.processes import Daemon, end, not_installed, start, start_time, succeeds, wait_until
from slurm.testbed.settings import Settings, free_ports, gres_conf, slurm_conf, slurmdbd_conf

RECORD = "testbed.json"
HOSTS = Path("/etc/hosts")
MUNGE_KEY = Path("/etc/munge/munge.key")
MUNGE_RECORD = Path("/run/munge/testbed.json")


class Testbed:
    """The cluster in a folder.

    Args:
        folder: holds its configuration, state, database, logs, and the record of its processes.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.conf = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf)}
        self.log = self.folder / "log"

    def exists(self) -> bool:
        return (self.folder / RECORD).is_file()

    def settings(self) -> Settings:
        return Settings(**self._record()["settings"])

    def daemons(self) -> list[Daemon]:
        """The processes that ``up`` has started, dead ones too."""
        return [Daemon(**entry) for entry in self._record()["daemons"]]

    def is_up(self) -> bool:
        return self.exists() and all(daemon.alive() for daemon in self.daemons()) and self._nodes_ready()

    def up(self, settings: Settings) -> None:
        """Bring the cluster up, unless it is up already.

        Raises:
            SlurmError: not root, a program is missing, a daemon does not come up, or a cluster with other
                settings is up in this folder.
        """
        if self.is_up():
            if self.settings() != settings:
                raise SlurmError(f"a testbed with other settings is up in {self.folder}; take it down first")
            return
        _require_root()
        if self.exists():  # what a reboot or an accident has left of one
            self.down()
        if self.folder.exists() and any(self.folder.iterdir()):
            raise SlurmError(f"{self.folder} holds other things; give the testbed a folder of its own")
        for name in ("log", "state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o755)
        ports = free_ports(settings.ports_needed)
        self.conf.write_text(slurm_conf(settings, self.folder, ports), encoding="utf-8")
        (self.folder / "gres.conf").write_text(gres_conf(settings), encoding="utf-8")
        self._remember(settings, [])
        if settings.networks:
            network.build(settings.node_names)
        name_nodes({name: settings.address(n) for n, name in enumerate(settings.node_names, start=1)})
        try:
            self._start_all(settings, ports)
        except BaseException:
            self._end_all()
            raise

    def _start_all(self, settings: Settings, ports: Sequence[int]) -> None:
        start_munge(self.log)
        if settings.accounting:
            self._start_database(ports[-1])
            self._start_slurmdbd(ports)
        self._start_controller()
        for name in settings.node_names:
            self._start_node(name)
        wait_until(self._nodes_ready, "the nodes", log=self.log / "slurmctld.log")

    def _start_controller(self) -> None:
        controller = ["slurmctld", "-D", "-f", str(self.conf)]
        self._add(start("slurmctld", controller, log=self.log / "output.log", environment=self.environment))

    def _start_node(self, name: str) -> None:
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        node = ["slurmd", "-D", "-N", name, "-f", str(self.conf)]
        if self.settings().networks:
            node = [*network.inside(name), *node]
        self._add(start(f"slurmd {name}", node, log=self.log / "output.log", environment=self.environment))

    def lose_node(self, name: str) -> None:
        """Kill everything that runs on a node, as a power cut does, and have Slurm notice it at once."""
        self._kill(f"slurmd {name}")
        for process in self._processes_of_node(name):
            process.send(signal.SIGKILL)
        self._scontrol("update", f"nodename={name}", "state=down", "reason=lost")

    def bring_back_node(self, name: str) -> None:
        """Start a lost node again, and wait until jobs can use it."""
        self._start_node(name)
        self._scontrol("update", f"nodename={name}", "state=resume")
        wait_until(self._nodes_ready, f"node {name}", log=self.log / f"slurmd.{name}.log")

    def cut_off_node(self, name: str) -> None:
        """Cut a node off from the network, with all that runs on it; needs ``networks``."""
        network.cut(name)

    def reconnect_node(self, name: str) -> None:
        """Undo ``cut_off_node``."""
        network.mend(name)

    def restart_controller(self) -> None:
        """Kill slurmctld, as a crash does, and start it again; it finds its jobs in its state folder."""
        self._kill("slurmctld")
        self._start_controller()
        wait_until(self._nodes_ready, "slurmctld", log=self.log / "slurmctld.log")

    def lose_accounting(self) -> None:
        """Kill slurmdbd, as a crash does: sacct fails from now on."""
        self._kill("slurmdbd")

    def bring_back_accounting(self) -> None:
        """Start slurmdbd again, and wait until sacct answers; slurmctld hands in what it has kept."""
        log = self.log / "output.log"
        self._add(start("slurmdbd", ["slurmdbd", "-D"], log=log, environment=self.environment))
        wait_until(lambda: succeeds(["sacct"], self.environment), "slurmdbd", log=self.log / "slurmdbd.log")

    def _kill(self, name: str) -> None:
        """Kill a daemon and forget it."""
        killed = [daemon for daemon in self.daemons() if daemon.name == name]
        end(killed, patience=0)
        self._remember(self.settings(), [daemon for daemon in self.daemons() if daemon not in killed])

    def _processes_of_node(self, name: str) -> list[Daemon]:
        """The job steps on a node and what runs in them."""
        wanted = [f"SLURMD_NODENAME={name}".encode(), f"SLURM_CONF={self.conf}".encode()]
        found: dict[int, Daemon] = {}
        for pid, command in _processes():
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
                parent = int(facts.rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if all(entry in environment for entry in wanted):
                found[pid] = Daemon(command, pid, start_time(pid) or 0)
                try:
                    if Path(f"/proc/{parent}/comm").read_text(encoding="utf-8").strip() == "slurmstepd":
                        found[parent] = Daemon("slurmstepd", parent, start_time(parent) or 0)
                except OSError:
                    continue
        return list(found.values())

    def _scontrol(self, *words: str) -> None:
        environment = {**os.environ, **self.environment}
        subprocess.run(["scontrol", *words], env=environment, check=True, capture_output=True, timeout=30)

    def _start_database(self, port: int) -> None:
        data, socket = self.folder / "database", self.folder / "database.sock"
        log = self.log / "mariadb.log"
        install = [
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={data}",
            "--user=root",
            "--skip-test-db",
        ]
        install += ["--auth-root-authentication-method=normal", "--skip-name-resolve"]
        try:
            made = subprocess.run(install, capture_output=True, text=True)
        except FileNotFoundError:
            raise SlurmError(not_installed(install[0])) from None
        if made.returncode:
            raise SlurmError(
                f"mariadb-install-db failed: {' '.join((made.stderr or made.stdout).split())[-200:]}"
            )
        server = ["mariadbd", "--no-defaults", f"--datadir={data}", "--user=root", f"--socket={socket}"]
        server += ["--bind-address=127.0.0.1", f"--port={port}", f"--pid-file={self.folder}/mariadb.pid"]
        server += [
            "--innodb-buffer-pool-size=64M",
            "--innodb-flush-log-at-trx-commit=0",
            "--skip-name-resolve",
        ]
        server += ["--innodb-lock-wait-timeout=900"]  # slurmdbd complains about less
        self._add(start("mariadbd", server, log=log))
        client = ["mariadb", "--no-defaults", f"--socket={socket}", "--user=root"]
        wait_until(lambda: succeeds([*client, "-e", "SELECT 1"]), "MariaDB", log=log)
        password = secrets.token_hex(16)
        private = self.folder / "slurmdbd.conf"
        private.touch(mode=0o600)
        private.write_text(password, encoding="utf-8")
        grant = (
            f"CREATE DATABASE slurm; GRANT ALL ON slurm.* TO slurm@'127.0.0.1' IDENTIFIED BY '{password}';"
        )
        subprocess.run(client, input=grant, text=True, check=True, capture_output=True)

    def _start_slurmdbd(self, ports: Sequence[int]) -> None:
        private = self.folder / "slurmdbd.conf"
        private.write_text(
            slurmdbd_conf(self.folder, ports, private.read_text(encoding="utf-8")), encoding="utf-8"
        )
        # It looks for its file beside slurm.conf.
        self._add(
            start("slurmdbd", ["slurmdbd", "-D"], log=self.log / "output.log", environment=self.environment)
        )
        register = ["sacctmgr", "--immediate", "add", "cluster", "testbed"]
        wait_until(lambda: succeeds(register, self.environment), "slurmdbd", log=self.log / "slurmdbd.log")

    def down(self) -> None:
        """Cancel all jobs, end the processes that ``up`` has started, and remove the folder's contents.

        Raises:
            SlurmError: there is no testbed in this folder.
        """
        if not self.exists():
            raise SlurmError(f"no testbed in {self.folder}")
        self._end_all()
        shutil.rmtree(self.folder)

    def _end_all(self) -> None:
        daemons = self.daemons()
        if any(daemon.name == "slurmctld" and daemon.alive() for daemon in daemons):
            self._cancel_jobs()
        slurmds = [daemon for daemon in daemons if daemon.name.startswith("slurmd ")]
        end(slurmds)
        end(self._steps())
        for name in ("slurmctld", "slurmdbd", "mariadbd"):
            end([daemon for daemon in daemons if daemon.name == name], patience=15)
        if self.settings().networks:
            network.remove(self.settings().node_names)
        if not any(_slurm_processes()):  # testbeds share one munged: the last one ends it
            end_munge()

    def _cancel_jobs(self) -> None:
        environment = {**os.environ, **self.environment}
        for state in ("PENDING", "RUNNING", "SUSPENDED"):
            subprocess.run(["scancel", f"--state={state}"], env=environment, capture_output=True, timeout=30)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            left = subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True, text=True)
            if not left.stdout.strip():
                return
            time.sleep(0.1)

    def _steps(self) -> Iterator[Daemon]:
        """The job steps of this cluster's nodes, which outlive their slurmd."""
        for pid, name in _processes():
            if name == "slurmstepd":
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                if str(self.folder).encode() in command + environment:
                    yield Daemon(name, pid, start_time(pid) or 0)

    def _nodes_ready(self) -> bool:
        listed = subprocess.run(
            ["sinfo", "--noheader", "--Node", "-p", "main", "-o", "%T"],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
        )
        states = listed.stdout.split()
        return len(states) == self.settings().nodes and set(states) <= {
            "idle",
            "mixed",
            "allocated",
            "completing",
        }

    def _record(self) -> dict:
        try:
            return json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except OSError:
            raise SlurmError(f"no testbed in {self.folder}") from None

    def _remember(self, settings: Settings, daemons: Sequence[Daemon]) -> None:
        record = {"settings": asdict(settings), "daemons": [asdict(daemon) for daemon in daemons]}
        (self.folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _add(self, daemon: Daemon) -> None:
        self._remember(self.settings(), [*self.daemons(), daemon])


def start_munge(log: Path) -> None:
    """Make sure that munge answers, and write down the munged that has to be started for it, if any.

    Raises:
        SlurmError: munge is not installed or does not answer.
    """
    if shutil.which("munge") is None:
        raise SlurmError(not_installed("munge"))
    if _munge_answers():
        return
    if not MUNGE_KEY.exists():
        MUNGE_KEY.touch(mode=0o600)
        MUNGE_KEY.write_bytes(secrets.token_bytes(128))
        shutil.chown(MUNGE_KEY, "munge", "munge")
    for folder in (MUNGE_RECORD.parent, Path("/var/log/munge"), Path("/var/lib/munge")):
        folder.mkdir(exist_ok=True, mode=0o755)
        shutil.chown(folder, "munge", "munge")
    started = start("munged", ["munged", "--foreground"], log=log / "munged.log", user="munge")
    wait_until(_munge_answers, "munge", log=log / "munged.log")
    if started.alive():  # else another testbed was faster
        MUNGE_RECORD.write_text(json.dumps(asdict(started)), encoding="utf-8")


def end_munge() -> None:
    """End the munged that a testbed has started; one that was there before stays."""
    if MUNGE_RECORD.exists():
        end([Daemon(**json.loads(MUNGE_RECORD.read_text(encoding="utf-8")))])
        MUNGE_RECORD.unlink(missing_ok=True)


def _munge_answers() -> bool:
    credential = subprocess.run(["munge", "-n"], capture_output=True, text=True)
    return credential.returncode == 0 and succeeds(["unmunge"], given=credential.stdout)


def name_nodes(addresses: Mapping[str, str]) -> None:
    """Make the nodes' names known: rank 0's becomes MASTER_ADDR."""
    text = HOSTS.read_text(encoding="utf-8")
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    known = {name for line in lines for name in line[1:]}
    missing = [
        f"{address} {name} # a node of a Slurm testbed\n"
        for name, address in addresses.items()
        if name not in known
    ]
    if missing:
        with HOSTS.open("a", encoding="utf-8") as hosts:
            hosts.write(("" if text.endswith("\n") or not text else "\n") + "".join(missing))


def _require_root() -> None:
    if os.geteuid() != 0:
        raise SlurmError("a testbed needs root: its daemons and /etc/hosts do; try it in a container")


def _slurm_processes() -> Iterator[int]:
    for pid, name in _processes():
        if name in ("slurmctld", "slurmd", "slurmdbd"):
            yield pid


def _processes() -> Iterator[tuple[int, str]]:
    """Every living process's id and name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and start_time(int(entry.name)) is not None:
            try:
                yield int(entry.name), (entry / "comm").read_text(encoding="utf-8").strip()
            except OSError:
                continue
