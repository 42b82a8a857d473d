"""Initial weights from elsewhere: timm's own, or a file; and one clear line when that fails."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from pipeline.errors import UserError

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # timm's names
ANY_SIZE = ("img_size", "dynamic_img_size", "num_classes")  # args that may differ from those of the weights
_WRAPPERS = (
    "state_dict",
    "model",
    "model_state",
    "teacher",
    "net",
)  # keys that checkpoints nest weights under


def imagenet_refusal(name: str, args: dict[str, Any], error: Exception, *, pretrained: bool) -> UserError:
    """The one line for a timm model that could not be built."""
    reason = _first_line(error)
    if not pretrained:
        return UserError(f"backbone '{name}' cannot be built with args {args}: {reason}")
    if "No pretrained weights exist" in reason:
        return UserError(
            f"backbone '{name}': timm has no ImageNet weights for it; use weights 'random' or a file"
        )
    if isinstance(error, RuntimeError) or "inconsistent with" in reason:  # torch's, not the network's
        said = " ".join(str(error).split())[:300]
        return UserError(f"backbone '{name}': its ImageNet weights do not fit args {args}: {said}")
    return UserError(
        f"backbone '{name}': its ImageNet weights are neither in timm's cache nor reachable "
        f"({type(error).__name__}: {reason[:100]}); download them once, or give a file as 'weights'"
    )


def cached_overlay(name: str) -> dict[str, Any] | None:
    """What makes timm read its weights from the hub's cache without asking the network first.

    None where they are not cached, or come in a form that timm converts while downloading.
    """
    cfg = timm.get_pretrained_cfg(name)
    if not cfg or not cfg.hf_hub_id or cfg.custom_load:
        return None
    for file in (cfg.hf_hub_filename,) if cfg.hf_hub_filename else (WEIGHTS, "pytorch_model.bin"):
        found = try_to_load_from_cache(cfg.hf_hub_id, file)
        if isinstance(found, str):
            return {"file": found}
    return None


@contextmanager
def quiet_hub() -> Iterator[None]:
    """The hub's own log of its retries is held back: what matters is in the error that follows."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_file(net: Any, path: str | Path, *, name: str, args: dict[str, Any] | None = None) -> None:
    """Load a state dict into a timm model; a classifier with other classes is left at its initial weights.

    Weights that do not fit as they are go through timm's own filter for the model's family, which
    interpolates position embeddings and patch kernels made for another image size, and renames old keys.

    Args:
        net: the timm model, changed in place.
        path: a ``.safetensors`` or torch file, or a folder that holds ``model.safetensors``.
        name: the backbone's name, for messages.
        args: that timm built the model with, for messages too; None: those of the folder itself.

    Raises:
        UserError: no such file, not readable as weights, or weights of another model; of an exported folder
            with what it was built with.
    """
    state = _without_other_classifier(_read_state(weights_file(path, name=name)), net)
    problem = _difference(state, net)
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if problem and convert is not None:
        try:
            state = _without_other_classifier(convert(state, net), net)
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            problem = _first_line(error)
        else:
            problem = _difference(state, net)
    if problem:
        if args is not None:
            problem = _built_otherwise(Path(path), name, args) or problem
        raise UserError(f"weights '{path}' do not fit backbone '{name}': {problem}")
    net.load_state_dict(state, strict=False)


def _built_otherwise(folder: Path, name: str, args: dict[str, Any]) -> str:
    """How an exported folder's net differs from the backbone, in words; empty where nothing says so."""
    if not (folder / CONFIG).is_file():
        return ""
    config = read_config(folder)
    own = {key: value for key, value in config.get("model_args", {}).items() if key not in ANY_SIZE}
    asked = {key: value for key, value in args.items() if key not in ANY_SIZE}
    said = []
    if config["architecture"] != name.partition(".")[0]:
        said.append(f"they are of a {config['architecture']}")
    if other := {key: value for key, value in own.items() if key not in asked or asked[key] != value}:
        said.append(f"their net was built with args {shown(other)}")
    if more := {key: value for key, value in asked.items() if key not in own}:
        said.append(f"their net was built without args {shown(more)}")
    return " and ".join(said) + "; give this one the same" if said else ""


def shown(args: dict[str, Any]) -> str:
    """A net's args as an experiment file has them."""
    return "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in args.items()) + "}"


def file_normalisation(path: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) that an exported folder was trained with, or None where the file does not say."""
    if not (Path(path) / CONFIG).is_file():
        return None
    cfg = read_config(Path(path))["pretrained_cfg"]
    return tuple(cfg["mean"]), tuple(cfg["std"])


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of an exported folder.

    Raises:
        UserError: it is not there, or is not such a file.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{folder}' holds no exported backbone: expected {CONFIG} in it") from None
    except ValueError as error:
        raise UserError(f"'{folder / CONFIG}' is not JSON: {error}") from None
    for key in ("architecture", "pretrained_cfg"):
        if not isinstance(config, dict) or key not in config:
            raise UserError(f"'{folder / CONFIG}' is not an exported backbone's: it has no '{key}'")
    return config


def weights_file(path: str | Path, *, name: str) -> Path:
    """The file that a path of weights, or of an exported folder, stands for.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"backbone '{name}': weights '{path}' not found; "
            "expected 'random', 'imagenet', or a file or folder"
        )
    return path


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes can fail in any way
        # torch's own message is a page on how to load it without protection.
        raise UserError(
            f"weights '{path}' cannot be read as tensors ({type(error).__name__});"
            " expected a state dict saved by torch or safetensors"
        ) from None
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state:
        raise UserError(f"weights '{path}' hold no state dict of tensors")
    for prefix in ("module.", "_orig_mod.", "module."):  # left by DDP and torch.compile
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _classifier_prefixes(net: Any) -> tuple[str, ...]:
    names = net.pretrained_cfg.get("classifier") or ()
    return tuple(f"{n}." for n in ((names,) if isinstance(names, str) else names))


def _without_other_classifier(state: dict[str, Tensor], net: Any) -> dict[str, Tensor]:
    """Drop the weights of a classifier that is not the model's own."""
    own, heads = net.state_dict(), _classifier_prefixes(net)
    return {
        key: value
        for key, value in state.items()
        if not key.startswith(heads) or (key in own and own[key].shape == value.shape)
    }


def _difference(state: dict[str, Tensor], net: Any) -> str:
    """What keeps a state dict from being the model's, in words; empty where nothing does."""
    own, heads = net.state_dict(), _classifier_prefixes(net)
    optional = ("num_batches_tracked",)  # absent from old files, and of no effect
    found = {
        "missing": [k for k in own if not (k in state or k.startswith(heads) or k.endswith(optional))],
        "unknown": [k for k in state if k not in own],
        "of another shape": [k for k in state if k in own and state[k].shape != own[k].shape],
    }
    return ", ".join(f"{len(keys)} {what} (such as {keys[0]})" for what, keys in found.items() if keys)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
