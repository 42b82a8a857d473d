"""Profiles: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

import slurm
from slurm import Profile, Request, SlurmError, load_profile


def profile_file(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_packaged_example_is_valid_and_uses_every_key():
    example = load_profile(Path(slurm.__file__).parent / "example.yaml")
    assert example.model_fields_set == set(Profile.model_fields)
    assert example.container == "apptainer exec --nv --bind /scratch /scratch/my_project/pipeline.sif"


def test_empty_profile_leaves_everything_to_the_site(tmp_path):
    assert load_profile(profile_file(tmp_path, "# nothing yet\n")) == Profile()


def test_stage_overrides_the_experiment_and_the_profile_fills_memory():
    profile = Profile.model_validate(
        {"memory_gb": 8, "stages": {"pretrain": {"nodes": 2, "memory_gb": 64, "partition": "gpu"}}}
    )
    asked = Request(ranks_per_node=4, minutes=30)
    assert profile.request("pretrain", asked) == Request(
        nodes=2, ranks_per_node=4, minutes=30, memory_gb=64, partition="gpu"
    )
    assert profile.request("finetune", asked).memory_gb == 8
    assert profile.request("finetune", Request(memory_gb=2)).memory_gb == 2


def test_environment_numbers_become_text():
    assert Profile.model_validate({"environment": {"NCCL_DEBUG": 1}}).environment == {"NCCL_DEBUG": "1"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("partitoin: gpu", "unknown key 'partitoin', did you mean 'partition'?"),
        ("stages: {pretran: {}}", "unknown key 'stages.pretran', did you mean 'pretrain'?"),
        (
            "stages: {pretrain: {memory: 4}}",
            "unknown key 'stages.pretrain.memory', did you mean 'memory_gb'?",
        ),
        ("array_limit: many", "array_limit: 'many': expected a valid integer"),
        ("stages: {shard: {minutes: 0}}", "stages.shard.minutes: 0: expected greater than or equal to 1"),
        ("device: gpu", "device: 'gpu': expected 'auto', 'cpu' or 'cuda'"),
        ('partition: "gpu\\n#SBATCH --uid=0"', "expected one line without control characters"),
        ("account: $(whoami)", "account: '$(whoami)': expected a plain value"),
        ("qos: '`id`'", "qos: '`id`': expected a plain value"),
        ("environment: {A: $(id)}", "environment.A: '$(id)': expected a plain value"),
        ("environment: {A-B: x}", "'A-B' is no name of an environment variable"),
        ('setup: ["module load a\\nrm b"]', "expected one line without control characters"),
        ("setup: module load cuda", "setup: 'module load cuda': expected a valid tuple"),
        ("extra: {dependency: singleton}", "'dependency' is set by"),
        ("extra: {--reservation: a}", "expected a long option of sbatch without its dashes"),
        (
            "container: apptainer 'exec",
            'container: "apptainer \'exec": expected a command: No closing quotation',
        ),
        ("- partition", "expected 'key: value' lines, found list"),
        ("a: [", "no YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_file_key_and_expectation(tmp_path, text, complaint):
    path = profile_file(tmp_path, text)
    with pytest.raises(SlurmError) as caught:
        load_profile(path)
    message = str(caught.value)
    whole = "no YAML" in complaint or "found list" in complaint
    assert message.startswith(f"{path}: " if whole else f"{path}:1: ") and "\n" not in message
    assert complaint in message


def test_key_that_stands_there_twice_is_named_with_its_line(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("partition: a\nstages:\n  pretrain: {minutes: 1, minutes: 2}\n")
    with pytest.raises(SlurmError, match=r"cluster\.yaml:3: 'minutes' stands there twice"):
        load_profile(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: &a {b: *a}", "nested too deep, or in itself"),
        ("a: " + "[" * 2000, "nested too deep"),
        (
            "\n".join(
                ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}" for n in range(1, 40)]
            ),
            "aliases",
        ),
        ("? [a]\n: b", "cannot be a key"),
        ("array_limit: " + "9" * 5000, "digits"),
        ("requeue: !!bool x", "no YAML"),
        ("partition: !!timestamp 2024-99-99", "no YAML"),
        ("memory_gb: .inf", "memory_gb"),
        ('"a\\nb": 1', "unknown key"),
    ],
)
def test_value_that_breaks_what_reads_it_is_refused(tmp_path, text, complaint):
    path = profile_file(tmp_path, text)
    with pytest.raises(SlurmError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:") and "\n" not in message and complaint in message


def test_missing_profile_is_named(tmp_path):
    with pytest.raises(SlurmError, match=r"nowhere\.yaml: No such file"):
        load_profile(tmp_path / "nowhere.yaml")


def test_request_below_its_least_is_refused():
    with pytest.raises(SlurmError, match="nodes is 0; expected 1 or more"):
        Request(nodes=0)


def test_an_account_of_digits_stays_as_it_is_written(tmp_path):
    (tmp_path / "cluster.yaml").write_text("account: 01234\npartition: 7\nqos: no\nextra: {comment: 0777}\n")
    profile = load_profile(tmp_path / "cluster.yaml")
    assert (profile.account, profile.partition, profile.qos) == ("01234", "7", "no")
    assert profile.extra["comment"] == "0777"
