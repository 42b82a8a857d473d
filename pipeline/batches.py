"""How a batch is shared among ranks and accumulations."""

from __future__ import annotations

from pipeline.errors import UserError


def rank_share(batch_size: int, *, world_size: int, accumulate: int) -> int:
    """Images a rank takes in one accumulation.

    Raises:
        UserError: batch_size is no multiple of world_size x accumulate.
    """
    parts = world_size * accumulate
    if batch_size % parts:
        low, high = batch_size // parts * parts, -(-batch_size // parts) * parts
        raise UserError(
            f"batch_size {batch_size} cannot be shared equally: it must be a multiple of {parts}"
            f" (ranks {world_size} x accumulate {accumulate}), such as {f'{low} or ' if low else ''}{high}"
        )
    return batch_size // parts


def check_batch(batch_size: int, *, world_size: int, accumulate: int) -> None:
    """Refuse a batch that cannot be shared, or of which a micro-batch would be one image over all ranks.

    Losses that compare images would be 0 or not a number, and batch normalisation would fail.

    Raises:
        UserError: names the greatest ``accumulate`` that works.
    """
    rank_share(batch_size, world_size=world_size, accumulate=accumulate)
    if batch_size // accumulate < 2:
        most = max(n for n in range(1, batch_size // 2 + 1) if batch_size % n == 0)
        raise UserError(
            f"batch_size {batch_size} with accumulate {accumulate} has one image a micro-batch, and nothing"
            f" to compare it with: accumulate may be at most {most}"
        )
