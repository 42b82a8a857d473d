"""Whether PyTorch and torchvision, installed apart, fit together: a common first failure, as one line."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from pipeline.errors import UserError, one_line


def check_torch() -> None:
    """Import torch and torchvision, which timm needs.

    Raises:
        UserError: they cannot be imported, mostly since they come from different indexes (CPU and CUDA
            builds, or versions that do not belong together).
    """
    try:
        import torch  # noqa: F401
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise UserError(
            f"torch {_version('torch')} and torchvision {_version('torchvision')} do not fit together"
            f" ({one_line(error)[:150]}); install a pair from one index:"
            " pip install --force-reinstall torch torchvision"
        ) from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
