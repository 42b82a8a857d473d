"""Self-supervised pretraining on small image sets, from a folder of images to a table of results."""

__version__ = "0.1.0"
