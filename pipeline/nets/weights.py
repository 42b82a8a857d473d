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
    if "size mismatch" in str(error) or "Missing key" in str(error) or "inconsistent with" in reason:
        return UserError(f"backbone '{name}': its ImageNet weights do not fit args {args}: {reason}")
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


def load_file(net: Any, path: str, *, name: str) -> None:
    """Load a state dict into a timm model; a classifier with other classes is left at its initial weights.

    Position embeddings and patch kernels made for another image size are interpolated by timm's own filter
    for the model's family.

    Args:
        net: the timm model, changed in place.
        path: a ``.safetensors`` or torch file, or a folder that holds ``model.safetensors``.
        name: the backbone's name, for messages.

    Raises:
        UserError: no such file, not readable as weights, or weights of another model.
    """
    state = _read_state(Path(path), name)
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, net)
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"weights '{path}' do not fit backbone '{name}': {_first_line(error)}") from None
    own = net.state_dict()
    heads = _classifier_prefixes(net)
    state = {
        key: value
        for key, value in state.items()
        if not (key.startswith(heads) and (key not in own or own[key].shape != value.shape))
    }
    missing = [
        key
        for key in own
        if not (key in state or key.startswith(heads) or key.endswith("num_batches_tracked"))
    ]
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    if missing or unexpected or wrong:
        raise UserError(
            f"weights '{path}' do not fit backbone '{name}': {_difference(missing, unexpected, wrong)}"
        )
    net.load_state_dict(state, strict=False)


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
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise UserError(f"'{folder}' holds no exported backbone: expected {CONFIG} in it") from None
    except ValueError as error:
        raise UserError(f"'{folder / CONFIG}' is not JSON: {error}") from None
    for key in ("architecture", "pretrained_cfg"):
        if not isinstance(config, dict) or key not in config:
            raise UserError(f"'{folder / CONFIG}' is not an exported backbone's: it has no '{key}'")
    return config


def _read_state(path: Path, name: str) -> dict[str, Tensor]:
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"backbone '{name}': weights '{path}' not found; "
            "expected 'random', 'imagenet', or a file or folder"
        )
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes can fail in any way
        raise UserError(f"weights '{path}' cannot be read as tensors: {_first_line(error)}") from None
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


def _difference(missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    parts = [
        f"{len(keys)} {what} (such as {keys[0]})"
        for what, keys in (("missing", missing), ("unknown", unexpected), ("of another shape", wrong))
        if keys
    ]
    return ", ".join(parts)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
