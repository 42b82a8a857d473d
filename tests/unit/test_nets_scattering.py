"""The scattering transform: kymatio's coefficients, at any size, whatever the caller's precision."""

import copy

import pytest
import torch

from pipeline.errors import UserError
from pipeline.nets import scattering
from pipeline.nets.scattering import Scattering

torch.set_num_threads(1)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "J", "L"),
    [
        ((32, 32), 1, 16),
        ((32, 32), 2, 8),
        ((48, 48), 3, 16),
        ((96, 96), 2, 4),
        ((96, 96), 2, 16),
        ((96, 64), 3, 4),
        ((48, 32), 2, 5),
        ((33, 33), 2, 8),  # kymatio pads up to a multiple, and so do we
        ((31, 46), 3, 4),
        ((8, 8), 3, 8),  # the padding is as large as the image
    ],
)
def test_coefficients_are_kymatios(size, J, L):
    frontend = pytest.importorskip("kymatio.scattering2d.frontend.torch_frontend")
    x = images(2, 3, *size)
    expected = frontend.ScatteringTorch2D(J=J, shape=size, L=L)(x).flatten(1, 2)
    found = Scattering(J, L)(x)
    assert found.shape == expected.shape == (2, 3 * Scattering(J, L).channels, size[0] >> J, size[1] >> J)
    for order in (slice(0, 1), slice(1, 1 + J * L), slice(1 + J * L, None)):  # the largest hides no order
        ours, theirs = (t.unflatten(1, (3, -1))[:, :, order] for t in (found, expected))
        assert not ours.numel() or (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_channels_are_those_of_the_papers():
    assert [3 * Scattering(2, L).channels for L in (8, 16)] == [243, 867]


def test_a_wave_answers_in_the_channel_of_its_scale_and_orientation():
    """Columns of light and dark: the first-order maximum is where the wave vector lies along x."""
    x = torch.cos(3 * torch.pi / 4 * torch.arange(64.0)).expand(1, 1, 64, 64)
    across, along = (Scattering(2, 8)(wave)[0, 1:9].mean((1, 2)) for wave in (x, x.mT))
    assert across.argmax() != along.argmax()
    assert (across.argmax() - along.argmax()).abs() == 4  # a quarter turn apart
    coarse = Scattering(2, 8)(x)[0, 9:17].mean((1, 2))
    assert coarse.max() < 0.3 * across.max()


def test_a_constant_image_has_nothing_but_its_mean():
    out = Scattering(3, 4)(torch.full((1, 1, 20, 24), 0.7))
    assert out[:, 0].sub(0.7).abs().max() < 1e-4
    assert out[:, 1:].abs().max() < 1e-6


def test_each_image_and_colour_is_transformed_alone_in_chunks_of_any_size(monkeypatch):
    x = images(5, 3, 32, 32)
    whole = Scattering(2, 4)(x)
    alone = torch.cat([Scattering(2, 4)(x[:, c : c + 1]) for c in range(3)], dim=1)
    assert torch.allclose(whole, alone, atol=1e-6)
    monkeypatch.setitem(scattering._CHUNK, "cpu", 1)
    assert torch.allclose(Scattering(2, 4)(x), whole, atol=1e-6)


def test_it_stays_in_float32_under_autocast_and_lower_matmul_precision():
    x, module = images(2, 3, 32, 32), Scattering(2, 4)
    expected = module(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bf16 products, where the CPU has them
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = module(x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert module(x.to(torch.bfloat16)).dtype == torch.float32


def test_nothing_of_it_is_saved_or_trained_and_any_size_may_follow_another():
    module = Scattering(2, 4)
    with torch.inference_mode():
        module(images(1, 3, 40, 40))
    x = images(1, 3, 40, 40).requires_grad_()
    assert not module(x).requires_grad
    assert module(images(1, 1, 24, 32)).shape == (1, 25, 6, 8)
    assert not module.state_dict() and not list(module.buffers()) and not list(module.parameters())
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_the_memory_layout_of_the_images_does_not_matter():
    x = images(2, 3, 32, 32)
    assert torch.equal(Scattering(2, 4)(x.to(memory_format=torch.channels_last)), Scattering(2, 4)(x))


def test_images_below_a_pixel_of_output_are_refused():
    with pytest.raises(UserError, match="J 3 needs images of 8 pixels or more, got 32 x 7"):
        Scattering(3, 4)(images(1, 3, 32, 7))
    with pytest.raises(ValueError, match="at least 1, got J 0 and L 8"):
        Scattering(0, 8)


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_spectra_are_folded_on_a_gpu_as_on_a_cpu(shrink, monkeypatch):
    monkeypatch.setattr(scattering, "_fold_kernel", lambda: scattering._fold_plainly)
    values = torch.randn(2, 1, 16, 24, dtype=torch.complex64)
    filters = torch.randn(3, 16, 24).to(torch.complex64)
    parts = (values * filters).unflatten(3, (shrink, -1)).unflatten(2, (shrink, -1))
    found = scattering._folded_at_once(values, filters, shrink)
    assert found.shape == (2, 3, 16 // shrink, 24 // shrink)
    torch.testing.assert_close(found, parts.sum(dim=(2, 4)))
