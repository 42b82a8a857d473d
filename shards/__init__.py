"""Datasets of images as webdataset tars with an index: sources, writer, index, stream, verify."""

from shards.boxes import Boxes
from shards.coco_source import CocoSource
from shards.codec import Decoded
from shards.csv_source import CsvSource
from shards.digit_sources import DigitPagesSource, DigitsSource
from shards.errors import InputError
from shards.index import FORMAT_VERSION, Index
from shards.mask_source import MaskSource
from shards.masks import IGNORE
from shards.options import ShardOptions
from shards.reader import stream
from shards.sources import FolderSource, Source
from shards.verify import verify
from shards.voc_source import VocSource
from shards.writer import write

__all__ = [
    "FORMAT_VERSION",
    "IGNORE",
    "Boxes",
    "CocoSource",
    "CsvSource",
    "Decoded",
    "DigitPagesSource",
    "DigitsSource",
    "FolderSource",
    "Index",
    "InputError",
    "MaskSource",
    "ShardOptions",
    "Source",
    "VocSource",
    "stream",
    "verify",
    "write",
]
