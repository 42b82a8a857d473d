"""Data on its way into the nets: decoding and caching, augmentation, sampling, label fractions."""
