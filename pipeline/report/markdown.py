"""report.md: what came out, in words and tables, with everything that is missing named in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import pandas as pd

from pipeline.report.load import Collected, Unfinished
from pipeline.report.plots import ARCHITECTURES
from pipeline.specs import ReportSettings

COLLAPSED = "†"


def render(
    name: str,
    collected: Collected,
    summary: pd.DataFrame,
    gains: pd.DataFrame,
    cost: pd.DataFrame,
    images: Mapping[str, Sequence[Path]],
    settings: ReportSettings,
) -> str:
    """Write the report's text.

    Args:
        name: of the experiment.
        images: data set → PNG files beside the report.
    """
    shared = f"{100 * settings.confidence:g} %"
    parts = [f"# {name}", _best(summary, settings.metric), _unfinished(collected.unfinished)]
    datasets = list(dict.fromkeys(summary["dataset"]))
    for dataset in datasets:
        mine = summary[summary["dataset"] == dataset]
        grouped = collected.groups.get(dataset) is not None
        unit = "whole groups (patients) of the test split" if grouped else "images of the test split"
        parts += [
            f"## {dataset}: {settings.metric}",
            f"Mean over seeds [{shared} interval from a bootstrap that resamples {unit}].",
            _pivot(mine, settings.metric),
        ]
        parts += [f"![{path.stem}]({path.name})" for path in images.get(dataset, ())]
        parts += [
            f"## {dataset}: gain over {settings.baseline}",
            f"Mean over seeds of {settings.metric} minus that of `{settings.baseline}` with the same seed,"
            f" labels and test images [{shared} interval over test samples]; p from a paired t-test over"
            " seeds, not adjusted for the number of comparisons.",
            _gains(gains[gains["dataset"] == dataset]),
        ]
    parts += ["## Cost", _cost_text(settings.baseline), _cost(cost), _notes(collected, summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _best(summary: pd.DataFrame, metric: str) -> str:
    rows = []
    several = summary["dataset"].nunique() > 1
    done = summary[(summary["n"] > 0) & summary[metric].notna()]
    for place, cell in done.groupby(["dataset", "fraction", "arch"], sort=True):
        dataset, fraction, arch = cast(tuple[str, float, str], place)
        ranked = cell.sort_values(metric, ascending=False, kind="stable")
        first = ranked.iloc[0]
        others = ranked[ranked["method"] != first["method"]]
        note = ""
        if len(others):
            second = others.iloc[0]
            note = f"{second['method']}, {second['protocol']}: {_value(second, metric)}"
            if second[f"{metric}_high"] >= first[f"{metric}_low"]:
                note += " (intervals overlap)"
        rows.append(
            [
                *([dataset] if several else []),
                f"{100 * fraction:g} %",
                ARCHITECTURES[arch],
                f"{first['method']}{_mark(first)}",
                first["backbone"],
                first["protocol"],
                _value(first, metric),
                note,
            ]
        )
    if not rows:
        return "## Best at each label fraction\n\nNo fine-tuning has finished."
    header = ["labels", "net", "best method", "backbone", "protocol", metric, "next method"]
    return (
        "## Best at each label fraction\n\n"
        + _table([*(["data set"] if several else []), *header], rows)
        + "\n\nThe best is picked on the test split itself, so its value is a little too good."
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


def _pivot(summary: pd.DataFrame, metric: str) -> str:
    fractions = sorted(set(summary["fraction"]))
    rows = []
    for place, cells in summary.groupby(["arch", "backbone", "protocol", "method"], sort=False):
        arch, backbone, protocol, method = cast(tuple[str, str, str, str], place)
        by_fraction = {row["fraction"]: row for _, row in cells.iterrows()}
        values = [_cell(by_fraction.get(fraction), metric) for fraction in fractions]
        rows.append([ARCHITECTURES[arch], backbone, protocol, method, *values])
    rows.sort(key=lambda row: row[:3])
    header = ["net", "backbone", "protocol", "method", *(f"{100 * f:g} % labels" for f in fractions)]
    return _table(header, rows)


def _cell(row: pd.Series | None, metric: str) -> str:
    if row is None:
        return ""
    if not row["n"]:
        return "**failed**" if row["failed"] else "**missing**"
    partly = f" ({row['n']} of {row['planned']} seeds)" if row["n"] < row["planned"] else ""
    return _value(row, metric) + _mark(row) + partly


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
            rows.append([*place, "**missing**", "", "0", row["note"]])
            continue
        gain = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
        p_value = "" if pd.isna(row["p_value"]) else f"{row['p_value']:.3g}"
        rows.append([*place, gain, p_value, str(row["n"]), row["note"]])
    return _table(["net", "protocol", "method", "labels", "gain", "p", "seeds", "note"], rows)


def _cost_text(baseline: str) -> str:
    return (
        "All pretrainings of a method together: one that trains each net by itself is charged for both."
        f" Ratios are of device-seconds to those of `{baseline}`, of pretraining alone and with fine-tuning."
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
            f"{COLLAPSED} the pretraining collapsed: the health monitor found images alike to its loss"
            f" (receipts of {', '.join(_collapsed(collected))})."
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
