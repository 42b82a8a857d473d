"""On a GPU: the scattering coefficients of a CPU, where the training has allowed TF32."""

import pytest
import torch

from pipeline.nets.scattering import Scattering

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("J", "L"), [(2, 16), (3, 4)])
def test_coefficients_are_the_cpus_under_tf32_and_autocast(J, L):
    images = torch.rand(4, 3, 96, 96)
    expected = Scattering(J, L)(images)
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = Scattering(J, L)(images.cuda()).cpu()
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
