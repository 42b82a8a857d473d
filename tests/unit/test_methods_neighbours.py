"""Which patches are around a patch, by hand, and which of them look most like it."""

import pytest
import torch

from pipeline.methods.neighbours import most_similar, window


def around(side, edge, patch):
    numbers, exists = window(side, edge)
    assert numbers.shape == exists.shape == (side * side, 8)
    return numbers[patch][exists[patch]].tolist()


# 3 x 3:  0 1 2      4 x 4:   0  1  2  3
#         3 4 5               4  5  6  7
#         6 7 8               8  9 10 11
#                            12 13 14 15
@pytest.mark.parametrize(
    ("side", "edge", "patch", "expected"),
    [
        (3, "clip", 4, [0, 1, 2, 3, 5, 6, 7, 8]),
        (3, "clip", 0, [1, 3, 4]),
        (3, "clip", 8, [4, 5, 7]),
        (3, "clip", 5, [1, 2, 4, 7, 8]),
        (3, "wrap", 4, [0, 1, 2, 3, 5, 6, 7, 8]),
        (3, "wrap", 0, [8, 6, 7, 2, 1, 5, 3, 4]),
        (4, "clip", 6, [1, 2, 3, 5, 7, 9, 10, 11]),
        (4, "clip", 3, [2, 6, 7]),
        (4, "clip", 13, [8, 9, 10, 12, 14]),
        (4, "wrap", 3, [14, 15, 12, 2, 0, 6, 7, 4]),
        (4, "wrap", 4, [3, 0, 1, 7, 5, 11, 8, 9]),
        (2, "clip", 1, [0, 2, 3]),
        (1, "clip", 0, []),
    ],
)
def test_the_window_without_its_centre(side, edge, patch, expected):
    assert around(side, edge, patch) == expected


def tokens_at(*angles):
    """Unit vectors of a plane, with lengths that must not matter: (1, N, 2)."""
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float32))
    lengths = torch.arange(1, len(angles) + 1)
    return (torch.stack([radians.cos(), radians.sin()], dim=1) * lengths[:, None])[None]


def chosen(tokens, side, edge, patch, count):
    numbers, exists = most_similar(tokens, *window(side, edge), count=count)
    assert numbers.shape == exists.shape == (len(tokens), side * side, count)
    return numbers[0, patch][exists[0, patch]].tolist()


def test_the_four_neighbours_of_the_largest_cosine_the_most_similar_first():
    tokens = tokens_at(80, 10, 50, -20, 0, 170, 30, 60, -5)
    assert chosen(tokens, 3, "clip", 4, 4) == [8, 1, 3, 6]  # 5, 10, 20 and 30 degrees away
    assert chosen(tokens, 3, "clip", 0, 4) == [1, 4, 3]  # a corner has three: 70, 80, 100 degrees
    assert chosen(tokens, 3, "wrap", 0, 4) == [7, 2, 6, 1]  # 20, 30, 50, 70 degrees
    assert chosen(tokens, 3, "clip", 5, 2) == [7, 2]  # not 4, whose cosine is -1


def test_images_are_looked_at_one_by_one_and_ties_go_to_the_first():
    one, other = tokens_at(80, 10, 50, -20, 0, 170, 30, 60, -5), torch.ones(1, 9, 2)
    numbers, _ = most_similar(torch.cat([one, other]), *window(3, "clip"), count=4)
    assert numbers[0, 4].tolist() == [8, 1, 3, 6] and numbers[1, 4].tolist() == [0, 1, 2, 3]
