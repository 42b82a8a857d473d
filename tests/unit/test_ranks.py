"""Where a process learns its rank from."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from pipeline.ranks import Ranks, first_host, rank_environment, rendezvous_port

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29501",
}
SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n7,n9",
}


def test_alone_without_any_environment():
    assert rank_environment({}) == Ranks()


def test_torchrun_wins_over_slurm():
    assert rank_environment({**SLURM, **TORCHRUN}) == Ranks(3, 8, 1, 2, "n1", 29501, "torchrun")


@pytest.mark.parametrize("lost", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_partial_torchrun_environment_is_refused_by_name(lost):
    with pytest.raises(UserError, match=f"{lost} missing"):
        rank_environment({name: value for name, value in TORCHRUN.items() if name != lost})


def test_master_address_of_a_site_profile_alone_is_no_torchrun():
    assert rank_environment({"MASTER_ADDR": "x", "MASTER_PORT": "1"}) == Ranks()


def test_slurm_step_gives_every_rank_the_same_rendezvous():
    ranks = [rank_environment({**SLURM, "SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert [each.rank for each in ranks] == [0, 1, 2, 3]
    assert {(each.world_size, each.local_world_size, each.master_addr) for each in ranks} == {(4, 2, "n7")}
    assert len({each.master_port for each in ranks}) == 1
    requeued = rank_environment({**SLURM, "SLURM_RESTART_COUNT": "1"})
    assert requeued.master_port != ranks[0].master_port, "a restart must not meet the old one's port"


def test_batch_script_itself_is_one_process():
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_NTASKS": "4"}
    assert rank_environment(batch) == Ranks()


def test_submitit_local_ranks():
    env = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1"}
    ranks = rank_environment({**env, "SUBMITIT_LOCAL_JOB_ID": "55"})
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.source) == (1, 2, 1, "local")


def test_number_that_is_none_is_named():
    with pytest.raises(UserError, match="RANK is 'x'"):
        rank_environment({**TORCHRUN, "RANK": "x"})


def test_ports_stay_below_the_ephemeral_range():
    ports = {rendezvous_port(str(job)) for job in range(2000)}
    assert min(ports) >= 20000 and max(ports) < 32000 and len(ports) > 1700


def test_first_host_of_a_plain_list():
    assert first_host("a1,b2") == "a1"
