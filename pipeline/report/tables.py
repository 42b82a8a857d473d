"""The tables as data frames, and as CSV files. Their columns are explained in docs/tables.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.files import write_atomically
from pipeline.report.bootstrap import Bootstrap
from pipeline.report.load import IDENTITY, Collected, TrainedNet, cells, compared_values, pairs
from pipeline.report.statistics import holm, mean_std, paired_ts
from pipeline.specs import ReportSettings

NAN = float("nan")
SEARCH_IDENTITY = ["dataset", "method", "backbone", "arch", "seed"]
CANDIDATE = ["rank", "candidate", "discrepancy", "cka_distance", "loss", "chosen"]
FAMILY = ["dataset", "arch", "protocol"]  # p-values of gains.csv are adjusted over the rows that share these
ONE_PRETRAINING = "all seeds share one pretraining: no p-value, and an interval without its variance"


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
            "metric": collected.compared[row["dataset"]],
        }
        for metric in collected.metrics:
            existing = values[metric][ended]
            existing = existing[~np.isnan(existing)]
            mean, std = mean_std(existing) if len(existing) else (NAN, NAN)
            low, high = found.metrics[metric][number]
            row |= {metric: mean, f"{metric}_std": std, f"{metric}_low": low, f"{metric}_high": high}
    fixed = [*IDENTITY, "num_labels", "n", "planned", "failed", "collapsed", "metric"]
    metrics = [f"{metric}{part}" for metric in collected.metrics for part in ("", "_std", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*fixed, *metrics])


def _identities(results: pd.DataFrame, of_cells: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """What identifies each cell, by column."""
    firsts = results[IDENTITY].iloc[[cell[0] for cell in of_cells]]
    return [dict(zip(IDENTITY, values)) for values in firsts.itertuples(index=False, name=None)]


def gains_table(collected: Collected, found: Bootstrap, settings: ReportSettings) -> pd.DataFrame:
    """Each method against the baseline on one metric, paired by seed and by resample."""
    columns = [*IDENTITY, "baseline", "metric", "n", "method_mean", "baseline_mean", "gain", "gain_std"]
    columns += ["gain_low", "gain_high", "gain_test_low", "gain_test_high", "p_value", "p_holm", "note"]
    results = collected.results
    values, pretrainings = compared_values(collected), results["pretrain_key"].to_numpy()
    without = (results["status"] == "done").to_numpy() & np.isnan(values)
    base_of = dict(pairs(collected, settings).tolist())
    of_cells = cells(results)
    rows = []
    differences: list[np.ndarray] = []
    for number, (row, cell) in enumerate(zip(_identities(results, of_cells), of_cells)):
        if row["method"] == settings.baseline:
            continue
        mine = [position for position in cell.tolist() if position in base_of]
        base = [base_of[position] for position in mine]
        row |= {"baseline": settings.baseline, "metric": collected.compared[row["dataset"]], "n": len(mine)}
        if mine:
            row["note"] = _caveats(collected.backbones, row, [pretrainings[mine], pretrainings[base]])
            differences.append(values[mine] - values[base])
            row["gain"], row["gain_std"] = mean_std(differences[-1])
            row["method_mean"], row["baseline_mean"] = values[mine].mean(), values[base].mean()
            row["gain_low"], row["gain_high"] = found.gains[number]
            row["gain_test_low"], row["gain_test_high"] = found.test_gains[number]
        elif without[cell].any():
            row["note"] = f"{row['metric']} does not exist here"
        else:
            row["note"] = "no seed on which both the method and the baseline are done"
        rows.append(row)
    tested = iter(paired_ts(differences))
    for row in rows:
        if row["n"]:
            p_value, note = next(tested)
            row["p_value"] = NAN if ONE_PRETRAINING in row["note"] else p_value
            row["note"] = "; ".join(filter(None, [note, *row["note"]]))
    table = pd.DataFrame(rows, columns=columns)
    table["p_value"] = table["p_value"].astype("float64")
    table["p_holm"] = table.groupby(FAMILY)["p_value"].transform(holm)
    return table


def _caveats(
    backbones: Mapping[tuple[str, str, str], TrainedNet], row: dict[str, Any], keys: Sequence[np.ndarray]
) -> list[str]:
    """What a reader of a gain must know beside its size.

    Args:
        keys: of the pretrainings behind the method's seeds, and behind the baseline's.
    """
    mine, base = (backbones.get((row["dataset"], row[name], row["arch"])) for name in ("method", "baseline"))
    caveats = []
    if any(len(each) > 1 and len(set(each)) == 1 and each[0] for each in keys):
        caveats.append(ONE_PRETRAINING)
    if mine and base and not mine.is_same_net(base):
        caveats.append("another backbone than the baseline's")
    return caveats


def search_table(collected: Collected) -> pd.DataFrame:
    """One row a candidate of every finished search, the best first."""
    rows = []
    for search in collected.searches:
        spec, metrics = search.spec, search.metrics
        for arch, backbone in spec.backbones.items():
            for rank, candidate in enumerate(metrics["ranking"], start=1):
                row: dict[str, Any] = {"dataset": spec.dataset, "method": spec.label}
                row |= {"backbone": backbone.name, "arch": arch, "seed": spec.seed, "rank": rank, **candidate}
                rows.append(row | {"chosen": candidate["candidate"] == metrics["winner"]})
    return pd.DataFrame(rows, columns=[*SEARCH_IDENTITY, *CANDIDATE])


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table; every float is written so that it reads back to the same bits."""
    text: str = table.to_csv(index=False, lineterminator="\n")
    write_atomically(path, text.encode(), sync=False)
