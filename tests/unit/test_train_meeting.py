"""Ranks find one another whoever else listens, and one that falls silent is named on all the others."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.ranks import Ranks, rendezvous_port, rendezvous_ports
from pipeline.train import meeting as module
from pipeline.train.meeting import Watch, meet

HERE = socket.gethostname()


def ranks_of(job: str, number: int) -> list[Ranks]:
    port = rendezvous_port(job)
    return [
        Ranks(rank=rank, world_size=number, master_port=port, source="slurm", job=job)
        for rank in range(number)
    ]


def meet_all(ranks, seconds=30.0):
    met = {}

    def one(each):
        met[each.rank] = meet(each, seconds=seconds)

    threads = [threading.Thread(target=one, args=(each,)) for each in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met


@pytest.fixture
def listener():
    """``listener(port)`` takes a port and never answers there."""
    held = []

    def take(port):
        held.append(socket.create_server(("", port)))

    yield take
    for server in held:
        server.close()


def test_ranks_meet_at_the_port_of_their_job():
    ranks = ranks_of("meet-1", 3)
    met = meet_all(ranks)
    assert {each.port for each in met.values()} == {ranks[0].master_port}
    met[2].named().set("word", "hello")
    assert met[1].named().get("word") == b"hello"


def test_ports_of_others_are_passed_over(listener, monkeypatch):
    monkeypatch.setattr(module, "TRY_S", 1.0)  # for the service that never answers
    ranks = ranks_of("meet-2", 2)
    ports = rendezvous_ports(ranks[0].master_port)
    listener(ports[0])
    other = dist.TCPStore("127.0.0.1", ports[1], None, True, wait_for_workers=False)
    other.set("another-job/open", "1")
    met = meet_all(ranks)
    assert {each.port for each in met.values()} == {ports[2]}


def test_two_jobs_with_the_same_ports_do_not_mix():
    one = ranks_of("meet-3", 2)
    two = [Ranks(each.rank, 2, master_port=one[0].master_port, source="slurm", job="meet-3b") for each in one]
    first, second = meet_all(one), meet_all(two)
    assert first[1].port != second[1].port
    assert not second[1].named().check(["word"])


def test_missing_ranks_are_named():
    with pytest.raises(UserError, match="rank 1, 2 of 3 did not come within 1 s"):
        meet(ranks_of("meet-4", 3)[0], seconds=1)


def test_rank_0_that_does_not_come_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"rank 1 on .* could not reach rank 0 at 127\.0\.0\.1, ports \d+"):
        meet(ranks_of("meet-5", 2)[1], seconds=1)


class Watched:
    """Ranks in threads of this process, each with its watch; what each was told."""

    def __init__(self, job: str, number: int, *, silent: tuple[int, ...] = ()) -> None:
        self.ranks = ranks_of(job, number)
        self.met = meet_all(self.ranks)
        self.told: dict[int, str] = {}
        self.watches = {
            each.rank: Watch(
                self.met[each.rank].another(),
                each,
                silence_s=1.5,
                on_lost=lambda text, rank=each.rank: self.told.setdefault(rank, text),
            )
            for each in self.ranks
            if each.rank not in silent
        }

    def wait(self, number: int, seconds: float = 15.0) -> dict[int, str]:
        deadline = time.monotonic() + seconds
        while len(self.told) < number and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.told

    def close(self) -> None:
        for watch in self.watches.values():
            watch.close()


def test_silent_rank_is_named_on_every_other_rank():
    watched = Watched("watch-1", 3, silent=(2,))
    told = watched.wait(2)
    watched.close()
    assert told.keys() == {0, 1}
    assert all(text == f"rank 2 on {HERE} has not been heard for 2 s" for text in told.values())


def test_ranks_that_count_or_have_left_are_not_blamed():
    watched = Watched("watch-2", 3)
    watched.watches.pop(1).close()
    assert watched.wait(1, seconds=4) == {}
    watched.close()


def test_rank_0_is_blamed_where_its_store_does_not_answer_any_more():
    watched = Watched("watch-3", 2, silent=(0,))
    watched.met.pop(0)  # the server goes with it
    told = watched.wait(1)
    watched.close()
    assert "rank 0 on 127.0.0.1 has not been heard" in told[1] and f"by rank 1 on {HERE}" in told[1]
