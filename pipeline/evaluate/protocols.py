"""The names of the evaluation protocols and of the metrics, for whoever must check them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError, nearest
from pipeline.specs import Dataset, Kind


@dataclass(frozen=True)
class ProtocolInfo:
    """A protocol.

    Attributes:
        target: ``module:function`` that runs it; see ``pipeline.evaluate.problem`` for its contract.
        kind: of the data sets that it is for.
        outlines: whether it needs the outline of every object, where boxes are not enough.
        restores: whether its module has ``restore``, which makes a classifier of what it saved.
    """

    target: str
    kind: Kind
    outlines: bool = False
    restores: bool = False

    def is_for(self, dataset: Dataset) -> bool:
        """Whether a data set's labels may be what it needs; of COCO's outlines only the file itself tells."""
        return self.kind == dataset.kind and not (self.outlines and dataset.source == "voc")


PROTOCOLS = {
    "finetune": ProtocolInfo("pipeline.evaluate.finetune:run", "classification", restores=True),
    "linear": ProtocolInfo("pipeline.evaluate.linear:run", "classification", restores=True),
    "knn": ProtocolInfo("pipeline.evaluate.knn:run", "classification", restores=True),
    "seg_linear": ProtocolInfo("pipeline.evaluate.seg_linear:run", "segmentation"),
    "seg_fpn": ProtocolInfo("pipeline.evaluate.seg_fpn:run", "segmentation"),
    "detect": ProtocolInfo("pipeline.evaluate.detection:run", "detection"),
    "detect_masks": ProtocolInfo("pipeline.evaluate.detection:run_masks", "detection", outlines=True),
}
PROTOCOL_NAMES = tuple(PROTOCOLS)

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "macro_auroc")
MULTILABEL_METRICS = (*METRICS, "map")
METRICS_OF = {  # of an index's task; the first of segmentation and of detection is its main one
    "multiclass": METRICS,
    "multilabel": MULTILABEL_METRICS,
    "segmentation": ("miou", "mean_dice", "mean_accuracy", "pixel_accuracy"),
    "detection": ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"),
}
ALL_METRICS = tuple(dict.fromkeys(name for names in METRICS_OF.values() for name in names))


def check_metric(name: str, *, task: str, key: str) -> str:
    """The metric that a setting means for one kind of labels.

    An experiment names one metric for all its data sets. Where those of segmentation or detection have no
    such metric, their main one stands in.

    Args:
        name: the metric asked for.
        task: of the index: ``multiclass``, ``multilabel``, ``segmentation`` or ``detection``.
        key: the setting that named it, for the message.

    Raises:
        UserError: unknown, or one that this kind of labels does not have, such as ``map`` for single labels.
    """
    known = METRICS_OF[task]
    if name in known:
        return name
    if task in ("segmentation", "detection") and name in ALL_METRICS:
        return known[0]
    kind = {"multiclass": "single-label", "multilabel": "multi-label"}.get(task, task)
    expected = ", ".join(known)
    raise UserError(
        f"{key}: no metric {name!r} for {kind} data{nearest(name, known)} (expected one of {expected})"
    )
