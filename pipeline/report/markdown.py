"""report.md: what came out, in words and tables, with everything that is missing named in its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import pandas as pd

from pipeline.report.load import DRAWN, Collected, Repeats, Unfinished
from pipeline.report.plots import ARCHITECTURES
from pipeline.report.statistics import FEW_GROUPS, FEWEST_GROUPS
from pipeline.specs import ReportSettings

COLLAPSED = "†"
BACKBONE_TEXT = (
    "Without classifier; 10⁹ multiply-adds of one image at the size of pretraining. Fewer parameters do not"
    " mean less to compute."
)
SEARCH_TEXT = (
    "Candidates of each search, the best first; the one in bold went into the pretraining. Discrepancy and"
    " CKA distance say how much a candidate differs from the net that it is to teach."
)


def render(
    name: str,
    collected: Collected,
    tables: Mapping[str, pd.DataFrame],
    images: Mapping[str, Sequence[Path]],
    settings: ReportSettings,
) -> str:
    """Write the report's text.

    Args:
        name: of the experiment.
        tables: by the names of their files.
        images: data set → PNG files beside the report.
    """
    summary, gains = tables["summary"], tables["gains"]
    confidence = f"{100 * settings.confidence:g} %"
    parts = [f"# {name}", _best(summary), _unfinished(collected.unfinished), _warnings(collected.warnings)]
    for dataset in dict.fromkeys(summary["dataset"]):
        mine = summary[summary["dataset"] == dataset]
        metric = collected.compared[dataset]
        grouped = collected.groups.get(dataset) is not None
        unit = "whole groups (patients) of the test split" if grouped else "images of the test split"
        parts += [
            f"## {dataset}: {metric}",
            f"Mean over seeds [{confidence} interval over {unit}]."
            if dataset not in collected.repeats
            else _repeats_text(mine, collected.repeats[dataset], confidence),
            _pivot(mine, metric),
            _drawn(mine),
            _groups_text(mine) if dataset not in collected.repeats else "",
        ]
        parts += [f"![{path.stem}]({path.name})" for path in images.get(dataset, ())]
        parts += [
            f"## {dataset}: gain over {settings.baseline}",
            f"Mean over seeds of {metric} minus that of `{settings.baseline}` with the same seed, labels and"
            f" test images [{confidence} interval over other {_others(collected, dataset)}]; p of the same"
            " test. The adjusted p is Holm's over one family, the methods and label fractions that"
            " `report.compare` and `report.compare_protocols` name. The smallest gain is what such a study"
            " shows in four cases of five, if it is there.",
            _shared_text(gains[gains["dataset"] == dataset]),
            _gains(gains[gains["dataset"] == dataset]),
        ]
    if "search" in tables:
        parts += ["## Searches", SEARCH_TEXT, _searches(tables["search"])]
    parts += ["## Backbones", BACKBONE_TEXT, _backbones(tables["backbones"])]
    parts += ["## Cost", _cost_text(settings.baseline), _cost(tables["cost"]), _notes(collected, summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _best(summary: pd.DataFrame) -> str:
    """The method with the best validation score at each label fraction, and its score on test beside it."""
    rows = []
    several = summary["dataset"].nunique() > 1
    metrics = list(dict.fromkeys(summary["metric"]))
    left_out = False
    for place, cell in summary.groupby(["dataset", "fraction", "arch", "metric"], sort=True):
        dataset, fraction, arch, metric = cast(tuple[str, float, str, str], place)
        done = cell[(cell["n"] > 0) & cell[metric].notna()]
        if done.empty:
            continue
        sound = done[done["collapsed"] < done["n"]]
        left_out |= len(sound) < len(done)
        ranked = (sound if len(sound) else done).sort_values("val", ascending=False, kind="stable")
        first = ranked.iloc[0]
        others = ranked[ranked["method"] != first["method"]]
        note = ""
        if len(others):
            second = others.iloc[0]
            note = f"{second['method']}, {second['protocol']}: {_value(second, metric)}{_partly(second)}"
            if second[f"{metric}_high"] >= first[f"{metric}_low"]:
                note += " (test intervals overlap)"
        rows.append(
            [
                *([dataset] if several else []),
                *([metric] if len(metrics) > 1 else []),
                f"{100 * fraction:g} %",
                ARCHITECTURES[arch],
                f"{first['method']}{_mark(first)}",
                first["backbone"],
                first["protocol"],
                _number(first["val"], ".3f"),
                _value(first, metric) + _partly(first),
                note,
            ]
        )
    if not rows:
        said = "No fine-tuning has finished."
        if (summary["n"] > 0).any():
            none = " and no ".join(metrics)
            said = f"Fine-tunings have finished, but on their test images there is no {none}."
        return f"## Best at each label fraction\n\n{said}"
    header = [*(["data set"] if several else []), *(["metric"] if len(metrics) > 1 else [])]
    header += ["labels", "net", "best method", "backbone", "protocol", "validation"]
    header += [f"test {metrics[0]}" if len(metrics) == 1 else "test", "next method"]
    text = "The best is picked on validation; test images are looked at once, and played no part."
    if left_out:
        text += " Nets that collapsed in pretraining are not picked while there is another."
    return "## Best at each label fraction\n\n" + _table(header, rows) + f"\n\n{text}"


def _drawn(summary: pd.DataFrame) -> str:
    """What each label fraction came to: labels and patients, and their share of all labels."""
    done = summary[summary["n"] > 0]
    if done.empty:
        return ""
    counts = done.groupby("fraction")[list(DRAWN)].mean()
    grouped = counts["num_groups"].notna().any()
    rows = []
    for asked, drawn in counts.iterrows():
        share = _number(100 * drawn["fraction_drawn"], ".3g")
        row = [f"{100 * cast(float, asked):g} %", share and f"{share} %", _number(drawn["num_labels"], ".1f")]
        row += [_number(drawn["num_groups"], ".1f")] if grouped else []
        rows.append([cell.removesuffix(".0") for cell in row])
    return _table(["fraction", "drawn", "labels", *(["groups (patients)"] if grouped else [])], rows)


def _others(collected: Collected, dataset: str) -> str:
    return "groups" if dataset in collected.repeats else "pretrainings and test samples"


def _repeats_text(summary: pd.DataFrame, repeats: Repeats, confidence: str) -> str:
    """How means and intervals over repeated splits are to be read."""
    said = (
        f"Mean over {int(summary['repeats'].max())} splits of the same {repeats.units} groups or images that"
        f" stand for themselves, and over seeds; {repeats.test_units} of them are in some test split"
    )
    if repeats.units < FEWEST_GROUPS:
        return f"{said}. They are too few for any interval or p-value."
    return (
        f"{said} [{confidence} interval over other groups, Nadeau and Bengio's corrected resampled t over the"
        " splits, here and in the gains below]."
    )


def _groups_text(summary: pd.DataFrame) -> str:
    """What few test groups mean for the intervals."""
    groups = summary["test_groups"].dropna()
    if groups.empty or groups.iloc[0] >= FEW_GROUPS:
        return ""
    said = f"The test split has {int(groups.iloc[0])} groups or images that stand for themselves: "
    if groups.iloc[0] < FEWEST_GROUPS:
        return said + "too few for any interval or p-value."
    return said + "intervals rest on few, and are wide."


def _shared_text(gains: pd.DataFrame) -> str:
    """Which methods' seeds share one pretraining: of them no interval over pretrainings can be had."""
    shared = gains[(gains["n"] > 1) & (gains["pretrainings"] == 1)]
    if shared.empty:
        return ""
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(shared["method"]))
    return (
        f"All seeds of {names} or of the baseline share one pretraining: their gains have no interval over"
        " pretrainings and no p. What `gains.csv` has for them is over test samples alone."
    )


