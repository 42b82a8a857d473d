"""The command line: ``python -m pipeline.launch VERB [EXPERIMENT] [options]``; see ``--help``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipeline.errors import (
    EXIT_USER_ERROR,
    OneLineParser,
    UserError,
    nearest,
    one_line,
    raise_all,
    storage_error,
)
from pipeline.files import chosen_umask
from pipeline.garbage import look_for_garbage_rarely
from pipeline.process import require_utf8, set_up_process
from pipeline.stages import STAGES

if TYPE_CHECKING:
    from pipeline.experiment import Experiment

VERBS = {
    "all": "plan, submit what is not done, and on this machine run it",
    "shard": "the same, up to and with sharding",
    "pretrain": "the same, up to and with pretraining",
    "finetune": "the same, up to and with fine-tuning",
    "aggregate": "the same as all",
    "plan": "list the tasks, what they need and what is done already; looks at the data's folders",
    "status": "how far every task is, with one question to the cluster",
    "cancel": "cancel the experiment's jobs",
    "verify": "hash every finished task's files again; --repair plans damaged tasks anew",
    "clean": "list what no experiment in --runs needs of --store; --yes removes it",
    "predict": "what a fine-tuned model says of --images, as a CSV table",
    "evaluate": "how good the fine-tuned models are on another data set, --dataset",
    "experiments": "list the ready experiments",
    "show": "print the experiment with every default written out",
}


def parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:12} {meaning}" for verb, meaning in VERBS.items())
    made = OneLineParser(
        prog="python -m pipeline.launch",
        description="From a folder of images to a table of which self-supervised recipe is best on them.",
        epilog=f"verbs:\n{verbs}\n\nfirst steps:\n"
        "  python -m pipeline.launch all\n"
        "  python -m pipeline.launch all pbc --set dataset.root=/data/my_images --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("verb", metavar="VERB", help="what to do (below)")
    made.add_argument(
        "experiment",
        metavar="EXPERIMENT",
        nargs="?",
        help="a ready one's name, or a file (default: quickstart; of status and verify: the newest run)",
    )
    made.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key: pretrain.epochs=20"
    )
    made.add_argument(
        "--cluster",
        metavar="WHERE",
        default="auto",
        help="auto | local | slurm | PROFILE.yaml (default: auto)",
    )
    made.add_argument(
        "--store", metavar="DIR", type=Path, default=Path("store"), help="results (default: store)"
    )
    made.add_argument(
        "--runs", metavar="DIR", type=Path, default=Path("runs"), help="manifests, logs, tables"
    )
    made.add_argument("--only", metavar="STAGE[,STAGE]", help="run these stages only")
    made.add_argument(
        "--dry-run", action="store_true", help="make every check, show plan and jobs, touch nothing"
    )
    made.add_argument("--wait", action="store_true", help="on Slurm: stay until all jobs have ended")
    made.add_argument("--repair", action="store_true", help="verify: have damaged tasks run again")
    made.add_argument("--yes", action="store_true", help="clean: remove what is listed")
    made.add_argument(
        "--images",
        metavar="DIR|CSV",
        type=Path,
        help="predict: a folder of images, or a table of their paths",
    )
    made.add_argument(
        "--net",
        metavar="WORDS",
        default="",
        help="predict: which model, such as 'cass_plus vit 10pc'; of several the best by validation;"
        " evaluate: which models (default: all)",
    )
    made.add_argument(
        "--dataset",
        metavar="FILE",
        help="evaluate: the other data set, keys as below dataset in an experiment",
    )
    made.add_argument(
        "--device", metavar="WHERE", help="predict, evaluate: auto | cpu | cuda | cuda:1 (default: auto)"
    )
    made.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        help="predict: the table (default: standard output); evaluate: the folder for the tables",
    )
    made.add_argument("--json", action="store_true", help="status and plan as JSON")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    require_utf8()
    given = parser().parse_args(arguments)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # to look for some takes it 20 ms
    signal.signal(signal.SIGTERM, _as_interrupt)
    set_up_process()
    try:
        os.umask(chosen_umask())
        sys.exit(run(given))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        from pipeline.stages.runner import user_errors

        shown = error if isinstance(error, user_errors()) else storage_error(error, given.runs)
        if shown is None:
            raise
        for one in getattr(shown, "errors", [shown]):
            print(f"error: {one_line(one)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _as_interrupt(number: int, frame: object) -> NoReturn:
    """End on SIGTERM as on Ctrl-C, so that jobs on this machine end with their launcher."""
    raise KeyboardInterrupt


def run(given: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit code."""
    if given.verb not in VERBS:
        raise UserError(
            f"unknown verb {given.verb!r}{nearest(given.verb, VERBS)} (one of {', '.join(VERBS)})"
        )
    if given.verb in ("status", "cancel", "verify", "predict", "evaluate"):
        return _existing(given)
    if given.verb == "clean":
        from pipeline.cleaning import clean

        return clean(given.store, given.runs, yes=given.yes)
    from pipeline import experiment_file, view

    if given.verb == "experiments":
        view.print_experiments(experiment_file.ready_experiments())
        return 0
    experiment = _load(given)
    if given.verb == "show":
        view.print_yaml(experiment.resolved())
        return 0
    if given.verb == "plan" or given.json:
        from pipeline import preview

        manifest = preview.planned(experiment, given.store)
        if given.json:
            print(json.dumps(preview.plan_as_json(manifest), indent=1))
        else:
            preview.print_plan(manifest, _stages(given))
        preview.check_folders(manifest, _stages(given))
        return 0
    from pipeline.campaign import Campaign

    campaign = Campaign(experiment, store=given.store, runs=given.runs, cluster=given.cluster)
    if given.dry_run:
        return campaign.rehearse(_stages(given))
    return campaign.launch(_stages(given), wait=given.wait)


