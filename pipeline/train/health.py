"""Is the representation alive? Numbers about features and loss embeddings, and the verdict ``collapsed``."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def describe(vectors: Tensor) -> dict[str, float]:
    """How far vectors differ between images.

    Args:
        vectors: (N, D), one an image, N ≥ 2.

    Returns:
        - ``std``: mean over dimensions of the standard deviation of the L2-normalised vectors, times √D: 1
          for vectors spread evenly over the sphere, 0 for equal ones (Chen and He 2021, arXiv 2011.10566).
        - ``effective_rank``: exponential of the entropy of the normalised singular values of the centred
          vectors (Roy and Vetterli 2007), 1 to min(N, D).
        - ``cosine``: mean cosine between the vectors of two different images.
        - ``spread``: share of the vectors' energy that differs between images: E‖z − μ‖² / E‖z‖².
    """
    z = vectors.double()
    unit = torch.nn.functional.normalize(z, dim=1)
    n, width = z.shape
    centred = z - z.mean(0)
    values = torch.linalg.svdvals(centred)
    total = values.sum()
    shares = values / total if total > 0 else values
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    energy = z.square().sum(1).mean()
    cosine = (unit.sum(0).square().sum() - n) / (n * (n - 1))
    return {
        "std": float(unit.std(0).mean() * width**0.5),
        "effective_rank": float(entropy.exp()) if total > 0 else 1.0,
        "cosine": float(cosine),
        "spread": float(centred.square().sum(1).mean() / energy) if energy > 0 else 0.0,
    }


COLLAPSED_COSINE = 0.98
COLLAPSED_RANK = 1.5
FEATURES_RANK = 0.4  # of the initial net's
FEATURES_SPREAD = 1e-7  # what is left of it is the rounding of numbers


def is_collapsed(health: dict[str, float]) -> bool:
    """Whether a training has made images alike, to its loss or in the features that are exported.

    To the loss: its embedding has a mean cosine between two different images above 0.98 (all vectors point
    one way), or an effective rank below 1.5 (they lie on one line).

    In the features: their effective rank is below two fifths of what the same net had before its first
    step, or they are constant but for rounding. Their cosine cannot be the measure: an untrained ViT gives
    all images much the same features, and so may a good one (DINO's of digits: 0.9999), in whose features
    a large constant part is left that no loss asks to be removed.

    Measured with small random nets after 6 epochs of digits at 32 px, CNN and ViT: ``cass`` 0.994 and 1.000,
    ``cass_vc`` 0.08 and 0.09. DINO with a short schedule stays at uniform outputs (loss ln K) on the ViT,
    0.9999, and is called collapsed too; its CNN had 0.96. The rank of the features there, to that of the
    initial net: ``cass_vc`` 2.9 and 1.1, DINO 2.8 and 1.2, ``cass`` 1.8 and 0.5.

    Args:
        health: :func:`describe` of the features, and of the embedding, its names prefixed with
            ``embedding_``; ``initial_effective_rank`` of the features before the first step.
    """
    constant = health["embedding_cosine"] > COLLAPSED_COSINE or health["spread"] < FEATURES_SPREAD
    flat = health["effective_rank"] < FEATURES_RANK * health["initial_effective_rank"]
    return constant or flat or health["embedding_effective_rank"] < COLLAPSED_RANK
