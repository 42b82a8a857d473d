"""The four tables as data frames, and as CSV files. Their columns are explained in docs/tables.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.report.bootstrap import Bootstrap
from pipeline.report.load import IDENTITY, Collected, cells, pairs
from pipeline.report.statistics import mean_std, paired_ts
from pipeline.specs import ReportSettings

NAN = float("nan")


def summary_table(collected: Collected, found: Bootstrap) -> pd.DataFrame:
    """One row a data set × method × backbone × protocol × fraction, over its seeds, finished or not."""
    results = collected.results
    done, failed = ((results["status"] == state).to_numpy() for state in ("done", "failed"))
    num_labels = results["num_labels"].to_numpy("float64", na_value=NAN)
    collapsed = results["collapsed"].fillna(False).to_numpy(bool)
    values = {metric: results[metric].to_numpy() for metric in collected.metrics}
    of_cells = cells(results)
    rows = _identities(results, of_cells)
    for number, (row, cell) in enumerate(zip(rows, of_cells)):
        ended = cell[done[cell]]
        row |= {
            "num_labels": num_labels[ended].mean() if len(ended) else None,
            "n": len(ended),
            "planned": len(cell),
            "failed": int(failed[cell].sum()),
            "collapsed": int(collapsed[ended].sum()),
        }
        for metric in collected.metrics:
            existing = values[metric][ended]
            existing = existing[~np.isnan(existing)]
            mean, std = mean_std(existing) if len(existing) else (NAN, NAN)
            low, high = found.metrics[metric][number]
            row |= {metric: mean, f"{metric}_std": std, f"{metric}_low": low, f"{metric}_high": high}
    fixed = [*IDENTITY, "num_labels", "n", "planned", "failed", "collapsed"]
    metrics = [f"{metric}{part}" for metric in collected.metrics for part in ("", "_std", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*fixed, *metrics])


def _identities(results: pd.DataFrame, of_cells: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """What identifies each cell, by column."""
    firsts = results[IDENTITY].iloc[[cell[0] for cell in of_cells]]
    return [dict(zip(IDENTITY, values)) for values in firsts.itertuples(index=False, name=None)]


def gains_table(collected: Collected, found: Bootstrap, settings: ReportSettings) -> pd.DataFrame:
    """Each method against the baseline on one metric, paired by seed and by resample."""
    columns = [*IDENTITY, "baseline", "metric", "n", "method_mean", "baseline_mean"]
    columns += ["gain", "gain_std", "gain_low", "gain_high", "p_value", "note"]
    results = collected.results
    values = results[settings.metric].to_numpy()
    base_of = dict(pairs(results, settings).tolist())
    of_cells = cells(results)
    rows = []
    differences = []
    for number, (row, cell) in enumerate(zip(_identities(results, of_cells), of_cells)):
        if row["method"] == settings.baseline:
            continue
        mine = [position for position in cell.tolist() if position in base_of]
        base = [base_of[position] for position in mine]
        row |= {"baseline": settings.baseline, "metric": settings.metric, "n": len(mine)}
        if mine:
            differences.append(values[mine] - values[base])
            row["gain"], row["gain_std"] = mean_std(differences[-1])
            row["method_mean"], row["baseline_mean"] = values[mine].mean(), values[base].mean()
            row["gain_low"], row["gain_high"] = found.gains[number]
        else:
            row["note"] = "no seed on which both the method and the baseline are done"
        rows.append(row)
    tested = iter(paired_ts(differences))
    for row in rows:
        if row["n"]:
            row["p_value"], row["note"] = next(tested)
    return pd.DataFrame(rows, columns=columns)


def cost_table(collected: Collected, settings: ReportSettings) -> pd.DataFrame:
    """What each method cost on each data set: all its pretrainings, and its fine-tuning beside them."""
    rows = []
    places = collected.costs.groupby(["dataset", "method"], sort=False).indices
    for dataset in dict.fromkeys(collected.results["dataset"]):
        for method in collected.methods:
            mine = collected.costs.iloc[places.get((dataset, method), [])]
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
