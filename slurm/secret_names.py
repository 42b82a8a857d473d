"""Which environment variables hold a secret, by their names."""

from __future__ import annotations

import re

# Those that say where a secret lies, or speak of tokenizers, do not.
_SECRET = re.compile(r"(TOKEN(?!IZER)|SECRET|PASSWORD|API_KEY)(?!.*_(FILE|PATH|DIR)$)", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name is taken to hold a secret, such as HF_TOKEN."""
    return _SECRET.search(name) is not None
