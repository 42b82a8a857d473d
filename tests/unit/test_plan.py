"""The plan: which tasks an experiment has, what they need, and when their keys change."""

from __future__ import annotations

from dataclasses import asdict, replace

from pipeline.experiment_file import load_experiment
from pipeline.jobs import arrays, pack
from pipeline.manifest import Manifest, Receipt, write_json
from pipeline.plan import plan
from pipeline.states import done_tasks, inputs_of, pending_tasks


def tasks_of(*settings: str):
    return {task.id: task for task in plan(load_experiment("quickstart", settings))}


def test_every_task_comes_after_what_it_needs():
    seen: set[str] = set()
    for task in plan(load_experiment("quickstart")):
        assert set(task.needs) <= seen
        seen.add(task.id)


def test_joint_method_is_one_pretraining_and_others_one_a_backbone():
    ids = tasks_of()
    assert "pretrain/digits-cass-cnn-vit-s0" in ids
    assert "pretrain/digits-dino-cnn-s0" in ids and "pretrain/digits-dino-vit-s0" in ids
    vit = ids["finetune/digits-cass-vit-linear-10pc-s1"]
    assert vit.needs == ("shard/digits", "pretrain/digits-cass-cnn-vit-s1")


def test_each_seed_has_its_own_pretraining_unless_one_is_to_feed_all():
    ids = tasks_of()
    assert "pretrain/digits-dino-cnn-s1" in ids
    assert "pretrain/digits-dino-cnn-s1" in ids["finetune/digits-dino-cnn-knn-1pc-s1"].needs
    ids = tasks_of("pretrain.seeds=first")
    assert "pretrain/digits-dino-cnn-s1" not in ids
    assert "pretrain/digits-dino-cnn-s0" in ids["finetune/digits-dino-cnn-knn-1pc-s1"].needs


def test_change_reaches_exactly_what_depends_on_it():
    before, after = tasks_of(), tasks_of("methods.dino.train.epochs=3")
    changed = {task for task in before if before[task].key != after[task].key}
    assert changed == {task for task in before if "-dino-" in task} | {"aggregate/quickstart"}


def test_fractions_change_no_pretraining():
    before, after = tasks_of(), tasks_of("finetune.fractions=[0.5]")
    assert all(before[t].key == after[t].key for t in before if t.startswith(("shard", "pretrain")))


def test_resources_change_no_key():
    before, after = tasks_of(), tasks_of("resources.pretrain.nodes=2", "resources.finetune.minutes=7")
    assert {t: before[t].key for t in before} == {t: after[t].key for t in after}
    assert after["pretrain/digits-cass-cnn-vit-s0"].resources["nodes"] == 2


def test_packs_hold_all_tasks_once_and_wait_for_exactly_their_needs():
    tasks = plan(load_experiment("quickstart", ["resources.finetune.tasks_per_job=7"]))
    jobs = pack(tasks)
    assert sorted(task.id for job in jobs for task in job.tasks) == sorted(task.id for task in tasks)
    assert max(len(job.tasks) for job in jobs) == 7 - 1  # 18 tasks in packs of at most 7: three of 6
    by_name = {job.name: job for job in jobs}
    for job in jobs:
        waited = {task.id for name in job.after for task in by_name[name].tasks}
        assert waited == {need for task in job.tasks for need in task.needs}
    assert [job.any_outcome for job in jobs].count(True) == 1
    grouped = arrays(jobs)
    assert sum(map(len, grouped)) == len(jobs)
    assert all(len({job.after for job in array}) == 1 for array in grouped)


def receipt(task, **metrics):
    return Receipt(task.key, task.id, task.stage, metrics, {}, "", "", 0.0, [], 1)


