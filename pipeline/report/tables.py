"""The tables as data frames, and as CSV files. Their columns are explained in docs/tables.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from pipeline.evaluate.protocols import PROTOCOL_NAMES
from pipeline.files import write_atomically
from pipeline.report.bootstrap import Bootstrap
from pipeline.report.load import (
    DRAWN,
    IDENTITY,
    Collected,
    Repeats,
    TrainedNet,
    cells,
    compared_values,
    pairs,
)
from pipeline.report.statistics import (
    FEW_GROUPS,
    FEW_SEEDS,
    FEWEST_GROUPS,
    gain_of,
    gain_of_repeats,
    holm,
    interval_of_mean,
    mean_std,
    score_of_repeats,
)
from pipeline.specs import ReportSettings

NAN = float("nan")
SEARCH_IDENTITY = ["dataset", "method", "backbone", "arch", "seed"]
CANDIDATE = ["rank", "candidate", "discrepancy", "cka_distance", "loss", "chosen"]
GAP = 0.05  # between validation and test: less is not worth a word
ONE_PRETRAINING = "one pretraining"  # feeds all seeds: nothing is known of another


def summary_table(collected: Collected, found: Bootstrap, settings: ReportSettings) -> pd.DataFrame:
    """One row a data set × method × backbone × protocol × fraction, over its seeds, finished or not."""
    results = collected.results
    done, failed = ((results["status"] == state).to_numpy() for state in ("done", "failed"))
    drawn = {name: results[name].to_numpy("float64", na_value=NAN) for name in DRAWN}
    collapsed = results["collapsed"].fillna(False).to_numpy(bool)
    values = {metric: results[metric].to_numpy() for metric in collected.metrics}
    validation = {metric: results[f"val_{metric}"].to_numpy() for metric in collected.metrics}
    repeats = results["repeat"].to_numpy()
    of_cells = cells(results)
    rows = _identities(results, of_cells)
    for number, (row, cell) in enumerate(zip(rows, of_cells)):
        ended = cell[done[cell]]
        row |= {
            **{name: _mean_of(counts[ended]) for name, counts in drawn.items()},
            "n": len(ended),
            "planned": len(cell),
            "failed": int(failed[cell].sum()),
            "collapsed": int(collapsed[ended].sum()),
            "repeats": len(set(repeats[ended])),
            "test_groups": found.units.get(row["dataset"]),
            "metric": collected.compared[row["dataset"]],
        }
        row["val"] = _mean_of(validation[row["metric"]][ended]) if row["metric"] in validation else NAN
        for metric in collected.metrics:
            exists = ended[~np.isnan(values[metric][ended])]
            existing = values[metric][exists]
            mean, std = mean_std(existing) if len(existing) else (NAN, NAN)
            if row["dataset"] in collected.repeats:
                of_repeats = _of_repeats(existing, repeats[exists])
                row["repeats"] = max(row["repeats"], len(of_repeats))
                mean = float(of_repeats.mean()) if len(of_repeats) else NAN
                low, high = score_of_repeats(
                    of_repeats, confidence=settings.confidence, **asdict(collected.repeats[row["dataset"]])
                )
            else:
                low, high = interval_of_mean(
                    mean,
                    found.metrics[metric][number],
                    units=found.units.get(row["dataset"], 0),
                    confidence=settings.confidence,
                )
            row |= {metric: mean, f"{metric}_std": std, f"{metric}_low": low, f"{metric}_high": high}
    fixed = [*IDENTITY, *DRAWN, "n", "planned", "failed", "collapsed"]
    fixed += ["repeats", "test_groups", "metric", "val"]
    metrics = [f"{metric}{part}" for metric in collected.metrics for part in ("", "_std", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*fixed, *metrics])


def _of_repeats(values: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """The mean over the seeds of each split, (J,)."""
    return np.array([values[repeats == number].mean() for number in np.unique(repeats)])


def _mean_of(values: np.ndarray) -> float:
    existing = values[~np.isnan(values)]
    return float(existing.mean()) if len(existing) else NAN


def _identities(results: pd.DataFrame, of_cells: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """What identifies each cell, by column."""
    firsts = results[IDENTITY].iloc[[cell[0] for cell in of_cells]]
    return [dict(zip(IDENTITY, values)) for values in firsts.itertuples(index=False, name=None)]


def gains_table(collected: Collected, found: Bootstrap, settings: ReportSettings) -> pd.DataFrame:
    """Each method against the baseline on one metric, paired by seed and by resample."""
    columns = [*IDENTITY, "baseline", "metric", "n", "pretrainings", "repeats", "test_groups"]
    columns += ["method_mean", "baseline_mean", "gain", "gain_std", "gain_low", "gain_high", "gain_test_low"]
    columns += ["gain_test_high", "smallest_gain", "p_value", "p_holm", "note"]
    results = collected.results
    values, pretrainings = compared_values(collected), results["pretrain_key"].to_numpy()
    repeats = results["repeat"].to_numpy()
    without = (results["status"] == "done").to_numpy() & np.isnan(values)
    base_of = dict(pairs(collected, settings).tolist())
    of_cells = cells(results)
    rows = []
    for number, (row, cell) in enumerate(zip(_identities(results, of_cells), of_cells)):
        if row["method"] == settings.baseline:
            continue
        mine = [position for position in cell.tolist() if position in base_of]
        base = [base_of[position] for position in mine]
        units = found.units.get(row["dataset"], 0)
        row |= {"baseline": settings.baseline, "metric": collected.compared[row["dataset"]], "n": len(mine)}
        row |= {"test_groups": units or None, "p_value": NAN}
        if mine:
            differences = values[mine] - values[base]
            row["pretrainings"] = min(len(set(pretrainings[mine])), len(set(pretrainings[base])))
            row["repeats"] = len(set(repeats[mine]))
            row["gain"], row["gain_std"] = mean_std(differences)
            row["method_mean"], row["baseline_mean"] = values[mine].mean(), values[base].mean()
            repeated = collected.repeats.get(row["dataset"])
            if repeated is not None:
                means = [_of_repeats(of, repeats[mine]) for of in (values[mine], values[base], differences)]
                row["method_mean"], row["baseline_mean"], row["gain"] = (one.mean() for one in means)
                gain = gain_of_repeats(
                    means[2],
                    ratio=repeated.ratio,
                    units=repeated.units,
                    confidence=settings.confidence,
                )
            else:
                gain = gain_of(
                    differences,
                    found.gains[number],
                    each=found.each_gain[number],
                    units=units,
                    confidence=settings.confidence,
                    seeds=row["pretrainings"] > 1,
                )
            row |= {"gain_low": gain.low, "gain_high": gain.high, "p_value": gain.p_value}
            row |= {"gain_test_low": gain.test_low, "gain_test_high": gain.test_high}
            row["smallest_gain"] = gain.smallest
            row["note"] = "; ".join(_caveats(collected.backbones, row, repeated))
        elif without[cell].any():
            row["note"] = f"{row['metric']} does not exist here"
        else:
            row["note"] = "no seed on which both the method and the baseline are done"
        rows.append(row)
    table = pd.DataFrame(rows, columns=columns)
    floats = ["gain_low", "gain_high", "gain_test_low", "gain_test_high", "smallest_gain", "p_value"]
    table[floats] = table[floats].astype("float64")
    table["p_holm"] = NAN
    for chosen in _families(table, collected, settings):
        table.loc[chosen, "p_holm"] = holm(table.loc[chosen, "p_value"].to_numpy())
    return table


def validation_gaps(collected: Collected, summary: pd.DataFrame, found: Bootstrap) -> list[str]:
    """Where validation promised more than test kept, by more than sampling allows; one line a data set.

    A cell counts whose scores differ by more than ``GAP`` and by more standard errors than one of all cells
    does by chance in one study of a hundred.
    """
    of_cells = cells(collected.results)
    sizes = collected.results["num_val"].to_numpy("float64", na_value=NAN)
    limit = float(stats.norm.isf(0.005 / max(1, len(of_cells))))
    lines = []
    for dataset, rows in summary.groupby("dataset", sort=False):
        far = []
        for number in rows.index.to_numpy():
            row = rows.loc[number]
            val, test = row["val"], row[row["metric"]]
            variance = found.metrics[row["metric"]][number]
            if not row["n"] or np.isnan([val, test, variance]).any():
                continue
            of_val = val * (1 - val) / max(1.0, np.nanmin(sizes[of_cells[number]]))
            if val - test > max(GAP, limit * math.sqrt(variance + of_val)):
                far.append((val - test, row))
        if far:
            _, worst = max(far, key=lambda one: one[0])
            lines.append(
                f"{dataset}: in {len(far)} of {len(rows)} rows of summary.csv validation is above test"
                f" by more than sampling allows, such as {worst['method']}, {worst['arch']},"
                f" {worst['protocol']}: {worst['val']:.3f} against {worst[worst['metric']]:.3f}; is the test"
                " split of another population?"
            )
    return lines


def _families(gains: pd.DataFrame, collected: Collected, settings: ReportSettings) -> list[np.ndarray]:
    """The rows of each family of comparisons: of one data set, the methods and protocols that are compared.

    Those that ``report.compare`` and ``report.compare_protocols`` name; by default every method that trains
    with the first protocol there is. All nets and label fractions of these are one family.
    """
    methods = settings.compare if settings.compare is not None else collected.trained_methods
    families = []
    for dataset, rows in gains.groupby("dataset", sort=False):
        there = [name for name in PROTOCOL_NAMES if (rows["protocol"] == name).any()]
        protocols = settings.compare_protocols if settings.compare_protocols is not None else there[:1]
        chosen = (gains["dataset"] == dataset) & gains["method"].isin(methods)
        families.append(np.flatnonzero(chosen & gains["protocol"].isin(protocols)))
    return families


def _caveats(
    backbones: Mapping[tuple[str, str, str], TrainedNet], row: dict[str, Any], repeats: Repeats | None
) -> list[str]:
    """What a reader of a gain must know beside its size."""
    caveats = []
    if repeats is not None:
        splits = "one split: no interval" if row["repeats"] == 1 else f"{row['repeats']} repeated splits"
        caveats.append(splits if repeats.units >= FEWEST_GROUPS else f"{repeats.units} groups: no interval")
    elif row["n"] == 1:
        caveats.append("one seed")
    elif row["pretrainings"] == 1:
        caveats.append(ONE_PRETRAINING)
    elif row["pretrainings"] < FEW_SEEDS:
        caveats.append(f"{row['pretrainings']} pretrainings")
    if repeats is None and row["test_groups"] is not None and row["test_groups"] < FEW_GROUPS:
        few = "no interval" if row["test_groups"] < FEWEST_GROUPS else "wide intervals"
        caveats.append(f"{row['test_groups']} test groups: {few}")
    mine, base = (backbones.get((row["dataset"], row[name], row["arch"])) for name in ("method", "baseline"))
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
