"""A cluster's profile: the YAML file that says how jobs are submitted at one site."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from slurm.commands import ask
from slurm.errors import SlurmError, SlurmErrors
from slurm.gpus import gpu_options
from slurm.plain_yaml import plain_loader
from slurm.resources import Request
from slurm.secret_names import is_secret

MOST_NODES = 10_000  # aliases of aliases can stand for more values than memory holds
MOST_DIGITS = 100  # Python refuses to print an integer of more than 4300 digits, and takes long to read one

# What the submission itself decides; an `extra` that set it again would break it.
# fmt: off
RESERVED = frozenset([
    "account", "array", "begin", "constraint", "cpus-per-task", "dependency", "error", "exclude", "gpus",
    "gpus-per-task", "input", "job-name", "kill-on-invalid-dep", "mem", "no-requeue",
    "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "partition", "qos", "requeue",
    "signal", "time", "wait", "wckey", "wrap",
])
# fmt: on


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected one line without control characters")
    return text


def _literal(text: str) -> str:
    """Values are quoted wherever they go; what would run a command is refused all the same."""
    if "`" in text or "$(" in text:
        raise ValueError("expected a plain value: no backticks and no $(…); commands belong into setup")
    return _printable(text)


def _option(text: str) -> str:
    """Slurm reads ``#SBATCH`` lines almost as a shell does, but a backslash escapes within quotes too."""
    if "\\" in text:
        raise ValueError("expected a value without backslashes: Slurm would misread what follows them")
    return _literal(text)


def _program(text: str) -> str:
    """What stands after srun's options: a dash would make one more of it, a colon begins another job step."""
    if text.startswith("-") or text == ":":
        raise ValueError(f"expected a program, not {text!r}: srun would take it for its own")
    return _literal(text)


def _command(text: str) -> str:
    try:
        words = shlex.split(_literal(text))
    except ValueError as error:
        raise ValueError(f"expected a command: {error}") from None
    if not words or not words[0]:
        raise ValueError("expected a command such as 'apptainer exec --nv image.sif'")
    _program(words[0])
    if ":" in words:
        raise ValueError("expected one command: srun begins another at a ':' that stands alone")
    return shlex.join(words)


