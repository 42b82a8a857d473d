"""The kernels of :mod:`pipeline.data.fused`. Needs Triton, which comes with PyTorch for CUDA.

A program works on ``BLOCK`` pixels of an image, which has ``TILES`` times as many. What is drawn for an image
is its row of ``table``, float32, in the columns that :class:`pipeline.data.fused.Layout` names.

They are launched without contraction of products and sums: whatever Triton specialises a kernel for, such as
aligned pointers, it computes the same, and an image's result does not depend on its batch.
"""

import triton
import triton.language as tl

from pipeline.data import colour
from pipeline.data.fused import BLURRED, GREY, LEVELS, MAP, SOLARISE, SOLARISED, STARTS

_RED, _GREEN, _BLUE = (tl.constexpr(share) for share in colour.LUMA)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (tl.constexpr(number) for number in range(len(colour.JITTER)))
_GREY, _SOLARISE = tl.constexpr(GREY), tl.constexpr(SOLARISE)
_MAP, _BLURRED, _SOLARISED, _STARTS = (tl.constexpr(column) for column in (MAP, BLURRED, SOLARISED, STARTS))
_LEVELS = tl.constexpr(float(LEVELS))
_TO_WHOLE = tl.constexpr(1.5 * 2**23)  # float32 has no fractions there: adding it rounds, half to even


