"""How the ranks of a task find one another, and notice that one of them is gone.

Rank 0 serves a key-value store (:class:`torch.distributed.TCPStore`). Its port is derived from the job, so
that every rank knows where to look; where somebody else listens there, the next of a few is taken. Through
the store every rank then counts up every few seconds. A machine that is cut off sends no goodbye, and a
collective that waits for it waits for half an hour: the counts tell sooner, and they tell which rank.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from pipeline.errors import UserError, one_line
from pipeline.ranks import Ranks, host, rendezvous_ports

MEET_S = 600.0  # for all ranks to come
TRY_S = 10.0  # for one port to answer as a store of this job
BEAT_S = 3.0
PAUSE_S = 0.3
_HERE = "127.0.0.1"  # for rank 0 itself; its store listens on every address
_TOKEN = "open"  # a key that tells this job's store from another's on the same port


@dataclass(frozen=True)
class Meeting:
    """Where the ranks have met.

    Attributes:
        name: of this start of this job; the store may serve others.
        address, port: of the store, as this rank reaches it.
        store: this rank's connection; on rank 0 also the server, which lives as long as this object.
    """

    name: str
    address: str
    port: int
    store: dist.TCPStore

    def named(self) -> dist.Store:
        """The store, with keys of this start of this job only."""
        return dist.PrefixStore(self.name, self.store)

    def another(self) -> dist.Store:
        """The same through a connection of its own, which no long wait of this one holds up."""
        return dist.PrefixStore(self.name, _connect(self.address, self.port))


def meet(ranks: Ranks, *, seconds: float = MEET_S) -> Meeting:
    """Find the other ranks of this start of the job; returns when all have come.

    Args:
        ranks: this process's place.
        seconds: to wait for the others.

    Raises:
        UserError: rank 0 cannot be reached, or ranks are missing; the message names them.
    """
    deadline = time.monotonic() + seconds
    serve = ranks.rank == 0
    if ranks.source == "torchrun":
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            serve = False  # the agent does
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        name, ports = f"{ranks.job}-{attempt}", [ranks.master_port]
    else:
        name, ports = ranks.job, rendezvous_ports(ranks.master_port)
    meeting = _serve(ports, name) if serve else _find(ranks, ports, name, deadline)
    store = meeting.named()
    store.set(f"here/{ranks.rank}", host())
    if ranks.rank == 0:
        store.set(_TOKEN, "1")
        _wait_for_all(store, ranks.world_size, deadline, seconds)
    return meeting


def _serve(ports: list[int], name: str) -> Meeting:
    """Rank 0's store, on the first port that is free."""
    last = ""
    for port in ports:
        try:
            store = dist.TCPStore(_HERE, port, None, True, wait_for_workers=False)
            return Meeting(name, _HERE, port, store)
        except RuntimeError as error:  # torch's own errors are RuntimeErrors
            last = one_line(error)
    raise UserError(f"rank 0 finds no free port among {', '.join(map(str, ports))}: {last}")


def _connect(address: str, port: int) -> dist.TCPStore:
    """A client of the store at a port. What listens there may be anything, and may never answer.

    Raises:
        OSError, RuntimeError: no store has answered within ``TRY_S``.
    """
    socket.create_connection((address, port), timeout=TRY_S).close()
    timeout = timedelta(seconds=TRY_S)
    found: list[dist.TCPStore | Exception] = []

    def connect() -> None:  # it waits for an answer without a limit
        try:
            found.append(dist.TCPStore(address, port, None, False, wait_for_workers=False, timeout=timeout))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=connect, name="connect", daemon=True)
    thread.start()
    thread.join(TRY_S)
    if not found:
        raise TimeoutError(f"what listens at port {port} does not answer")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _find(ranks: Ranks, ports: list[int], name: str, deadline: float) -> Meeting:
    """Rank 0's store: the one among the ports that knows this start of this job."""
    last = "nobody answers"
    while time.monotonic() < deadline:
        for port in ports:
            try:
                meeting = Meeting(name, ranks.master_addr, port, _connect(ranks.master_addr, port))
                if ranks.source == "torchrun" or meeting.named().check([_TOKEN]):
                    return meeting
                last = f"port {port} belongs to another job"
            except (OSError, RuntimeError) as error:
                last = one_line(error)
        time.sleep(PAUSE_S)
    raise UserError(
        f"rank {ranks.rank} on {host()} could not reach rank 0 at {ranks.master_addr},"
        f" ports {', '.join(map(str, ports))}: {last}"
    )


