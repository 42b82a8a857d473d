"""Judging a pretrained backbone: fine-tuning, linear probe, nearest neighbours, and their metrics."""