def test_done_tasks_do_not_run_again_and_tables_follow_what_runs(tmp_path):
    tasks = plan(load_experiment("quickstart"))
    manifest = Manifest({}, str(tmp_path), tasks)
    for task in tasks:
        receipt(task).write(manifest.folder(task))
    stages = ("shard", "pretrain", "finetune", "aggregate")
    assert pending_tasks(manifest, stages) == []
    lost = manifest.task("finetune/digits-dino-cnn-knn-1pc-s1")
    (manifest.folder(lost) / "receipt.json").unlink()
    assert [task.id for task in pending_tasks(manifest, stages)] == [lost.id, "aggregate/quickstart"]
    assert [task.id for task in pending_tasks(manifest, stages, active={lost.id})] == ["aggregate/quickstart"]


def test_what_depends_on_a_lost_task_runs_again_and_nothing_else(tmp_path):
    tasks = plan(load_experiment("quickstart"))
    manifest = Manifest({}, str(tmp_path), tasks)
    for task in tasks:
        receipt(task).write(manifest.folder(task))
    lost = manifest.task("pretrain/digits-dino-cnn-s0")
    (manifest.folder(lost) / "receipt.json").unlink()
    dependent = {task.id for task in tasks if lost.id in task.needs}
    stages = ("shard", "pretrain", "finetune", "aggregate")
    assert {task.id for task in pending_tasks(manifest, stages)} == {lost.id} | dependent
    assert len(dependent) == 10
    assert [task.id for task in pending_tasks(manifest, ("finetune",))] == []


def test_what_was_made_of_an_earlier_result_is_not_done_in_whatever_order_stages_are_launched(tmp_path):
    tasks = plan(load_experiment("quickstart"))
    manifest = Manifest({}, str(tmp_path), tasks)
    receipts: dict[str, Receipt] = {}
    for task in tasks:
        made = replace(receipt(task), inputs=inputs_of(task, receipts))
        made.write(manifest.folder(task))
        receipts[task.id] = manifest.receipt(task)
    stages = ("shard", "pretrain", "finetune", "aggregate")
    assert pending_tasks(manifest, stages) == []
    again = manifest.task("pretrain/digits-dino-cnn-s0")  # was launched alone, and is done again
    replace(receipts[again.id], seconds=7.0).write(manifest.folder(again))
    dependent = {task.id for task in tasks if again.id in task.needs}
    assert {task.id for task in pending_tasks(manifest, stages)} == dependent
    assert done_tasks(manifest) == {task.id for task in tasks} - dependent


def test_results_of_a_version_that_wrote_no_sums_are_done(tmp_path):
    tasks = plan(load_experiment("quickstart"))
    manifest = Manifest({}, str(tmp_path), tasks)
    for task in tasks:
        said = asdict(receipt(task))
        del said["sum"], said["inputs"]
        write_json(manifest.folder(task) / "receipt.json", said)
    assert len(done_tasks(manifest)) == len(tasks)


def test_tables_that_lacked_a_task_are_made_again_once_it_is_there(tmp_path):
    tasks = plan(load_experiment("quickstart"))
    manifest = Manifest({}, str(tmp_path), tasks)
    for task in tasks[:-1]:
        receipt(task).write(manifest.folder(task))
    receipt(tasks[-1], unfinished=[tasks[-2].id]).write(manifest.folder(tasks[-1]))
    assert [task.id for task in pending_tasks(manifest, ("aggregate",))] == [tasks[-1].id]


def test_a_root_is_the_same_however_it_is_written(monkeypatch, tmp_path):
    root = tmp_path / "images"
    (tmp_path / "here").mkdir()

    def key(written: str) -> str:
        return tasks_of("dataset.source=folder", f"dataset.root={written}")["shard/digits"].key

    monkeypatch.chdir(tmp_path / "here")
    assert key("../images") == key(str(root)) == key(f"{tmp_path}/here/../images")


