"""Pretraining methods, one file each. ``registry`` (no torch) lists them; ``base`` is their contract."""