def _gpu_type(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", text):
        raise ValueError("expected a GPU type as `sinfo -o %G` lists it, such as 'a100'")
    return text


def _number_as_text(value: Any) -> Any:
    """An account or a partition may be a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Literally = Annotated[str, Field(min_length=1), BeforeValidator(_number_as_text), AfterValidator(_option)]
Program = Annotated[str, Field(min_length=1), AfterValidator(_program)]
ShellLine = Annotated[str, AfterValidator(_printable)]
Command = Annotated[str, AfterValidator(_command)]
GpuType = Annotated[str, AfterValidator(_gpu_type)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class StageProfile(_Strict):
    """What one stage's jobs get instead of what the experiment or the profile says.

    A ``null`` for partition, qos, constraint or gpu_type leaves out what the profile says.
    """

    partition: Literally | None = None
    qos: Literally | None = None
    constraint: Literally | None = None
    gpu_type: GpuType | None = None
    minutes: int | None = Field(default=None, ge=1)
    nodes: int | None = Field(default=None, ge=1)
    ranks_per_node: int | None = Field(default=None, ge=1)
    cpus_per_rank: int | None = Field(default=None, ge=1)
    memory_gb: float | None = Field(default=None, gt=0)  # a node


class Stages(_Strict):
    shard: StageProfile = StageProfile()
    search: StageProfile = StageProfile()
    pretrain: StageProfile = StageProfile()
    finetune: StageProfile = StageProfile()
    aggregate: StageProfile = StageProfile()


class Profile(_Strict):
    """How jobs are submitted at one site. Everything is optional; ``slurm/example.yaml`` explains each key.

    The number of GPUs is not asked for here: a job gets one GPU a rank where its tasks run on GPUs, and tasks
    whose device is ``auto`` do so where ``device`` says ``cuda`` (``auto``: where Slurm lists a GPU in the
    partition). Only the stages that compute on a GPU get one.
    """

    partition: Literally | None = None
    account: Literally | None = None
    qos: Literally | None = None
    constraint: Literally | None = None
    exclude: Literally | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu_type: GpuType | None = None
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    memory_gb: float | None = Field(default=None, gt=0)  # a node, where the experiment asks for none
    stages: Stages = Stages()
    setup: tuple[ShellLine, ...] = ()
    environment: dict[str, Annotated[str, AfterValidator(_literal)]] = {}
    array_limit: int | None = Field(default=None, ge=1)
    max_array_size: int | None = Field(default=None, ge=1)
    container: Command | None = None
    python: Program | None = None
    requeue: bool = True
    signal_seconds: int = Field(default=120, ge=1, le=65535)
    extra: dict[str, Literally | int | float | bool] = {}

    @field_validator("environment", mode="before")
    @classmethod
    def _numbers_are_text(cls, given: Any) -> Any:
        """YAML reads ``NCCL_DEBUG: 1`` as a number; the environment knows text only."""
        if not isinstance(given, dict):
            return given
        return {
            name: str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
            for name, value in given.items()
        }

    @field_validator("environment")
    @classmethod
    def _names_are_names(cls, given: dict[str, str]) -> dict[str, str]:
        for name in given:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
            if is_secret(name):
                raise ValueError(
                    f"{name!r} looks like a secret, which must not stand in a batch script: leave it in your"
                    " own environment, which jobs get too, or read it from a private file in setup"
                )
        return given

    @field_validator("extra")
    @classmethod
    def _nothing_reserved(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ValueError(
                    f"{name!r}: expected a long option of sbatch without its dashes, such as 'reservation'"
                )
            # Slurm takes the beginning of an option's name for the option.
            if name != "gpus-per-node" and any(reserved.startswith(name) for reserved in RESERVED):
                raise ValueError(f"'{name}' is set by the profile's other keys or by the submission itself")
        return given

    def has_gpus(self, stage: str) -> bool:
        """Whether a stage's tasks whose device is ``auto`` run on GPUs; where unsaid, ``sinfo`` is asked.

        Args:
            stage: one that computes on a GPU where there is one.
        """
        if self.device != "auto":
            return self.device == "cuda"
        return _has_gpus(self._chosen(stage, "partition") or "")

    def _chosen(self, stage: str, name: str) -> str | None:
        """What the stage says of one of its keys that the profile has too, else what the profile says."""
        own: StageProfile = getattr(self.stages, stage)
        said: str | None = getattr(own if name in own.model_fields_set else self, name)
        return said

    def request(self, stage: str, request: Request) -> Request:
        """A stage's request with what this profile says about that stage put over it.

        Args:
            stage: shard, search, pretrain, finetune or aggregate.
            request: what the experiment asks for.

        Raises:
            SlurmError: GPUs that several ranks cannot share, or fewer of them than ranks.
        """
        own: StageProfile = getattr(self.stages, stage)
        said = own.model_dump(exclude_none=True)
        for name in {"partition", "qos", "constraint", "gpu_type"} & own.model_fields_set - set(said):
            said[name] = ""
        if request.memory_gb is None and self.memory_gb is not None:
            said.setdefault("memory_gb", self.memory_gb)
        made = dataclasses.replace(request, **said)
        gpu_options(made, self)  # refuses what cannot work
        return made


@functools.lru_cache
def _has_gpus(partitions: str) -> bool:
    """Whether Slurm lists a GPU in some partitions; empty: in the default one, or anywhere if none is."""
    chosen = [f"--partition={partitions}"] if partitions else []
    rows = [line.split("|") for line in ask(["sinfo", "-h", "-o", "%P|%G", *chosen]).splitlines()]
    default = [row for row in rows if row[0].strip().endswith("*")] if not partitions else []
    return any(row[-1].strip().startswith("gpu") or ",gpu" in row[-1] for row in default or rows)


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    Args:
        path: a YAML file.

    Raises:
        SlurmError: it is not there, is no YAML, or a key or value is not as expected.
    """
    path = Path(path)
    try:
        given = _read_yaml(path.read_text(encoding="utf-8"), path)
    except SlurmError:
        raise
    except OSError as error:
        raise SlurmError(f"{path}: {error.strerror or 'not readable'}; expected a cluster profile") from None
    except RecursionError:
        raise SlurmError(f"{path}: no YAML of a profile: nested too deep, or in itself") from None
    except Exception as error:  # PyYAML raises nearly anything on a value that its tag does not fit
        raise SlurmError(f"{path}: no YAML: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        if given is not None:
            raise SlurmError(f"{path}: expected 'key: value' lines, found {type(given).__name__}")
        given = {}
    try:
        return Profile.model_validate(given)
    except ValidationError as error:
        lines = _lines(path)
        raise SlurmErrors([_explain(one, path, lines) for one in error.errors(include_url=False)]) from None


def _read_yaml(text: str, path: Path) -> Any:
    """A YAML document without repeated keys (YAML itself would take the last) and values without end."""
    import yaml

    root = yaml.compose(text, Loader=plain_loader())
    for number, node in enumerate(_nodes(root) if root is not None else ()):
        where = f"{path}:{node.start_mark.line + 1}"
        if number >= MOST_NODES:
            raise SlurmError(f"{where}: its aliases unfold into more than {MOST_NODES} values")
        if node.id == "scalar" and len(node.value) > MOST_DIGITS and node.tag.endswith((":int", ":float")):
            raise SlurmError(f"{where}: {node.value[:20]}… is a number of {len(node.value)} digits")
        seen = set()
        for key, _ in node.value if node.id == "mapping" else ():
            where = f"{path}:{key.start_mark.line + 1}"
            if key.id != "scalar":
                raise SlurmError(f"{where}: no YAML of a profile: a list or mapping cannot be a key")
            if key.value in seen:
                raise SlurmError(f"{where}: {_quoted(key.value)} stands there twice")
            seen.add(key.value)
    return plain_loader()(text).get_single_data()


def _nodes(node: Any) -> Iterator[Any]:
    """A YAML node and all below it; what an alias stands for comes as often as it is named."""
    yield node
    if node.id == "mapping":
        for key, value in node.value:
            yield from _nodes(key)
            yield from _nodes(value)
    elif node.id == "sequence":
        for value in node.value:
            yield from _nodes(value)


def _quoted(key: Any) -> str:
    return f"'{key}'" if str(key).isprintable() else repr(key)


def _lines(path: Path) -> dict[str, int]:
    """The line of each key of a profile, by its dotted name."""
    import yaml

    found: dict[str, int] = {}
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=plain_loader())
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        prefix, node = waiting.pop()
        for key, value in node.value if getattr(node, "id", "") == "mapping" else ():
            name = f"{prefix}{key.value}"
            found[name] = key.start_mark.line + 1
            waiting.append((f"{name}.", value))
    return found


def _explain(problem: Any, path: Path, lines: Mapping[str, int]) -> str:
    """One of pydantic's complaints as ``file:line: key: value: what was expected``."""
    parts = [str(part) for part in problem["loc"] if not str(part).startswith(("function-", "constrained-"))]
    key = ".".join(parts)
    line = next(
        (lines[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in lines), None
    )
    where = f"{path}:{line}" if line else str(path)
    if problem["type"] == "extra_forbidden":
        model: Any = Profile
        for part in parts[:-1]:
            model = model.model_fields[part].annotation
        known = list(model.model_fields)
        close = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
        hint = f", did you mean '{close[0]}'?" if close else f" (one of {', '.join(known)})"
        return f"{where}: unknown key {_quoted(key)}{hint}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = message if problem["type"] == "value_error" else f"expected {message}"
    value = repr(problem["input"])
    return f"{where}: {key}: {value if len(value) <= 60 else value[:57] + '...'}: {expected}"