def test_option_given_as_search_is_decided_by_one_search_before_all_pretrainings_of_a_net():
    settings = [
        "methods={supervised: {}, hssl: {options: {head: search, search_epochs: 2}}, dino: {}}",
        "pretrain.seeds=each",
    ]
    tasks = {task.id: task for task in plan(load_experiment("quickstart", settings))}
    assert [name for name in tasks if name.startswith("search/")] == [
        "search/digits-hssl-cnn",
        "search/digits-hssl-vit",
    ]
    search = tasks["search/digits-hssl-vit"]
    assert search.needs == ("shard/digits",) and search.spec["train"]["epochs"] == 2
    for seed in (0, 1):
        pretrain = tasks[f"pretrain/digits-hssl-vit-s{seed}"]
        assert pretrain.needs == ("shard/digits", "search/digits-hssl-vit")
        assert pretrain.spec["options"]["head"] == "search"
    assert tasks["pretrain/digits-dino-vit-s0"].needs == ("shard/digits",)
    other = plan(load_experiment("quickstart", [*settings, "methods.hssl.options.candidates=[vit, pool]"]))
    keys = {task.id: task.key for task in other}
    assert keys["search/digits-hssl-vit"] != search.key
    assert keys["pretrain/digits-dino-vit-s0"] == tasks["pretrain/digits-dino-vit-s0"].key


def test_a_search_warms_up_for_the_share_of_it_that_the_pretraining_does():
    settings = [
        "methods={supervised: {}, hssl: {options: {head: search, teacher_warmup_epochs: 50}}}",
        "methods.hssl.options.search_epochs=10",
        "pretrain.epochs=100",
        "pretrain.warmup_epochs=10",
    ]
    tasks = {task.id: task for task in plan(load_experiment("quickstart", settings))}
    search, training = tasks["search/digits-hssl-vit"].spec, tasks["pretrain/digits-hssl-vit-s0"].spec
    assert (search["train"]["epochs"], search["train"]["warmup_epochs"]) == (10, 1)
    assert search["options"]["teacher_warmup_epochs"] == 5
    assert search["options"]["freeze_last_layer_epochs"] == 0.1
    assert training["train"]["warmup_epochs"] == 10 and training["options"]["teacher_warmup_epochs"] == 50


def test_images_become_square_as_in_pretraining_unless_fine_tuning_says_otherwise():
    def fits(*settings):
        tasks = plan(load_experiment("quickstart", ["methods.cass.train={fit: pad}", *settings]))
        return {
            (task.spec["label"], task.spec["settings"]["fit"]) for task in tasks if task.stage == "finetune"
        }

    assert {("cass", "pad"), ("supervised", "squash")} < fits()
    assert {("cass", "pad"), ("supervised", "crop")} < fits("pretrain.fit=crop")
    assert {fit for _, fit in fits("pretrain.fit=crop", "finetune.fit=squash")} == {"squash"}


def test_no_search_without_need():
    tasks = plan(load_experiment("quickstart", ["methods={supervised: {}, hssl: {options: {head: pool}}}"]))
    assert not [task for task in tasks if task.stage == "search"]


def test_repeated_splits_add_tasks_and_change_none():
    before, after = tasks_of(), tasks_of("dataset.splits.repeats=3")
    assert {task: before[task].key for task in before} == {
        task: tasks_of("dataset.splits.repeats=1")[task].key for task in before
    }
    assert {task for task in before if before[task].key != after[task].key} == {"aggregate/quickstart"}
    own = [task for task in before if not task.startswith("aggregate/")]
    for number in (2, 3):
        renamed = {task.replace("/digits", f"/digits-r{number}") for task in own}
        assert renamed <= set(after)
        assert not {after[task].key for task in renamed} & {before[task].key for task in own}
        shard = after[f"shard/digits-r{number}"].spec
        assert (shard["repeat"], shard["pooled"]) == (number, "digits")
        assert shard["dataset"]["seed"] == number - 1
        assert after[f"finetune/digits-r{number}-dino-cnn-knn-1pc-s1"].needs == (
            f"shard/digits-r{number}",
            f"pretrain/digits-r{number}-dino-cnn-s1",
        )
    assert len(after) == 3 * len(own) + 1
    assert set(own) <= set(tasks_of("dataset.splits.repeats=2")) <= set(after)  # more only add