def _unfinished(unfinished: Sequence[Unfinished]) -> str:
    if not unfinished:
        return ""
    rows = []
    for task in unfinished:
        reason = task.reason if not task.last_line else f"{task.reason}; last line: `{task.last_line}`"
        rows.append([task.task, f"**{task.state}**", reason, f"`{task.log}`" if task.log else ""])
    failed = sum(task.state == "failed" for task in unfinished)
    return (
        f"## Not finished: {failed} failed, {len(unfinished) - failed} missing\n\n"
        "The tables below are without these tasks.\n\n" + _table(["task", "state", "why", "log"], rows)
    )


def _warnings(warnings: Mapping[str, Sequence[str]]) -> str:
    lines = [f"- {', '.join(tasks)}: {line}" for line, tasks in warnings.items()]
    return "## Warnings\n\n" + "\n".join(lines) if lines else ""


def _pivot(summary: pd.DataFrame, metric: str) -> str:
    fractions = sorted(set(summary["fraction"]))
    rows = []
    for place, cells in summary.groupby(["arch", "protocol", "method", "backbone"], sort=False):
        arch, protocol, method, backbone = cast(tuple[str, str, str, str], place)
        by_fraction = {row["fraction"]: row for _, row in cells.iterrows()}
        values = [_cell(by_fraction.get(fraction), metric) for fraction in fractions]
        rows.append([ARCHITECTURES[arch], protocol, method, backbone, *values])
    rows.sort(key=lambda row: row[:2])
    header = ["net", "protocol", "method", "backbone", *(f"{100 * f:g} % labels" for f in fractions)]
    return _table(header, rows)


def _cell(row: pd.Series | None, metric: str) -> str:
    if row is None:
        return ""
    if not row["n"]:
        return "**failed**" if row["failed"] else "**missing**"
    return _value(row, metric) + _mark(row) + _partly(row)


def _partly(row: pd.Series) -> str:
    return f" ({row['n']} of {row['planned']} seeds)" if row["n"] < row["planned"] else ""


def _value(row: pd.Series, metric: str) -> str:
    if pd.isna(row[metric]):
        return "does not exist"
    if pd.isna(row[f"{metric}_low"]):
        return f"{row[metric]:.3f}"
    return f"{row[metric]:.3f} [{row[f'{metric}_low']:.3f}, {row[f'{metric}_high']:.3f}]"


def _mark(row: pd.Series) -> str:
    return f" {COLLAPSED}" if row["collapsed"] else ""


