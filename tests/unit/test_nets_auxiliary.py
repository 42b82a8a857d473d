"""Auxiliary heads: any grid in, its own tokens and their mean out, every parameter in use."""

import pytest
import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import Bottleneck
from timm.models.vision_transformer import Block

from pipeline.nets.auxiliary import KINDS, AuxiliaryHead
from pipeline.nets.mixers import GridMlp, ShiftedWindows, attention_heads, resize

DIM, GRID = 64, (8, 8)


def make(kind, **given):
    torch.manual_seed(0)
    return AuxiliaryHead(kind, DIM, **({"grid": GRID} | given))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("grid", [(8, 8), (3, 3), (1, 1), (7, 14), (9, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_grid_keeps_its_tokens_and_gives_their_mean_and_every_parameter_a_gradient(kind, grid):
    head = make(kind)
    tokens, pooled = head(torch.randn(4, grid[0] * grid[1], DIM), *grid)
    assert tokens.shape == (4, grid[0] * grid[1], DIM) and pooled.shape == (4, DIM)
    torch.testing.assert_close(pooled, tokens.mean(dim=1))
    (pooled * torch.randn(DIM)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_first_shortcut_a_zeroed_block_hands_nothing_on(kind):
    tokens = torch.randn(2, 64, DIM)
    for first_shortcut in (False, True):
        head = make(kind, depth=1, first_shortcut=first_shortcut).eval()
        with torch.no_grad():
            for parameter in head.blocks[0].parameters():
                parameter.zero_()
            handed_on = head.blocks[0](tokens.unflatten(1, GRID)).abs().max() > 0
        assert handed_on == first_shortcut


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_block_lacks_its_shortcuts(kind):
    head = make(kind, depth=2).eval()
    x = torch.rand(2, *GRID, DIM)  # not negative: a ResNet's block ends with a rectifier
    with torch.no_grad():
        for block in head.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        first, second = (block(x) for block in head.blocks)
    assert first.abs().max() == 0 and torch.equal(second, x)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_an_image_depend_on_that_image_alone(kind):
    head = make(kind).eval()
    tokens = torch.randn(3, 35, DIM)
    whole, _ = head(tokens, 5, 7)
    alone, _ = head(tokens[1:2], 5, 7)
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_single_token_are_told_apart(kind):
    """As of a small image's last feature map; PoolFormer's own mixer would say the same of them all."""
    _, pooled = make(kind).eval()(torch.randn(4, 1, DIM), 1, 1)
    assert pooled.std(dim=0).mean() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_mixed_over_the_grid(kind):
    head = make(kind).eval()
    tokens = torch.randn(1, 64, DIM)
    changed = tokens.clone()
    changed[0, 27] = torch.randn(DIM)  # row 3, column 3
    difference = (head(changed, *GRID)[0] - head(tokens, *GRID)[0])[0].abs().amax(dim=1)
    assert (difference > 1e-6).sum() > 8


def test_parameters_are_those_of_timms_blocks():
    norm = 2 * DIM
    assert parameters(make("convnext")) == 3 * parameters(ConvNeXtBlock(DIM, ls_init_value=None)) + norm
    assert parameters(make("vit")) == 3 * parameters(Block(DIM, num_heads=1, qkv_bias=True)) + norm
    assert parameters(make("resnet")) == 3 * parameters(Bottleneck(DIM, DIM // 4)) + norm
    assert parameters(make("vit", depth=5)) - parameters(make("vit", depth=4)) == parameters(
        Block(DIM, num_heads=1, qkv_bias=True)
    )
    mlp = DIM * 4 * DIM * 2 + 5 * DIM
    assert parameters(make("pool")) == 3 * (2 * norm + mlp) + norm
    positions = 64 * DIM // 2 * 2 + DIM // 2 + 64
    assert parameters(make("mixer")) == 3 * (2 * norm + mlp + positions) + norm
    bias_table = 13 * 13
    assert parameters(make("swin")) == parameters(make("vit")) + 3 * bias_table


def test_a_head_of_another_width_begins_with_a_linear_layer():
    head = make("convnext", width=32)
    tokens, pooled = head(torch.randn(2, 64, DIM), *GRID)
    assert tokens.shape == (2, 64, 32) and pooled.shape == (2, 32) and head.out_dim == 32


def test_the_same_random_state_gives_the_same_head():
    for kind in KINDS:
        one, two = make(kind), make(kind)
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def windows(window, shift):
    torch.manual_seed(0)
    return ShiftedWindows(DIM, window=window, shift=shift).eval()


def reached(mixer, grid, place):
    """Which places of a grid change when one does."""
    x = torch.randn(1, *grid, DIM)
    changed = x.clone()
    changed[0, place[0], place[1]] += 1
    with torch.no_grad():
        moved = (mixer(changed) - mixer(x))[0].abs().amax(dim=-1) > 1e-6
    return {tuple(p) for p in moved.nonzero().tolist()}


def block(rows, columns):
    return {(r, c) for r in rows for c in columns}


def test_attention_stays_within_a_window():
    assert reached(windows(4, 0), (8, 8), (1, 6)) == block(range(4), range(4, 8))


def test_shifted_windows_cross_the_borders_but_not_the_edges():
    mixer = windows(4, 2)
    assert reached(mixer, (8, 8), (3, 3)) == block(range(2, 6), range(2, 6))
    assert reached(mixer, (8, 8), (0, 0)) == block(range(2), range(2))  # not round to the other edge
    assert reached(mixer, (8, 8), (7, 3)) == block(range(6, 8), range(2, 6))


def test_nothing_attends_to_padding():
    """A window of 4 on 6 rows: what is in the cut windows is as if they were smaller."""
    assert reached(windows(4, 0), (6, 6), (5, 5)) == block(range(4, 6), range(4, 6))
    mixer = windows(4, 0)
    alone = torch.randn(1, 2, 2, DIM)
    padded = torch.zeros(1, 6, 6, DIM)
    padded[:, 4:, 4:] = alone
    bias = mixer.attention.relative_position_bias_table
    with torch.no_grad():
        bias.zero_()
        torch.testing.assert_close(mixer(padded)[:, 4:, 4:], mixer(alone))
        windowed, whole = mixer(alone), mixer.attention(alone.flatten(1, 2).repeat(1, 4, 1))
    torch.testing.assert_close(windowed.flatten(1, 2), whole[:, :4])  # repeated tokens weigh the same


def test_an_axis_that_one_window_covers_is_not_shifted():
    assert reached(windows(4, 2), (4, 8), (0, 0)) == block(range(4), range(2))


def test_positions_of_another_grid_are_resized_to_the_heads_own_and_back():
    mixer = GridMlp(DIM, grid=(4, 4))
    x = torch.randn(2, 2, 2, DIM)
    up = torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), size=(4, 4), mode="bilinear")
    mixed = mixer(up.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    down = torch.nn.functional.interpolate(mixed, size=(2, 2), mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer(x), down)
    assert resize(x, (2, 2)) is x


def test_attention_heads_divide_the_width():
    assert [attention_heads(dim) for dim in (32, 64, 192, 768, 2048, 100, 200)] == [1, 1, 3, 12, 32, 1, 2]