def _wait_for_all(store: dist.Store, world_size: int, deadline: float, seconds: float) -> None:
    missing = list(range(world_size))
    while missing:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise UserError(
                f"rank {', '.join(map(str, missing[:8]))} of {world_size} did not come within {seconds:.0f} s"
            )
        if missing:
            time.sleep(PAUSE_S)


class Watch:
    """Two threads of every rank: one counts up in the store, one calls ``on_lost`` when a rank is silent.

    Rank 0 looks at all counts; what it finds, it leaves in the store for the others. These look at whether
    the store still answers. A process that was stopped as a whole for a while does not blame the others.

    Args:
        store: of :meth:`Meeting.another`.
        ranks: this process's place.
        silence_s: a rank that has not counted up for so long is gone.
        on_lost: told which rank on which host, in one line; it is expected to end the process.
    """

    def __init__(
        self, store: dist.Store, ranks: Ranks, *, silence_s: float, on_lost: Callable[[str], None]
    ) -> None:
        self.store, self.ranks, self.silence_s, self.on_lost = store, ranks, silence_s, on_lost
        self.beat_s = min(BEAT_S, silence_s / 4)
        if ranks.rank:  # let rank 0, which hears everybody, speak first
            self.silence_s += 4 * self.beat_s
        self._end = threading.Event()
        self._lock = threading.Lock()
        now = time.monotonic()
        self._heard = dict.fromkeys(range(ranks.world_size), now) if ranks.rank == 0 else {0: now}
        self._counts: dict[int, bytes] = {}
        self._told = ""
        self._threads = [
            threading.Thread(target=work, name=f"watch-{work.__name__.strip('_')}", daemon=True)
            for work in (self._beat, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Leave: from now on this rank's silence is not taken for its loss."""
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.beat_s)

    def _beat(self) -> None:
        number = 0
        while True:
            leaving = self._end.wait(self.beat_s if number else 0)
            number += 1
            try:
                self.store.set(f"beat/{self.ranks.rank}", "left" if leaving else str(number))
                if not leaving:
                    self._look()
            except RuntimeError:  # the store does not answer: the guard counts the seconds
                pass
            if leaving:
                return

    def _look(self) -> None:
        if self.ranks.rank:
            told = self.store.get("lost").decode() if self.store.check(["lost"]) else ""
            with self._lock:
                self._told = told
                self._heard[0] = time.monotonic()
            return
        for rank in list(self._heard):
            key = f"beat/{rank}"
            count = self.store.get(key) if self.store.check([key]) else b""
            with self._lock:
                if count == b"left":
                    self._heard.pop(rank)
                elif count != self._counts.get(rank):
                    self._counts[rank] = count
                    self._heard[rank] = time.monotonic()

    def _guard(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self.beat_s / 2):
            now = time.monotonic()
            with self._lock:
                if now - before > self.silence_s / 2:  # this process itself was stopped
                    self._heard = dict.fromkeys(self._heard, now)
                silent = [rank for rank, at in self._heard.items() if now - at > self.silence_s]
                told = self._told
            before = now
            if told or silent:
                self.on_lost(told or self._say(silent))
                return

    def _say(self, silent: list[int]) -> str:
        if self.ranks.rank:
            return (
                f"rank 0 on {self.ranks.master_addr} has not been heard for {self.silence_s:.0f} s"
                f" by rank {self.ranks.rank} on {host()}"
            )
        who = ", ".join(f"rank {rank} on {self._host_of(rank)}" for rank in silent[:8])
        said = f"{who} {'have' if len(silent) > 1 else 'has'} not been heard for {self.silence_s:.0f} s"
        with contextlib.suppress(RuntimeError):
            self.store.set("lost", said)
            time.sleep(2 * self.beat_s)  # for the others to read it: the store ends with this process
        return said

    def _host_of(self, rank: int) -> str:
        try:
            return self.store.get(f"here/{rank}").decode()
        except RuntimeError:
            return "an unknown host"
