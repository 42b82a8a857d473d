"""The four tables as data frames, and as CSV files. Their columns are explained in docs/tables.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.report.bootstrap import Draws
from pipeline.report.load import IDENTITY, Collected
from pipeline.report.statistics import interval, mean_std, paired_t
from pipeline.specs import ReportSettings

NAN = float("nan")


def summary_table(collected: Collected, draws: Draws, settings: ReportSettings) -> pd.DataFrame:
    """One row a data set × method × backbone × protocol × fraction, over its seeds, finished or not."""
    rows = []
    for identity, seeds in collected.results.groupby(IDENTITY, sort=False):
        done = seeds[seeds["status"] == "done"]
        row: dict[str, Any] = dict(zip(IDENTITY, identity))
        row |= {
            "num_labels": done["num_labels"].mean() if len(done) else None,
            "n": len(done),
            "planned": len(seeds),
            "failed": int((seeds["status"] == "failed").sum()),
            "collapsed": int(done["collapsed"].fillna(False).sum()),
        }
        for metric in collected.metrics:
            values = done[metric].dropna()
            mean, std = mean_std(values) if len(values) else (NAN, NAN)
            low, high = interval(_seed_average(draws, done["task_key"], metric), settings.confidence)
            row |= {metric: mean, f"{metric}_std": std, f"{metric}_low": low, f"{metric}_high": high}
        rows.append(row)
    fixed = [*IDENTITY, "num_labels", "n", "planned", "failed", "collapsed"]
    metrics = [f"{metric}{part}" for metric in collected.metrics for part in ("", "_std", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*fixed, *metrics])


def _seed_average(draws: Draws, keys: pd.Series, metric: str) -> np.ndarray:
    """(B,) the metric on each resample, averaged over the tasks; empty where none has it."""
    values = [draws[key][metric] for key in keys if metric in draws.get(key, {})]
    return np.mean(values, axis=0) if values else np.empty(0)


def gains_table(collected: Collected, draws: Draws, settings: ReportSettings) -> pd.DataFrame:
    """Each method against the baseline on one metric, paired by seed and by resample."""
    columns = [*IDENTITY, "baseline", "metric", "n", "method_mean", "baseline_mean"]
    columns += ["gain", "gain_std", "gain_low", "gain_high", "p_value", "note"]
    metric = settings.metric
    place = [name for name in IDENTITY if name != "method"]
    results = collected.results
    base = results[results["method"] == settings.baseline]
    rows = []
    for identity, seeds in results[results["method"] != settings.baseline].groupby(IDENTITY, sort=False):
        row: dict[str, Any] = dict(zip(IDENTITY, identity)) | {
            "baseline": settings.baseline,
            "metric": metric,
        }
        pairs = seeds.merge(base, on=[*place, "seed"], suffixes=("", "_base"))
        pairs = pairs.dropna(subset=[metric, f"{metric}_base"])
        row |= {"n": len(pairs)}
        if len(pairs):
            gains = pairs[metric] - pairs[f"{metric}_base"]
            gain, std = mean_std(gains)
            drawn = _seed_average(draws, pairs["task_key"], metric)
            low, high = interval(
                drawn - _seed_average(draws, pairs["task_key_base"], metric), settings.confidence
            )
            p_value, note = paired_t(gains)
            row |= {
                "method_mean": pairs[metric].mean(),
                "baseline_mean": pairs[f"{metric}_base"].mean(),
                "gain": gain,
                "gain_std": std,
                "gain_low": low,
                "gain_high": high,
                "p_value": p_value,
                "note": note,
            }
        else:
            row["note"] = "no seed on which both the method and the baseline are done"
        rows.append(row)
    return pd.DataFrame(rows, columns=columns)


def cost_table(collected: Collected, settings: ReportSettings) -> pd.DataFrame:
    """What each method cost on each data set: all its pretrainings, and its fine-tuning beside them."""
    rows = []
    for dataset in dict.fromkeys(collected.results["dataset"]):
        for method in collected.methods:
            mine = collected.costs.query("dataset == @dataset and method == @method")
            pretrain, finetune = (mine[mine["stage"] == stage] for stage in ("pretrain", "finetune"))
            training = (pretrain["device_seconds"] / pretrain["world_size"]).sum()
            images = int(pretrain["images_seen"].sum())
            rows.append(
                {
                    "dataset": dataset,
                    "method": method,
                    "pretrain_runs": len(pretrain),
                    "pretrain_planned": collected.planned["pretrain", dataset, method],
                    "images_seen": images,
                    "seconds": pretrain["seconds"].sum(),
                    "gpu_seconds": _on(pretrain, "cuda"),
                    "cpu_seconds": _on(pretrain, "cpu"),
                    "images_per_second": images / training if images and training else None,
                    "peak_memory_gb": pretrain["peak_memory_bytes"].max() / 1e9 if len(pretrain) else None,
                    "finetune_runs": len(finetune),
                    "finetune_planned": collected.planned["finetune", dataset, method],
                    "finetune_seconds": finetune["seconds"].sum(),
                    "finetune_gpu_seconds": _on(finetune, "cuda"),
                    "finetune_cpu_seconds": _on(finetune, "cpu"),
                    "gpu_hours": _on(mine, "cuda") / 3600,
                }
            )
    columns = list(rows[0]) if rows else ["dataset", "method"]
    table = pd.DataFrame(rows, columns=columns)
    for name, prefixes in (("pretrain_ratio", ("",)), ("total_ratio", ("", "finetune_"))):
        table[name] = _ratio_to_baseline(table, settings.baseline, prefixes)
    return table


def _on(rows: pd.DataFrame, device: str) -> float:
    return float(rows.loc[rows["device"] == device, "device_seconds"].sum())


def _ratio_to_baseline(table: pd.DataFrame, baseline: str, prefixes: tuple[str, ...]) -> list[float | None]:
    """Device-seconds over the baseline's; None where either is 0 or where they ran on different devices."""
    spent = {
        (row["dataset"], row["method"]): tuple(
            sum(row[f"{prefix}{device}_seconds"] for prefix in prefixes) for device in ("gpu", "cpu")
        )
        for row in table.to_dict("records")
    }
    ratios: list[float | None] = []
    for dataset, method in zip(table["dataset"], table["method"]):
        mine, other = spent[dataset, method], spent.get((dataset, baseline), (0.0, 0.0))
        device = 0 if mine[0] else 1
        alike = mine[1 - device] == 0 and other[1 - device] == 0 and mine[device] and other[device]
        ratios.append(mine[device] / other[device] if alike else None)
    return ratios


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table; every float is written so that it reads back to the same bits."""
    table.to_csv(path, index=False, lineterminator="\n")
