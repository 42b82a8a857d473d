"""What the methods cost, as data frames: time and memory, and the size of the nets. See docs/tables.md."""

from __future__ import annotations

import pandas as pd

from pipeline.report.load import Collected
from pipeline.specs import ReportSettings


def backbone_table(collected: Collected) -> pd.DataFrame:
    """One row a data set × method × architecture: which net was trained, and what it costs."""
    rows = [
        {
            "dataset": dataset,
            "method": method,
            "arch": arch,
            "backbone": net.backbone.name,
            "image_size": net.image_size,
            "params_m": None if net.params is None else net.params / 1e6,
            "gmac": net.gmac,
        }
        for (dataset, method, arch), net in collected.backbones.items()
    ]
    columns = ["dataset", "method", "arch", "backbone", "image_size", "params_m", "gmac"]
    return pd.DataFrame(rows, columns=columns).astype({"params_m": "float64", "gmac": "float64"})


def cost_table(collected: Collected, settings: ReportSettings) -> pd.DataFrame:
    """What each method cost on each data set: all its pretrainings, with the searches that decided on them,
    and its fine-tuning beside them."""
    rows = []
    places = collected.costs.groupby(["dataset", "method"], sort=False).indices
    for dataset in dict.fromkeys(collected.results["dataset"]):
        for method in collected.methods:
            mine = collected.costs.iloc[places.get((dataset, method), [])]
            pretrain = mine[mine["stage"].isin(("search", "pretrain"))]
            finetune = mine[mine["stage"] == "finetune"]
            training = (pretrain["device_seconds"] / pretrain["world_size"]).sum()
            images = int(pretrain["images_seen"].sum())
            rows.append(
                {
                    "dataset": dataset,
                    "method": method,
                    "pretrain_runs": int((mine["stage"] == "pretrain").sum()),
                    "pretrain_seeds": mine.loc[mine["stage"] == "pretrain", "seed"].nunique(),
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
        table[name] = _ratio_to_baseline(
            table, settings.baseline, prefixes, per_seed=name == "pretrain_ratio"
        )
    return table


def _on(rows: pd.DataFrame, device: str) -> float:
    return float(rows.loc[rows["device"] == device, "device_seconds"].sum())


def _ratio_to_baseline(
    table: pd.DataFrame, baseline: str, prefixes: tuple[str, ...], *, per_seed: bool
) -> list[float | None]:
    """Device-seconds over the baseline's; None where either is 0 or where they ran on different devices.

    Args:
        per_seed: of one pretraining of all its nets, since methods may be pretrained for different numbers of
            seeds.
    """
    spent = {
        (row["dataset"], row["method"]): tuple(
            sum(row[f"{prefix}{device}_seconds"] for prefix in prefixes)
            / (max(1, row["pretrain_seeds"]) if per_seed else 1)
            for device in ("gpu", "cpu")
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