def _gains(gains: pd.DataFrame) -> str:
    if gains.empty:
        return "There is no other method to compare."
    rows = []
    for _, row in gains.iterrows():
        place = [ARCHITECTURES[row["arch"]], row["protocol"], row["method"], f"{100 * row['fraction']:g} %"]
        if not row["n"]:
            rows.append([*place, "**missing**", "", "", "", "0", row["note"]])
            continue
        gain = f"{row['gain']:+.3f}"
        if not pd.isna(row["gain_low"]):
            gain += f" [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
        numbers = [_number(row["smallest_gain"], ".3f")]
        numbers += [_number(row[name], ".3g") for name in ("p_value", "p_holm")]
        rows.append([*place, gain, *numbers, str(row["n"]), row["note"]])
    header = [
        "net",
        "protocol",
        "method",
        "labels",
        "gain",
        "smallest gain",
        "p",
        "adjusted p",
        "seeds",
        "note",
    ]
    return _table(header, rows)


def _searches(search: pd.DataFrame) -> str:
    if search.empty:
        return "None has finished."
    rows = [
        [
            row["dataset"],
            row["method"],
            ARCHITECTURES[row["arch"]],
            row["backbone"],
            str(row["seed"]),
            str(row["rank"]),
            f"**{row['candidate']}**" if row["chosen"] else row["candidate"],
            *(_number(row[name], ".3f") for name in ("discrepancy", "cka_distance", "loss")),
        ]
        for _, row in search.iterrows()
    ]
    header = ["data set", "method", "net", "backbone", "seed", "rank", "candidate"]
    return _table([*header, "discrepancy", "CKA distance", "loss"], rows)


def _backbones(backbones: pd.DataFrame) -> str:
    rows = [
        [
            row["dataset"],
            row["method"],
            ARCHITECTURES[row["arch"]],
            row["backbone"],
            str(row["image_size"]),
            _number(row["params_m"], ".2f"),
            _number(row["gmac"], ".3g"),
        ]
        for _, row in backbones.iterrows()
    ]
    header = ["data set", "method", "net", "backbone", "image size", "parameters (M)", "GMAC"]
    return _table(header, rows)


def _cost_text(baseline: str) -> str:
    return (
        "All pretrainings of a method together: one that trains each net by itself is charged for both."
        " Searches count as pretraining."
        f" Ratios are of device-seconds to those of `{baseline}`: of one seed's pretrainings of all nets,"
        " and of everything with fine-tuning."
    )


def _cost(cost: pd.DataFrame) -> str:
    if cost.empty:
        return "Nothing has run."
    header = [
        "data set",
        "method",
        "pretrainings",
        "images seen",
        "GPU s",
        "CPU s",
        "images/s",
        "fine-tunings",
        "fine-tuning GPU s",
        "fine-tuning CPU s",
        "GPU hours",
        "pretraining ratio",
        "total ratio",
    ]
    rows = [
        [
            row["dataset"],
            row["method"],
            _runs(row["pretrain_runs"], row["pretrain_planned"]),
            f"{row['images_seen']:,}",
            *(_number(row[name], ".1f") for name in ("gpu_seconds", "cpu_seconds", "images_per_second")),
            _runs(row["finetune_runs"], row["finetune_planned"]),
            *(_number(row[f"finetune_{name}_seconds"], ".1f") for name in ("gpu", "cpu")),
            _number(row["gpu_hours"], ".3f"),
            *(_number(row[name], ".2f") for name in ("pretrain_ratio", "total_ratio")),
        ]
        for _, row in cost.iterrows()
    ]
    return _table(header, rows)


def _runs(done: int, planned: int) -> str:
    return str(done) if done == planned else f"**{done} of {planned}**"


def _notes(collected: Collected, summary: pd.DataFrame) -> str:
    notes = []
    if summary["collapsed"].any():
        notes.append(
            f"{COLLAPSED} the pretraining collapsed: the health monitor found images alike to its loss, or in"
            f" its features (receipts of {', '.join(_collapsed(collected))})."
        )
    results = collected.results
    capped = results[results["steps_capped"].fillna(False).to_numpy(bool)]
    if len(capped):
        counts = Counter(f"{row['protocol']} at {row['fraction']:.0%}" for _, row in capped.iterrows())
        cells = ", ".join(f"{cell}: {count}" for cell, count in sorted(counts.items()))
        notes.append(
            f"`finetune.max_steps` ended {len(capped)} trainings while validation still rose ({cells}):"
            " with more steps they may score higher (`steps_capped` in results.csv)."
        )
    if (summary["n"] == 1).any():
        notes.append("With one seed there is no spread over seeds; intervals are over test samples only.")
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def _collapsed(collected: Collected) -> list[str]:
    found = collected.results[collected.results["collapsed"].fillna(False)]
    pairs = zip(found["dataset"], found["method"], found["arch"])
    return list(dict.fromkeys(f"{dataset} {method} {arch}" for dataset, method, arch in pairs))


def _number(value: float | None, form: str) -> str:
    return "" if value is None or pd.isna(value) else format(value, form)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