@triton.jit
def sample(
    images,
    table,
    views,
    sums,
    SOURCE: tl.constexpr,
    SIZE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BEYOND: tl.constexpr,
    PASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERATIONS: tl.constexpr,
    OFFSETS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sample images, (B, 3, SOURCE, SOURCE) uint8, and change their colours up to the first contrast.

    ``SAMPLES`` an output pixel; ``BEYOND``: pixels in which an image fades to black beyond its edge, 1, or 0
    where the edge goes on.
    """
    image = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    row = table + image * WIDTH
    pixels = tile * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < SIZE * SIZE
    side = tl.full((BLOCK,), SIZE, tl.float32)
    centre_x = tl.div_rn((2 * (pixels % SIZE) + 1).to(tl.float32), side) - 1.0
    centre_y = tl.div_rn((2 * (pixels // SIZE) + 1).to(tl.float32), side) - 1.0
    start = images + image.to(tl.int64) * (3 * SOURCE * SOURCE)
    red = tl.zeros((BLOCK,), tl.float32)
    green = tl.zeros((BLOCK,), tl.float32)
    blue = tl.zeros((BLOCK,), tl.float32)
    for number in range(SAMPLES):
        x = centre_x + tl.load(row + OFFSETS + 2 * number)
        y = centre_y + tl.load(row + OFFSETS + 2 * number + 1)
        depth = _plane(row + _MAP + 6, x, y)
        column = _place(tl.div_rn(_plane(row + _MAP, x, y), depth), SOURCE, BEYOND)
        line = _place(tl.div_rn(_plane(row + _MAP + 3, x, y), depth), SOURCE, BEYOND)
        left = tl.floor(column)
        top = tl.floor(line)
        right_share = column - left
        low_share = line - top
        left_share = 1.0 - right_share
        high_share = 1.0 - low_share
        c = left.to(tl.int32)
        r = top.to(tl.int32)
        red_0, green_0, blue_0 = _corner(start, c, r, left_share * high_share, inside, SOURCE)
        red_1, green_1, blue_1 = _corner(start, c + 1, r, right_share * high_share, inside, SOURCE)
        red_2, green_2, blue_2 = _corner(start, c, r + 1, left_share * low_share, inside, SOURCE)
        red_3, green_3, blue_3 = _corner(start, c + 1, r + 1, right_share * low_share, inside, SOURCE)
        red += red_0 + red_1 + red_2 + red_3
        green += green_0 + green_1 + green_2 + green_3
        blue += blue_0 + blue_1 + blue_2 + blue_3
    whole = tl.full((BLOCK,), 255 * SAMPLES, tl.float32)
    red = _clamp(tl.div_rn(red, whole))
    green = _clamp(tl.div_rn(green, whole))
    blue = _clamp(tl.div_rn(blue, whole))
    last = tl.load(row + _STARTS + 1).to(tl.int32)
    red, green, blue = _colours(red, green, blue, row + OPERATIONS, 0, last, 0.0)
    _store(red, green, blue, views + image.to(tl.int64) * (3 * SIZE * SIZE), pixels, inside, SIZE)
    if PASSES > 1:
        _store_sum(red, green, blue, sums + image * TILES + tile, inside)


@triton.jit
def recolour(
    table,
    views,
    sums,
    sums_after,
    PASS: tl.constexpr,
    PASSES: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERATIONS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The ``PASS``-th contrast of an image and its colours up to the next; ``TILES_UP`` is a power of two."""
    image = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    row = table + image * WIDTH
    first = tl.load(row + _STARTS + PASS).to(tl.int32)
    last = tl.load(row + _STARTS + PASS + 1).to(tl.int32)
    if first < last:
        tiles = tl.arange(0, TILES_UP)
        parts = tl.load(sums + image * TILES + tiles, mask=tiles < TILES, other=0)
        whole = tl.sum(parts.to(tl.int64), axis=0)
        mean = (whole.to(tl.float64) / (_LEVELS * SIZE * SIZE)).to(tl.float32)
        pixels = tile * BLOCK + tl.arange(0, BLOCK)
        inside = pixels < SIZE * SIZE
        start = views + image.to(tl.int64) * (3 * SIZE * SIZE)
        red = tl.load(start + pixels, mask=inside, other=0.0)
        green = tl.load(start + SIZE * SIZE + pixels, mask=inside, other=0.0)
        blue = tl.load(start + 2 * SIZE * SIZE + pixels, mask=inside, other=0.0)
        red, green, blue = _colours(red, green, blue, row + OPERATIONS, first, last, mean)
        _store(red, green, blue, start, pixels, inside, SIZE)
        if PASS + 1 < PASSES:
            _store_sum(red, green, blue, sums_after + image * TILES + tile, inside)


@triton.jit
def blur(
    table,
    sharp,
    blurred,
    DOWN: tl.constexpr,
    SIZE: tl.constexpr,
    RADIUS: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blur what is to be blurred along lines or, if ``DOWN``, columns, and then solarise; a channel each."""
    plane = tl.program_id(0) // TILES
    row = table + plane // 3 * WIDTH
    if tl.load(row + _BLURRED) > 0:
        pixels = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
        inside = pixels < SIZE * SIZE
        start = plane.to(tl.int64) * (SIZE * SIZE)
        if DOWN:
            place = pixels // SIZE
            other = sharp + start + pixels % SIZE
        else:
            place = pixels % SIZE
            other = sharp + start + pixels // SIZE * SIZE
        total = tl.zeros((BLOCK,), tl.float32)
        for tap in tl.static_range(0, 2 * RADIUS + 1):
            there = tl.abs(place + (tap - RADIUS))
            there = tl.where(there < SIZE, there, 2 * SIZE - 2 - there)
            if DOWN:
                there = there * SIZE
            total += tl.load(row + WEIGHTS + tap) * tl.load(other + there, mask=inside, other=0.0)
        if DOWN:
            if tl.load(row + _SOLARISED) > 0:
                total = _solarise(total)
            total = _clamp(total)
        tl.store(blurred + start + pixels, total, mask=inside)


@triton.jit
def _plane(three, x, y):
    return tl.load(three) * x + tl.load(three + 1) * y + tl.load(three + 2)


@triton.jit
def _place(share, SOURCE: tl.constexpr, BEYOND: tl.constexpr):
    """From -1 … 1 to pixels, and no farther than where nothing changes any more."""
    place = (share + 1.0) * (SOURCE * 0.5) - 0.5
    return tl.minimum(tl.maximum(place, -1.0 * BEYOND), SOURCE - 1.0 + BEYOND)


@triton.jit
def _corner(start, column, line, weight, inside, SOURCE: tl.constexpr):
    there = inside & (column >= 0) & (column < SOURCE) & (line >= 0) & (line < SOURCE)
    at = start + line * SOURCE + column
    red = tl.load(at, mask=there, other=0).to(tl.float32) * weight
    green = tl.load(at + SOURCE * SOURCE, mask=there, other=0).to(tl.float32) * weight
    blue = tl.load(at + 2 * SOURCE * SOURCE, mask=there, other=0).to(tl.float32) * weight
    return red, green, blue


@triton.jit
def _colours(red, green, blue, operations, first, last, mean):
    """Operations ``first`` to before ``last`` of an image, each a number and a strength; -1 is none."""
    for place in range(first, last):
        operation = tl.load(operations + 2 * place).to(tl.int32)
        strength = tl.load(operations + 2 * place + 1)
        if operation == _BRIGHTNESS:
            red = _clamp(red * strength)
            green = _clamp(green * strength)
            blue = _clamp(blue * strength)
        elif operation == _CONTRAST:
            red = _blend(red, mean, strength)
            green = _blend(green, mean, strength)
            blue = _blend(blue, mean, strength)
        elif operation == _SATURATION:
            grey = _grey(red, green, blue)
            red = _blend(red, grey, strength)
            green = _blend(green, grey, strength)
            blue = _blend(blue, grey, strength)
        elif operation == _HUE:
            red, green, blue = _turn_hue(red, green, blue, strength)
        elif operation == _GREY:
            grey = _grey(red, green, blue)
            red = grey
            green = grey
            blue = grey
        elif operation == _SOLARISE:
            red = _solarise(red)
            green = _solarise(green)
            blue = _solarise(blue)
    return red, green, blue


@triton.jit
def _turn_hue(red, green, blue, shift):
    high = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    safe = tl.where(chroma == 0, 1.0, chroma)
    sixths = tl.where(
        high == red,
        tl.div_rn(green - blue, safe),
        tl.where(high == green, 2.0 + tl.div_rn(blue - red, safe), 4.0 + tl.div_rn(red - green, safe)),
    )
    sixths = _round_the_circle(sixths + 6.0 * shift)
    return (
        _fade(high, chroma, sixths + 5.0),
        _fade(high, chroma, sixths + 3.0),
        _fade(high, chroma, sixths + 1.0),
    )


@triton.jit
def _fade(high, chroma, sixths):
    place = _round_the_circle(sixths)
    return high - chroma * _clamp(tl.minimum(place, 4.0 - place))


@triton.jit
def _round_the_circle(sixths):
    """The remainder by 6 of what lies between -6 and 12."""
    return tl.where(sixths < 0, sixths + 6.0, tl.where(sixths >= 6.0, sixths - 6.0, sixths))


@triton.jit
def _grey(red, green, blue):
    return red * _RED + green * _GREEN + blue * _BLUE


@triton.jit
def _blend(channel, other, share):
    return _clamp(channel * share + other * (1.0 - share))


@triton.jit
def _solarise(channel):
    return tl.where(channel >= 0.5, 1.0 - channel, channel)


@triton.jit
def _clamp(channel):
    return tl.minimum(tl.maximum(channel, 0.0), 1.0)


@triton.jit
def _store(red, green, blue, start, pixels, inside, SIZE: tl.constexpr):
    tl.store(start + pixels, red, mask=inside)
    tl.store(start + SIZE * SIZE + pixels, green, mask=inside)
    tl.store(start + 2 * SIZE * SIZE + pixels, blue, mask=inside)


@triton.jit
def _store_sum(red, green, blue, at, inside):
    """The tile's part of the mean grey: whole numbers, whose sum is the same in any order."""
    levels = _grey(red, green, blue) * _LEVELS + _TO_WHOLE - _TO_WHOLE
    tl.store(at, tl.sum(tl.where(inside, levels, 0.0).to(tl.int32), axis=0))
