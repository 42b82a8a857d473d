"""Pretraining methods, one file each. ``options`` (no torch) lists them; ``base`` is their contract."""
