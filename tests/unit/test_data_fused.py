"""Fused augmentation: the views of PyTorch's operations, kernels that compile, and a fallback that says so.

No GPU is needed: Triton's interpreter runs the kernels, and its compiler makes machine code for any GPU.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import fused_cases
import pytest
import torch

from pipeline.data import fused
from pipeline.data.augment import Augment
from pipeline.data.draws import Draws, sample_keys
from pipeline.data.recipes import RECIPES

torch.set_num_threads(1)
CASES = sorted(fused_cases.all_views())
TYPES = {torch.uint8: "*u8", torch.float32: "*fp32", torch.int32: "*i32"}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton", minversion="3.4")
    file = tmp_path_factory.mktemp("fused") / "views.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, fused_cases.__file__, str(file)], env=environment, check=True)
    return torch.load(file)


@pytest.fixture(scope="module")
def expected():
    return fused_cases.all_views()


@pytest.mark.parametrize("case", CASES)
def test_kernels_make_the_views_of_single_operations(case, interpreted, expected):
    views = interpreted[case]
    assert views.shape == expected[case].shape and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1
    assert (views - expected[case]).abs().max() < 5e-6
    assert not torch.equal(views, expected[case]), "the kernels were not used"


def test_a_view_of_the_kernels_does_not_depend_on_the_batch_an_image_is_in(interpreted):
    assert torch.equal(interpreted["together"], interpreted["alone"])


def launches(recipe, source, size, *, count=2):
    augment = Augment(recipe, size)
    images = torch.zeros(count, 3, source, source, dtype=torch.uint8)
    taps = augment._taps(source)
    drawn = augment._draw(Draws(sample_keys(torch.arange(count), seed=0)), source)
    table = augment._fused.table(drawn, taps=taps, pinned=False)
    views = torch.empty(count, 3, size, size)
    return list(augment._fused.launches(images, table, views, taps=taps))


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_view_takes_few_launches_whatever_is_drawn(recipe):
    numbers = {len(launches(recipe, 48, 32, count=count)) for count in (1, 2, 64)}
    assert len(numbers) == 1 and numbers.pop() <= 4


@pytest.mark.parametrize(
    ("recipe", "capability"), [("light", 90), *((fused_cases.EVERYTHING, number) for number in (75, 80, 90))]
)
def test_kernels_compile_for_a_gpu_without_contraction(recipe, capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", minversion="3.4")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("Triton without CUDA")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.data import fused_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled anew
    for launch in launches(recipe, 40, 32):
        kernel = getattr(fused_kernels, launch.kernel)
        types = {name: TYPES[tensor.dtype] for name, tensor in launch.tensors.items()}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        made = triton.compile(
            ASTSource(kernel, signature, constexprs=launch.constants),
            target=GPUTarget("cuda", capability, 32),
            options=fused.OPTIONS,
        )
        assert made.asm["cubin"] and "fma." not in made.asm["ptx"]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A recipe whose kernels, of which ``launch`` takes the place, are asked for on a CPU too."""

    def make(launch):
        monkeypatch.setattr(fused.Fused, "takes", lambda self, images: len(images) > 0)
        monkeypatch.setattr(fused.Fused, "__call__", launch)
        return Augment("cass", 16)

    return make


IMAGES, KEYS = fused_cases.smooth_images(20, 20), sample_keys(torch.arange(20), seed=0)


def test_a_machine_where_kernels_do_not_work_is_told_of_once_and_does_without(on_a_gpu):
    def fail(self, images, drawn, *, taps):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    expected = Augment("cass", 16)(IMAGES, KEYS)
    augment = on_a_gpu(fail)
    with pytest.warns(
        RuntimeWarning, match=r"slower: its kernels do not work here \(Failed to find C compiler\.\)"
    ):
        first = augment(IMAGES, KEYS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = augment(IMAGES, KEYS)
    assert torch.equal(first, expected) and torch.equal(again, expected)


def by_single_operations(plus):
    def launch(self, images, drawn, *, taps):
        return Augment("cass", 16)._in_parts(images, drawn) + plus

    return launch


def test_kernels_that_make_other_views_are_not_used(on_a_gpu):
    expected = Augment("cass", 16)(IMAGES, KEYS)
    augment = on_a_gpu(by_single_operations(0.01))
    with pytest.warns(RuntimeWarning, match=r"do not work here \(they make other views\)"):
        assert torch.equal(augment(IMAGES, KEYS), expected)


def test_an_empty_batch_says_nothing_of_kernels(on_a_gpu):
    augment = on_a_gpu(by_single_operations(0.01))
    assert augment(IMAGES[:0], KEYS[:0]).shape == (0, 3, 16, 16)
    with pytest.warns(RuntimeWarning, match="they make other views"):
        augment(IMAGES, KEYS)


def test_too_little_memory_is_no_fault_of_kernels(on_a_gpu):
    def full(self, images, drawn, *, taps):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        on_a_gpu(full)(IMAGES, KEYS)


def test_what_fails_after_kernels_have_worked_is_an_error(on_a_gpu, monkeypatch):
    expected = Augment("cass", 16)(IMAGES, KEYS)
    augment = on_a_gpu(by_single_operations(1e-6))
    assert torch.equal(augment(IMAGES, KEYS), expected + 1e-6)
    monkeypatch.setattr(fused.Fused, "__call__", lambda *given, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        augment(IMAGES, KEYS)


def test_on_a_cpu_the_kernels_are_not_even_imported():
    program = (
        "import sys, torch\n"
        "from pipeline.data.augment import Augment\n"
        "images, keys = torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.arange(1)\n"
        "Augment('cass', 8)(images, keys)\n"
        "assert 'pipeline.data.fused_kernels' not in sys.modules"
    )
    root = Path(fused.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
