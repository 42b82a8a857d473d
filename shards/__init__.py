"""Datasets of images as webdataset tars with an index: sources, writer, index, stream, verify."""

from shards.csv_source import CsvSource
from shards.errors import InputError
from shards.index import FORMAT_VERSION, Index
from shards.sources import DigitsSource, FolderSource, Source
from shards.writer import ShardOptions, write

__all__ = [
    "FORMAT_VERSION",
    "CsvSource",
    "DigitsSource",
    "FolderSource",
    "Index",
    "InputError",
    "ShardOptions",
    "Source",
    "write",
]
