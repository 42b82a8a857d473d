"""The bundled digits, one by one and on pages with masks."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from shards import DigitPagesSource, ShardOptions, write


def test_page_holds_four_digits_and_a_mask_that_says_whose_ink_each_pixel_is(tmp_path):
    index = write(DigitPagesSource(), tmp_path / "pages", ShardOptions(processes=1))
    digits = load_digits()
    assert index.task == "segmentation" and len(index.samples) == 1797 // 4
    assert index.classes == ["paper", *map(str, range(10))]
    for row in range(0, len(index.samples), 50):
        first = 4 * int(index.samples["path"][row].removeprefix("images/").removesuffix(".png"))
        page, mask = np.asarray(index.decode(row))[..., 0], index.mask(row)
        for place in range(4):
            top, left = 8 * (place // 2), 8 * (place % 2)
            pixels = digits.images[first + place]
            cell = (slice(top, top + 8), slice(left, left + 8))
            np.testing.assert_array_equal(page[cell], np.rint(pixels * 255 / 16))
            np.testing.assert_array_equal(
                mask[cell], np.where(pixels >= 4, digits.target[first + place] + 1, 0)
            )
    present = index.targets(np.arange(len(index.samples)))
    assert present[:, 0].all() and present[:, 1:].sum(axis=1).max() <= 4


def test_pages_are_the_same_bytes_every_time(tmp_path):
    for name in ("one", "two"):
        write(DigitPagesSource(), tmp_path / name, ShardOptions(processes=1))
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
