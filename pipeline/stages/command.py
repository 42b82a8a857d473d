"""The command line of every stage: ``python -m pipeline.stages.STAGE --manifest FILE --task ID``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import slurm
from pipeline.errors import EXIT_USER_ERROR, OneLineParser, UserError, one_line
from pipeline.files import chosen_umask
from pipeline.process import require_utf8, set_up_process
from pipeline.stages import STAGES, TRAINING_STAGES
from pipeline.stages.runner import run_task, user_errors
from pipeline.stages.work import Interrupted

INTERRUPTED = 75  # exit code: stopped by a signal after a checkpoint, the same command goes on
PROFILE_STEPS = 20


def main(stage: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one task of a stage, and exit: 0 done, 2 a user's mistake, 75 stopped after a checkpoint.

    Each stage's module calls this before its imports, so that a mistake, or an installation that cannot work,
    is said in one line.
    """
    assert stage in STAGES
    parser = OneLineParser(
        prog=f"python -m pipeline.stages.{stage}",
        description=f"Run one {stage} task by hand, or under torchrun (`pipeline.launch plan` lists them).",
    )
    parser.add_argument("--manifest", type=Path, required=True, help="runs/EXPERIMENT/manifest.json")
    parser.add_argument("--task", required=True, help=f"its id, such as {stage}/NAME")
    if stage in TRAINING_STAGES:
        parser.add_argument(
            "--profile",
            metavar="STEPS",
            type=_profile_steps,
            nargs="?",
            const=PROFILE_STEPS,
            help=f"where the time of so many steps goes (default {PROFILE_STEPS}): profile/ of its folder",
        )
    given = parser.parse_args(arguments)
    task_id = given.task if "/" in given.task else f"{stage}/{given.task}"
    require_utf8()
    set_up_process()
    try:
        os.umask(chosen_umask())
        if task_id.split("/")[0] != stage:
            raise UserError(f"{task_id} is not a {stage} task")
        run_task(
            given.manifest,
            task_id,
            stop_requested=slurm.StopFlag().install(),
            profile_steps=getattr(given, "profile", None),
        )
    except user_errors() as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Interrupted:
        print("stopped after a checkpoint; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(0)


def _profile_steps(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1000, found '{text}'")
    return int(text)