def _load(given: argparse.Namespace) -> Experiment:
    """The experiment; mistakes in its file and in the cluster's profile are told together.

    Raises:
        UserError, UserErrors: all of them, a line each.
    """
    from pipeline import experiment_file

    found: list[UserError] = []
    if given.cluster.endswith((".yaml", ".yml")):
        import slurm

        try:
            slurm.load_profile(given.cluster)
        except slurm.SlurmError as error:
            found += [UserError(str(one)) for one in getattr(error, "errors", [error])]
    try:
        experiment = experiment_file.load_experiment(given.experiment or "quickstart", given.set)
    except UserError as error:
        raise_all([error, *found])
        raise
    raise_all(found)
    return experiment


def _stages(given: argparse.Namespace) -> list[str]:
    """The stages a command runs: those of ``--only``, else all up to its verb."""
    if given.only is not None:
        chosen = [stage.strip() for stage in given.only.split(",")]
        for stage in chosen:
            if stage not in STAGES:
                raise UserError(
                    f"--only: unknown stage {stage!r}{nearest(stage, STAGES)} ({', '.join(STAGES)})"
                )
        return [stage for stage in STAGES if stage in chosen]
    last = given.verb if given.verb in STAGES else STAGES[-1]
    return list(STAGES[: STAGES.index(last) + 1])


def _existing(given: argparse.Namespace) -> int:
    """Status, cancel and verify look at what was launched, so they read the manifest, not the experiment."""
    from pipeline import inspection

    name = given.experiment or _newest(given.runs, given.verb)
    if name.endswith((".yaml", ".yml")):
        from pipeline.experiment_file import load_experiment

        name = load_experiment(name, given.set).name
    folder = given.runs / name
    if not (folder / "manifest.json").is_file():
        known = [path.parent.name for path in given.runs.glob("*/manifest.json")]
        hint = f" (launched: {', '.join(sorted(known))})" if known else ""
        raise UserError(f"nothing has been launched as {name!r} in {given.runs}{nearest(name, known)}{hint}")
    if given.verb == "status":
        return inspection.status(folder, as_json=given.json)
    if given.verb == "cancel":
        return inspection.cancel(folder)
    device = given.device or "auto"
    if given.verb == "predict":
        from pipeline.inference.predict import predict

        if given.images is None:
            raise UserError("predict needs --images: a folder of images, or a table of their paths")
        return predict(folder, images=given.images, wanted=given.net, out=given.out, device=device)
    if given.verb == "evaluate":
        from pipeline.experiment_file import load_dataset
        from pipeline.inference.external import evaluate

        if given.dataset is None:
            raise UserError("evaluate needs --dataset: a file that says where the other images are")
        return evaluate(folder, load_dataset(given.dataset), wanted=given.net, out=given.out, device=device)
    return inspection.verify(folder, repair=given.repair)


def _newest(runs: Path, verb: str) -> str:
    """The experiment that a command without one means: the only one in ``runs``, or the newest to look at."""
    found = sorted(runs.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    names = [path.parent.name for path in found]
    if not names:
        raise UserError(f"nothing has been launched in {runs}")
    if len(names) > 1 and verb not in ("status", "verify"):
        raise UserError(f"{verb} which experiment? In {runs} there are {', '.join(sorted(names))}")
    return names[-1]


if __name__ == "__main__":
    look_for_garbage_rarely()
    main()
