"""Switches off, one after another, what keeps a run safe, and shows that a test fails without it.

    python tests/mutations.py [NAME …] [--fast]

Each mutation is made in a copy of the working tree, where one test runs, before and after. A mutation that
the test does not notice is reported, and the exit code is 1. ``--fast`` leaves out those that need a Slurm
testbed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = "tests/slurm/faults"


@dataclass(frozen=True)
class Mutation:
    """A mechanism, and what it takes to switch it off.

    Attributes:
        name: of the mechanism.
        file: in which it lives.
        before, after: text that is there once, and what stands there without the mechanism.
        test: what must fail then, as pytest takes it.
    """

    name: str
    file: str
    before: str
    after: str
    test: str

    @property
    def needs_slurm(self) -> bool:
        return self.test.startswith("tests/slurm/")


RESUME = "tests/integration/test_pretrain_resume.py"
STATE = "pipeline/train/state.py"
LOOP = "pipeline/train/loop.py"
STEP = "pipeline/train/step.py"
MUTATIONS = [
    Mutation(
        "optimiser restored",
        STATE,
        'self.optimizer.load_state_dict(state["optimizer"])',
        "pass",
        f"{RESUME}::test_resume_after_kill_gives_same_bits",
    ),
    Mutation(
        "averages restored",
        STATE,
        'self.averaging.load_state_dict(state["averaging"])',
        "pass",
        f"{RESUME}::test_resume_after_kill_gives_same_bits",
    ),
    Mutation(
        "random state restored",
        STATE,
        'set_random_state(state["random"][self.world.rank], self.world.device)',
        "pass",
        f"{RESUME}::test_resume_after_kill_gives_same_bits",
    ),
    Mutation(
        "data goes on at its step",
        LOOP,
        "self.feed.steps(self.first, self.steps)",
        "self.feed.steps(0, self.steps - self.first)",
        f"{RESUME}::test_resume_after_kill_gives_same_bits",
    ),
    Mutation(
        "DDP's buckets laid out before a resumed step",
        STEP,
        "self.rehearsals = min(first, DDP_SETTLES) if whole else 0",
        "self.rehearsals = 0",
        f"{RESUME}::test_three_ranks_resume_with_same_bits",
    ),
    Mutation(
        "log cut to the checkpoint",
        "pipeline/train/logs.py",
        "os.ftruncate(opened, min(position, os.fstat(opened).st_size))",
        "pass",
        f"{RESUME}::test_resume_after_kill_gives_same_bits",
    ),
    Mutation(
        "checkpoint when asked to stop",
        LOOP,
        "asked = agreed.stop or agreed.save",
        "asked = agreed.save",
        f"{RESUME}::test_stop_request_writes_a_checkpoint_at_the_next_step_and_goes_on_from_it",
    ),
    Mutation(
        "checkpoint by the clock",
        LOOP,
        "asked = agreed.stop or agreed.save",
        "asked = agreed.stop",
        f"{RESUME}::test_checkpoint_seconds_saves_by_the_clock",
    ),
    Mutation(
        "checkpoint's SHA-256",
        "pipeline/train/checkpoint.py",
        "if sha256_file(path) == named.group(2):",
        "if True:",
        f"{RESUME}::test_damaged_checkpoint_falls_back_to_the_one_before_and_says_so",
    ),
    Mutation(
        "checkpoint appears whole",
        "pipeline/train/checkpoint.py",
        "write_atomically(path, content)",
        "path.write_bytes(content)",
        "tests/unit/test_train_checkpoint.py",
    ),
    Mutation(
        "checkpoint copied before the training goes on",
        "pipeline/train/checkpoint.py",
        "copy = snapshot(state)",
        "copy = state",
        "tests/unit/test_train_checkpoint.py::test_writer_returns_at_once_and_writes_what_was_true_then",
    ),
    Mutation(
        "checkpoints stay until the receipt",
        "pipeline/stages/pretrain.py",
        "        peak = peak_memory(world)\n",
        "        peak = peak_memory(world)\n"
        '        __import__("shutil").rmtree(work.folder / "checkpoints", ignore_errors=True)\n',
        "tests/integration/test_pretrain_stage.py::"
        "test_killed_between_the_last_step_and_the_receipt_repeats_one_checkpoint_interval",
    ),
    Mutation(
        "another number of ranks: more parts a step",
        STATE,
        'self._cut(parts=state["world_size"] * state["accumulate"], before=state["world_size"])',
        "pass",
        f"{RESUME}::test_fewer_ranks_go_on_with_the_same_images_a_step_in_more_parts",
    ),
    Mutation(
        "on_nan: stop",
        "pipeline/train/boundary.py",
        "(~loss.isfinite()).to(torch.int64) * (step + 1)",
        "0",
        f"{RESUME}::test_loss_that_is_not_finite_stops_with_step_and_rank_and_keeps_the_checkpoint",
    ),
    Mutation(
        "on_nan: skip",
        STEP,
        "if self._is_broken(",
        "if False and self._is_broken(",
        f"{RESUME}::test_a_loss_that_is_not_finite_costs_its_step_and_no_more",
    ),
    Mutation(
        "on_nan: rollback",
        LOOP,
        "self.state.left_out.add(broken.step)",
        "pass",
        f"{RESUME}::test_a_loss_that_is_not_finite_costs_its_step_and_no_more",
    ),
    Mutation(
        "signals held while Python imports",
        "slurm/job.py",
        '    " signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM]);"\n',
        "",
        "tests/unit/test_slurm_job.py::test_signal_during_the_imports_waits_for_its_handler",
    ),
    Mutation(
        "signals ignored once the work is done",
        "slurm/job.py",
        "        _ignore_signals()\n",
        "",
        "tests/unit/test_slurm_job.py::test_signal_after_the_work_is_done_does_not_make_the_job_fail",
    ),
    Mutation(
        "a port that is taken is passed over",
        "pipeline/train/meeting.py",
        "for port in ports:\n        try:\n            store",
        "for port in ports[:1]:\n        try:\n            store",
        "tests/unit/test_train_meeting.py::test_ports_of_others_are_passed_over",
    ),
    Mutation(
        "a silent rank is missed",
        "pipeline/train/meeting.py",
        "if told or silent:",
        "if False:",
        "tests/unit/test_train_meeting.py::test_silent_rank_is_named_on_every_other_rank",
    ),
    Mutation(
        "one launcher at a time",
        "pipeline/lock.py",
        "if holder is not None and not _is_dead_elsewhere(path, holder):",
        "if False:",
        "tests/unit/test_lock.py",
    ),
    Mutation(
        "a dead holder's lock is taken over",
        "pipeline/lock.py",
        "            return False\n    return True\n\n\ndef _remove",
        "            return False\n    return False\n\n\ndef _remove",
        "tests/unit/test_lock.py::test_lock_of_a_dead_holder_on_another_host_is_taken_over",
    ),
    Mutation(
        "a launcher that stood still submits no more",
        "pipeline/lock.py",
        "        if not held:\n",
        "        if False:\n",
        "tests/unit/test_lock.py::test_holder_whose_lock_was_taken_over_is_told_and_leaves_the_new_one",
    ),
    Mutation(
        "jobs without a known id are cancelled by name",
        "pipeline/earlier_jobs.py",
        "slurm.cancel_named(before.submitting)",
        "pass",
        "tests/unit/test_campaign.py::"
        "test_jobs_of_a_launcher_that_died_while_submitting_are_found_by_their_name",
    ),
    Mutation(
        "a job of the same number and another name is not ours",
        "slurm/states.py",
        "if submission is None or not row.is_of(submission):",
        "if False:",
        "tests/unit/test_slurm_states.py::test_job_of_the_same_number_is_ours_only_if_all_that_is_known_agrees",
    ),
    Mutation(
        "a requeued job of a lost node is not over",
        "slurm/states.py",
        "not in FINAL - REQUEUED for",
        "not in FINAL for",
        "tests/unit/test_slurm_states.py::test_job_of_a_failed_node_that_is_queued_again_is_not_over",
    ),
    Mutation(
        "inputs hashed before use",
        "pipeline/stages/runner.py",
        "    problems = damaged_files(folder, receipt)\n    if problems:\n        raise UserError(\n",
        "    problems = damaged_files(folder, receipt)\n    if False:\n        raise UserError(\n",
        "tests/integration/test_launch.py::test_flipped_bit_is_found_before_use_and_repaired",
    ),
    Mutation(
        "predictions hashed before use",
        "pipeline/manifest.py",
        'hashlib.sha256(content).hexdigest() != said["sha256"]',
        "False",
        "tests/integration/test_launch.py::test_damaged_predictions_are_named_in_the_tables_not_counted",
    ),
    Mutation(
        "a receipt's own sum",
        "pipeline/manifest.py",
        "if mark and said_sum != hashlib.sha256(head).hexdigest().encode() + _SUM_END:",
        "if False:",
        "tests/unit/test_manifest.py::test_receipt_does_not_count_with_any_bit_flipped_or_any_byte_missing",
    ),
    Mutation(
        "verify --repair withdraws receipts",
        "pipeline/inspection.py",
        '(manifest.folder(manifest.task(task_id)) / "receipt.json").unlink(missing_ok=True)',
        "pass",
        "tests/integration/test_launch.py::test_flipped_bit_is_found_before_use_and_repaired",
    ),
    Mutation(
        "what depends on a lost task runs again",
        "pipeline/states.py",
        "done = unfinished.isdisjoint(task.needs) and is_done(",
        "done = is_done(",
        "tests/unit/test_plan.py::test_what_depends_on_a_lost_task_runs_again_and_nothing_else",
    ),
    Mutation(
        "results say what they were made of",
        "pipeline/states.py",
        "return not receipt.inputs or not now or receipt.inputs == now",
        "return True",
        "tests/unit/test_plan.py::"
        "test_what_was_made_of_an_earlier_result_is_not_done_in_whatever_order_stages_are_launched",
    ),
    Mutation(
        "each array waits for its own of an earlier launch's jobs",
        "pipeline/jobs.py",
        "waits = () if job.any_outcome else tuple(need for need in job.tasks[0].needs if need in alive)",
        "waits = ()",
        "tests/unit/test_campaign.py::"
        "test_each_array_waits_for_its_own_of_the_pretrainings_that_an_earlier_launch_submitted",
    ),
    Mutation(
        "what waited for a failed job waits for the new one",
        "pipeline/earlier_jobs.py",
        "while stay:",
        "while False:",
        "tests/unit/test_campaign.py::test_what_waits_for_a_job_that_failed_waits_for_the_new_one",
    ),
    Mutation(
        "a job runs what it was submitted for",
        "pipeline/stages/runner.py",
        "if key not in (None, task.key):",
        "if False:",
        "tests/unit/test_jobs.py::test_job_does_not_run_what_the_experiment_has_become_since",
    ),
    Mutation(
        "one process in a task's folder",
        "pipeline/stages/runner.py",
        'held = _hold(stack, folder / ".lock", task.id)',
        "pass",
        "tests/unit/test_jobs.py::test_task_that_another_process_runs_is_left_to_it",
    ),
    Mutation(
        "a job that is too short is not queued again for ever",
        "pipeline/stages/runner.py",
        "if task.stage in TRAINING_STAGES or not no_more_time():",
        "if True:",
        "tests/unit/test_jobs.py::test_task_that_a_whole_job_is_too_short_for_is_not_started_again_and_again",
    ),
    Mutation(
        "a checkpoint needs its log",
        STATE,
        "if self.log is not None and not begins_with(",
        "if False and not begins_with(",
        f"{RESUME}::test_a_checkpoint_is_used_only_with_the_log_that_belongs_to_it",
    ),
    Mutation(
        "a checkpoint needs its data",
        LOOP,
        "data=data,",
        'data="",',
        f"{RESUME}::test_a_checkpoint_of_other_data_is_passed_over",
    ),
    Mutation(
        "files are on disk before the receipt",
        "pipeline/manifest.py",
        "        if sync:\n            os.fsync(file.fileno())",
        "        if False:\n            os.fsync(file.fileno())",
        "tests/unit/test_files.py",
    ),
    Mutation(
        "a killed worker is said",
        "shards/parallel.py",
        "except BrokenProcessPool:",
        "except ZeroDivisionError:",
        f"{FAULTS}/test_trouble.py::test_killed_worker_of_the_shard_stage_is_said_and_the_same_command_goes_on",
    ),
    Mutation(
        "SIGTERM is a request to stop",
        "slurm/job.py",
        "for number in STOP_SIGNALS:\n            signal.signal(number, self._remember)",
        "for number in STOP_SIGNALS[:1]:\n            signal.signal(number, self._remember)",
        f"{FAULTS}/test_preemption.py::test_sigterm_alone_as_some_sites_preempt[in the middle]",
    ),
    Mutation(
        "a stopped job queues itself again",
        "pipeline/jobs.py",
        "slurm.requeue()",
        "pass",
        f"{FAULTS}/test_preemption.py::test_sigterm_alone_as_some_sites_preempt[in the middle]",
    ),
    Mutation(
        "a cancelled job does not",
        "slurm/job.py",
        "if _runs(this):",
        "if True:",
        f"{FAULTS}/test_controllers.py::test_cancelled_training_stays_cancelled",
    ),
    Mutation(
        "a failed rank ends its job",
        "slurm/submission.py",
        "--kill-on-bad-exit=1",
        "--kill-on-bad-exit=0",
        "tests/slurm/test_slurm_jobs.py::test_failed_rank_takes_its_job_along",
    ),
    Mutation(
        "Slurm may queue a job again",
        "slurm/submission.py",
        '"requeue" if profile.requeue else "no-requeue": True',
        '"no-requeue": True',
        f"{FAULTS}/test_lost_ranks.py::test_lost_node_is_replaced_by_slurm_itself",
    ),
    Mutation(
        "job ids are written down at once",
        "pipeline/campaign.py",
        "        self.manifest.write(self.path)\n        view.print_array(array, ids)",
        "        view.print_array(array, ids)",
        f"{FAULTS}/test_controllers.py::test_launcher_killed_between_two_submissions",
    ),
    Mutation(
        "late receipts are waited for",
        "pipeline/jobs.py",
        "PATIENCE_S = 90.0",
        "PATIENCE_S = 0.0",
        f"{FAULTS}/test_storage.py::test_results_that_a_shared_file_system_shows_late",
    ),
    Mutation(
        "a full disk is one line",
        "pipeline/stages/runner.py",
        "shown = storage_error(error, folder) or error",
        "shown = error",
        f"{FAULTS}/test_storage.py::test_disk_full_in_every_stage",
    ),
    Mutation(
        "tables are made whatever failed",
        "pipeline/jobs.py",
        'chunk[0].stage == "aggregate"',
        "False",
        f"{FAULTS}/test_trouble.py::test_one_of_six_methods_crashes_and_the_others_have_their_tables",
    ),
    Mutation(
        "children of a failed job are cancelled",
        "slurm/submission.py",
        '"kill-on-invalid-dep": "yes"',
        '"kill-on-invalid-dep": "no"',
        f"{FAULTS}/test_trouble.py::test_one_of_six_methods_crashes_and_the_others_have_their_tables",
    ),
]


def copy_tree(folder: Path) -> None:
    """The files of the working tree that git knows or would add."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run(test: str, folder: Path) -> tuple[bool, str]:
    """Whether a test passes in a copy of the tree, and, if not, pytest's line of the first failure."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", test],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "CASS_REQUIRE_SLURM": "1", "COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode not in (0, 1):
        raise RuntimeError(f"{test}: pytest ended with {ran.returncode}:\n{ran.stdout[-2000:]}")
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return ran.returncode == 0, " - ".join(lines[0].split(" - ")[1:]) if lines else ""


def run_without(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """As :func:`run`, with the mechanism switched off; ``folder`` is as it was afterwards."""
    path = folder / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.before, mutation.after))
    try:
        return run(mutation.test, folder)
    finally:
        path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("names", nargs="*", metavar="NAME", help="of mechanisms (default: all)")
    made.add_argument("--fast", action="store_true", help="without those that need a Slurm testbed")
    given = made.parse_args(arguments)
    chosen = [
        mutation
        for mutation in MUTATIONS
        if (not given.names or mutation.name in given.names) and not (given.fast and mutation.needs_slurm)
    ]
    unnoticed = 0
    sound: set[str] = set()  # tests that pass as long as nothing is switched off
    with tempfile.TemporaryDirectory(prefix="mutations-") as temporary:
        copy_tree(Path(temporary))
        for mutation in chosen:
            began = time.monotonic()
            passes, why = (True, "") if mutation.test in sound else run(mutation.test, Path(temporary))
            if not passes:
                raise RuntimeError(f"{mutation.test} fails with nothing switched off: {why}")
            sound.add(mutation.test)
            passes, why = run_without(mutation, Path(temporary))
            unnoticed += passes
            said = "PASSES WITHOUT IT" if passes else f"fails: {why[:120]}"
            seconds = time.monotonic() - began
            print(f"{mutation.name}: {mutation.test.split('/')[-1]} {said} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen)} mechanisms switched off, {unnoticed} unnoticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
