"""Backbones as folders in timm's local-dir layout, and back.

``timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=K)`` loads such a folder for any K: the
classifier is left out, so that a new one is made, and the features are the same to the bit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save

from pipeline.data.squares import Fit
from pipeline.files import write_atomically
from pipeline.nets.architectures import default_architecture
from pipeline.nets.backbone import Net, check_image_size
from pipeline.nets.seeding import seeded
from pipeline.nets.weights import CONFIG, WEIGHTS, load_file, read_config
from pipeline.specs import Architecture
from shards import Index

_PROVENANCE = "training"  # our own key in config.json; timm passes over it
CROP_MODES: dict[Fit, str] = {"squash": "squash", "crop": "center", "pad": "border"}  # timm's words


@dataclass(frozen=True)
class Classifier:
    """What an exported classifier says beside its weights.

    Attributes:
        classes: their names, in the order of its outputs.
        multilabel: an image may be of several classes: scores are sigmoids, not a softmax.
        thresholds: a score for each class above which it is taken to be there, chosen on validation; empty
            where there is none.
    """

    classes: Sequence[str]
    multilabel: bool = False
    thresholds: Sequence[float] = ()


def export(
    net: Net,
    folder: str | Path,
    *,
    trained: dict[str, Any],
    fit: Fit = "squash",
    classifier: Classifier | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json``: the same net and text give the same bytes.

    Each file is written under another name and renamed; the config comes last, and without it nothing loads.
    ``timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))`` prepares an 8-bit image
    file as training did, but for rounding (and for a large JPEG's being decoded at a fraction of its size).

    Args:
        net: the backbone.
        folder: made if it is not there.
        fit: how images of other shapes became square.
        classifier: of the net, which then is written with it; None: the net's classifier is left out.
        trained: where the weights come from (dataset, method, epochs, …), kept under the config's key
            ``training``. ``license``, ``origin_url`` and ``description`` in it also go where timm shows them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    copied = copy.deepcopy(net).cpu()
    written = (copied if classifier is not None else copied.headless()).net
    tensors = {key: value.detach().contiguous().clone() for key, value in written.state_dict().items()}
    write_atomically(
        folder / WEIGHTS, save(tensors, metadata={"format": "pt"})
    )  # one entry: its order is not fixed
    write_atomically(
        folder / CONFIG, (json.dumps(_config(net, trained, fit, classifier), indent=2) + "\n").encode()
    )


def said_intensity(index: Index) -> dict[str, Any]:
    """What an export says of images of more than 8 bits a channel: what was black and white in training."""
    return {"intensity": index.meta["intensity"]} if index.meta["intensity"] else {}


def load_exported(
    folder: str | Path, *, num_classes: int | None, image_size: int | None = None, seed: int = 0
) -> Net:
    """Load an exported folder with a new classifier, or with its own.

    Args:
        folder: written by ``export``.
        num_classes: outputs of the new classifier; 0: none; None: the classifier that was written.
        image_size: side in pixels to build it for; None: as trained.
        seed: of the new classifier's weights.

    Raises:
        UserError: no export there, or an image size that the model cannot take.
    """
    folder = Path(folder)
    config = read_config(folder)
    own = config.get(_PROVENANCE, {})
    cfg, args = config["pretrained_cfg"], dict(config.get("model_args", {}))
    name = config["architecture"]
    if num_classes is None:
        num_classes = config["num_classes"]
    size = image_size or cfg["input_size"][-1]
    if "img_size" in args:
        args["img_size"] = size
    with seeded(seed, "classifier"):
        net = timm.create_model(name, pretrained_cfg=cfg, **args | {"num_classes": num_classes})
    check_image_size(net, name, size)
    load_file(net, folder, name=name)
    arch: Architecture = own.get("arch") or default_architecture(name)
    return Net(net, arch=arch, name=name, args=args, image_size=size, mean=cfg["mean"], std=cfg["std"])


def _config(net: Net, trained: dict[str, Any], fit: Fit, classifier: Classifier | None) -> dict[str, Any]:
    """What timm reads, and under a key of our own the rest. Nothing of timm's weights' origin is kept."""
    classes = list(classifier.classes) if classifier is not None else []
    timm_cfg = net.net.pretrained_cfg
    size = [3, net.image_size, net.image_size]
    cfg = {
        "tag": str(trained.get("method", "local")),
        "input_size": size,
        "fixed_input_size": bool(net.args.get("img_size")) and not net.args.get("dynamic_img_size", False),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": CROP_MODES[fit],
        "mean": list(net.mean),
        "std": list(net.std),
        "num_classes": len(classes),
        "pool_size": None,
        "first_conv": timm_cfg.get("first_conv"),
        "classifier": timm_cfg.get("classifier"),
        "license": trained.get("license", "other"),  # the hub's word for: ask whoever trained it
    }
    cfg |= {key: trained[key] for key in ("origin_url", "description") if trained.get(key)}
    args = {key: value for key, value in net.args.items() if key != "num_classes" and "drop" not in key}
    labels: dict[str, Any] = {}
    if classifier is not None:
        labels = {"label_names": classes}
        trained = trained | {
            "multilabel": classifier.multilabel,
            "thresholds": [round(float(value), 6) for value in classifier.thresholds],
        }
    return {
        "architecture": net.name.partition(".")[0],
        "num_classes": len(classes),
        "num_features": net.num_features,
        **labels,
        "model_args": dict(sorted(args.items())),
        "pretrained_cfg": cfg,
        _PROVENANCE: {"arch": net.arch} | {key: trained[key] for key in sorted(trained)},
    }
