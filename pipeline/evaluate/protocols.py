"""The names of the evaluation protocols and of the metrics, for whoever must check them. Imports no torch."""

from __future__ import annotations

from pipeline.errors import UserError, nearest

# protocol → the function that runs it; see pipeline.evaluate.problem for its contract
PROTOCOLS = {
    "finetune": "pipeline.evaluate.finetune:run",
    "linear": "pipeline.evaluate.linear:run",
    "knn": "pipeline.evaluate.knn:run",
}
PROTOCOL_NAMES = tuple(PROTOCOLS)
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "macro_auroc")
MULTILABEL_METRICS = (*METRICS, "map")


def check_metric(name: str, *, multilabel: bool, key: str) -> None:
    """Refuse a metric that this kind of labels does not have.

    Args:
        name: the metric asked for.
        multilabel: whether a sample may have several labels.
        key: the setting that named it, for the message.

    Raises:
        UserError: unknown, or ``map`` for single labels.
    """
    known = MULTILABEL_METRICS if multilabel else METRICS
    if name not in known:
        kind = "multi-label" if multilabel else "single-label"
        expected = ", ".join(known)
        raise UserError(
            f"{key}: no metric {name!r} for {kind} data{nearest(name, known)} (expected one of {expected})"
        )
