"""Datasets of images as webdataset tars with an index: sources, writer, index, stream, verify."""

from shards.csv_source import CsvSource
from shards.errors import InputError
from shards.index import FORMAT_VERSION, Index
from shards.options import ShardOptions
from shards.reader import stream
from shards.sources import DigitsSource, FolderSource, Source
from shards.verify import verify
from shards.writer import write

IGNORE = 255  # in a mask: of no class

__all__ = [
    "FORMAT_VERSION",
    "IGNORE",
    "CsvSource",
    "DigitsSource",
    "FolderSource",
    "Index",
    "InputError",
    "ShardOptions",
    "Source",
    "stream",
    "verify",
    "write",
]
