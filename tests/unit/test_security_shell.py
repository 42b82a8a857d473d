"""Hostile text in every field that reaches a batch script: refused in one line, or taken for what it is.

A stand-in for ``sbatch`` keeps the scripts. Each is then read as Slurm reads it (its options) and run by bash
with a stand-in for ``srun`` that writes down its arguments and its environment.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipeline.launch import main
from slurm import Profile, Request, SlurmError, load_profile, submit_array
from slurm.profiles import StageProfile

HOSTILE = {
    "newline": "a\ntouch pwned",
    "directive": "a\n#SBATCH --uid=0",
    "carriage return": "a\rtouch pwned",
    "line separator": "a\u2028touch pwned",
    "null": "a\0b",
    "backticks": "`touch pwned`",
    "substitution": "$(touch pwned)",
    "variable": "${HOME}$PATH",
    "single quote": "it's",
    "quote and command": "'; touch pwned; '",
    "double quote": '"; touch pwned; "',
    "nested quotes": "'\"'\"'; touch pwned; '\"'\"'",
    "backslash, then options": "x\\'\" --uid=0 #",
    "backslash at the end": "x\\",
    "semicolon": "a; touch pwned",
    "and": "a && touch pwned",
    "pipe": "a | touch pwned",
    "background": "a & touch pwned",
    "redirection": "a > pwned",
    "braces": "{touch,pwned}",
    "pattern": "* ? [a-z]",
    "comment": "a # b",
    "home": "~root",
    "dash": "-x",
    "option": "--uid=0",
    "option after a blank": "a --uid=0",
    "double dash": "--",
    "colon": ":",
    "colon between": "a : --uid=0 touch pwned",
    "percent": "%j",
    "accents": "é ß 日本",
    "right to left": "a\u202eb",
    "not text": "a\udcffb",
}
SHELL_BY_DEFINITION = {"setup"}


def nothing() -> None:
    pass


@dataclass
class Submitted:
    """One batch script as Slurm and bash read it.

    Attributes:
        options: sbatch's options, in order.
        srun: what srun was called with.
        environment: of srun.
    """

    options: list[tuple[str, str | None]]
    srun: list[str]
    environment: dict[str, str]

    def option(self, name: str) -> str | None:
        (value,) = (value for given, value in self.options if given == name)
        return value


class Site:
    """Stand-ins for Slurm's commands, and a look at what they were given."""

    def __init__(self, folder: Path) -> None:
        self.kept, self.programs, self.work = folder / "kept", folder / "bin", folder / "work"
        for made in (self.kept, self.programs, self.work):
            made.mkdir()
        count = f"$(($(ls {self.kept} | grep -c script) + 1))"
        self.program("sbatch", f'n={count}\ncp "$1" {self.kept}/script.$n\necho "Submitted batch job $n"')
        self.program("scontrol", "echo 'MaxArraySize = 4'")
        self.program("sinfo", "true")
        self.program(
            "srun", f"printf '%s\\0' \"$@\" > {self.kept}/arguments\nenv -0 > {self.kept}/environment"
        )

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.programs / name).chmod(0o755)

    def submitted(self) -> list[Submitted]:
        """Read and run what was submitted, and forget it."""
        found = []
        for script in sorted(self.kept.glob("script.*")):
            found.append(self._run(script))
            script.unlink()
        return found

    def _run(self, script: Path) -> Submitted:
        subprocess.run(["bash", "-n", script], check=True)
        ran = subprocess.run(
            ["bash", script],
            cwd=self.work,
            env={"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": "/h", "SLURM_JOB_ID": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0 and not ran.stderr, ran.stderr
        assert not list(self.work.iterdir()), f"something in it was run: {script.read_text()}"
        arguments = (self.kept / "arguments").read_text().split("\0")[:-1]
        pairs = (line.partition("=") for line in (self.kept / "environment").read_text().split("\0")[:-1])
        options = [
            option
            for line in script.read_text().split("\n")
            if line.startswith("#SBATCH")
            for option in options_as_slurm_reads_them(line)
        ]
        return Submitted(options, arguments, {name: value for name, _, value in pairs})


def options_as_slurm_reads_them(line: str) -> list[tuple[str, str | None]]:
    """What sbatch makes of a ``#SBATCH`` line: a backslash escapes within quotes too, ``#`` ends the line."""
    words, word, quote, escaped, begun = [], "", "", False, False
    for letter in line.removeprefix("#SBATCH"):
        if escaped:
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = begun = True
        elif quote:
            word, quote = (word, "") if letter == quote else (word + letter, quote)
        elif letter in "'\"":
            quote, begun = letter, True
        elif letter == "#":
            break
        elif letter.isspace():
            if begun:
                words.append(word)
            word, begun = "", False
        else:
            word, begun = word + letter, True
    assert not quote, f"unmatched {quote} in {line}"
    words += [word] if begun else []
    assert all(word.startswith("--") for word in words), words
    return [
        (name[2:], value if equals else None) for name, equals, value in (w.partition("=") for w in words)
    ]


@pytest.fixture
def site(tmp_path, monkeypatch) -> Site:
    made = Site(tmp_path)
    monkeypatch.setenv("PATH", f"{made.programs}:{os.environ['PATH']}")
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_")):
            monkeypatch.delenv(name)
    return made


def submit(site: Site, folder: Path, profile: Profile, request: Request | None = None) -> Submitted:
    submit_array([nothing], name="test", request=request or Request(), profile=profile, folder=folder)
    (found,) = site.submitted()
    return found


def profile_of(site: Site, given: dict[str, Any]) -> Profile | None:
    """The profile in a file, or None where it is refused as it should be."""
    path = site.kept.parent / "cluster.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8", errors="surrogatepass")
    try:
        return load_profile(path)
    except SlurmError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
        return None


def takes_text(annotation: Any) -> bool:
    """Whether text that is no number and no listed word may stand in a field."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return False
    if annotation is str:
        return True
    literal = typing.get_origin(annotation) is typing.Literal
    return not literal and any(takes_text(part) for part in typing.get_args(annotation))


def shaped(annotation: Any, value: str) -> Any:
    """A value in the shape that a field has: text, a list, a mapping."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return shaped(typing.get_args(annotation)[0], value)
    return {tuple: [value], dict: {"key": value}}.get(origin, value)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("key", [key for key in Profile.model_fields if key != "stages"])
def test_hostile_text_in_a_profile_is_refused_or_taken_literally(site, tmp_path, key, text):
    plain = submit(site, tmp_path / "plain", Profile())
    annotation = Profile.model_fields[key].annotation
    profile = profile_of(site, {key: shaped(annotation, text)})
    if not takes_text(annotation):
        assert profile is None
    if profile is None or key in SHELL_BY_DEFINITION:  # what a setup line does is its author's business
        return
    found = submit(site, tmp_path / "plain", profile)
    added = [option for option in found.options if option not in plain.options]
    if key == "environment":
        assert not added and found.environment["key"] == text
        assert found.srun == plain.srun
    elif key in ("python", "container"):
        own = [text] if key == "python" else [*shlex.split(text), "python3"]
        before = plain.srun.index(sys.executable)
        assert not added and found.srun == [*plain.srun[:before], *own, *plain.srun[before + 1 :]]
        # srun takes words with a dash for its own until it meets another, and a colon for a job step's end.
        assert not own[0].startswith("-") and ":" not in own
    else:
        assert added == [("key" if key == "extra" else key, text)]
        assert found.srun == plain.srun


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("key", StageProfile.model_fields)
def test_hostile_text_for_a_stage_is_refused_or_taken_literally(site, tmp_path, key, text):
    profile = profile_of(site, {"stages": {"pretrain": {key: text}}})
    if not takes_text(StageProfile.model_fields[key].annotation):
        assert profile is None
    if profile is None:
        return
    found = submit(site, tmp_path / "logs", profile, profile.request("pretrain", Request()))
    assert found.option(key) == text


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_as_a_key_is_refused(site, text):
    for key in ("environment", "extra"):
        assert profile_of(site, {key: {text: "x"}}) is None
    assert profile_of(site, {text: "x"}) is None
    assert profile_of(site, {"stages": {text: {}}}) is None


def test_line_of_setup_is_one_line(site):
    for name in ("newline", "directive", "carriage return", "line separator", "null"):
        assert profile_of(site, {"setup": [HOSTILE[name]]}) is None
    assert profile_of(site, {"setup": ["module load cuda; export A=$(cat ~/a)"]}) is not None


def test_beginning_of_a_reserved_option_is_reserved_too(site):
    """Slurm takes ``--depend`` for ``--dependency``."""
    for name in ("depend", "dep", "parti", "ntasks-per", "kill"):
        assert profile_of(site, {"extra": {name: "x"}}) is None
    assert (
        profile_of(site, {"extra": {"mem-per-cpu": "1G", "exclusive": True, "gpu-bind": "none"}}) is not None
    )


def test_secret_in_a_profile_is_refused_since_scripts_would_hold_it(site):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "WANDB_API_KEY"):
        assert profile_of(site, {"environment": {name: "x"}}) is None
    for name in ("HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "HF_HOME"):
        assert profile_of(site, {"environment": {name: "x"}}) is not None


def test_number_that_is_none_is_refused(site):
    for number in (float("inf"), float("nan")):
        assert profile_of(site, {"memory_gb": number}) is None
        assert profile_of(site, {"stages": {"shard": {"memory_gb": number}}}) is None


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_folder_is_refused_or_taken_literally(site, tmp_path, text):
    if "\0" in text:
        return  # no file system has it
    folder = tmp_path / f"runs {text}" / text / "logs"
    try:
        found = submit(site, folder, Profile())
    except SlurmError as error:
        assert str(error).isprintable()
        assert not folder.exists()
        return
    assert found.option("output") == f"{folder}/%j_0_log.out"
    assert found.option("error") == f"{folder}/%j_0_log.err"
    logs = ["--output", f"{folder}/%j_%t_log.out", "--error", f"{folder}/%j_%t_log.err"]
    assert found.srun[:5] == ["--unbuffered", *logs]
    assert found.srun[-1] == str(folder)


def test_folder_with_quotes_still_finds_its_requeue_marker(site, tmp_path):
    """Where there is no scontrol in a container, a file asks the trap at the script's end for the requeue."""
    folder = tmp_path / 'it\'s "mine" $(touch pwned) `touch pwned`'
    asked = site.kept / "asked"
    site.program("scontrol", f'case "$1" in requeue) echo "$2" > {asked};; *) echo "MaxArraySize = 4";; esac')
    marker = shlex.quote(str(folder / ".requeue-1"))
    site.program("srun", f"touch {marker} {site.kept}/arguments; env -0 > {site.kept}/environment")
    submit(site, folder, Profile())
    assert asked.read_text() == "1\n"


EXPERIMENT = {
    "dataset": {"source": "digits", "shard_samples": 500},
    "backbones": {"cnn": {"name": "test_resnet"}},
    "methods": {"supervised": {}},
    "seeds": [0],
    "pretrain": {"epochs": 1},
    "finetune": {"protocols": ["linear"], "fractions": [1.0]},
}
FIELDS = {  # all that is text, or might be taken for a number, and is near a script: names, paths, resources
    "name": lambda text: {"name": text},
    "dataset": lambda text: {"dataset": {"source": "digits", "name": text}},
    "datasets": lambda text: {"dataset": None, "datasets": {text: {"source": "digits"}}},
    "method": lambda text: {"methods": {text: {"method": "byol"}}, "report": {"baseline": text}},
    "weights": lambda text: {"methods": {"byol": {"weights": text}}},
    "root": lambda text: {"dataset": {"root": text}},
    "csv": lambda text: {"dataset": {"source": "csv", "root": ".", "csv": text}},
    "column": lambda text: {"dataset": {"source": "digits", "group_column": text, "classes": [text]}},
    "backbone": lambda text: {"backbones": {"cnn": {"name": text, "args": {text: text}}}},
    **{
        key: lambda text, key=key: {"resources": {"pretrain": {key: text}}}
        for key in ("nodes", "ranks_per_node", "cpus_per_rank", "memory_gb", "minutes", "device")
    },
}


# (What is no text can be printed by a terminal, but not by what stands in for it here.)
@pytest.mark.parametrize("text", [text for name, text in HOSTILE.items() if name != "not text"])
def test_hostile_text_in_an_experiment_reaches_no_script(site, tmp_path, capsys, monkeypatch, text):
    """Each field in turn, through the command line, on a store of that name too."""
    monkeypatch.setattr("pipeline.launch.os.umask", lambda mask: None)  # it is this process's too
    places = [
        *(["--store", str(tmp_path / text)] if "\0" not in text else []),
        "--runs",
        str(tmp_path / "runs"),
    ]
    for field, change in FIELDS.items():
        path = tmp_path / "experiment.yaml"
        given = {"name": "plain", **EXPERIMENT, **change(text)}
        path.write_text(yaml.safe_dump(given), encoding="utf-8", errors="surrogatepass")
        with pytest.raises(SystemExit) as ended:
            main(["all", str(path), "--cluster", "slurm", *places])
        said = capsys.readouterr()
        found = site.submitted()
        if ended.value.code:
            assert ended.value.code == 2 and said.err.count("\n") == 1, (field, said.err)
            assert not found, field
            continue
        assert len(found) == 4, field
        for job in found:
            assert {name for name, _ in job.options} <= OPTIONS, field
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", job.option("job-name") or ""), field
            assert "pwned" not in " ".join(f"{name}={value}" for name, value in job.options)
        shutil.rmtree(tmp_path / "runs")


OPTIONS = {
    *("cpus-per-task", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "ntasks-per-node"),
    *("open-mode", "output", "requeue", "signal", "time"),
}


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="no Slurm on this machine")
def test_slurm_itself_reads_options_as_this_test_does(tmp_path):
    """sbatch shows what it has read before it finds that there is no controller."""
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=1\n"
        "NodeName=n1 Port=2\nPartitionName=main Nodes=n1 Default=YES\n"
    )
    script = tmp_path / "script.sh"
    for text in (
        HOSTILE["backslash, then options"].replace("uid=0", "comment=smuggled"),
        'it\'s # `a` "$(b)" ; é',
    ):
        line = f"#SBATCH --account={shlex.quote(text)}"
        script.write_text(f"#!/bin/bash\n{line}\n")
        ran = subprocess.run(
            ["sbatch", "-vv", script],
            env={**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")},
            capture_output=True,
            text=True,
        )
        shown = dict(re.findall(r"^sbatch: (account|comment) +: (.*)$", ran.stderr, re.MULTILINE))
        assert shown == dict(options_as_slurm_reads_them(line))
