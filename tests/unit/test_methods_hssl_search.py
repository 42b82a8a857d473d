"""The search: candidates that differ from the base come first, however the images are cut into batches."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import UserError
from pipeline.methods.base import Progress
from pipeline.methods.hssl_search import HsslSearch
from pipeline.methods.load import load_search
from pipeline.methods.registry import resolve_options
from pipeline.methods.similarity import LinearCka
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone

SPECS = {
    "cnn": Backbone(name="resnet10t", args={"channels": [16, 16, 32, 32]}),
    "vit": Backbone(
        name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    ),
}
SMALL = {"out_dim": 16, "hidden": 16, "bottleneck": 8, "head": "search"}
STEP = Progress(step=0, steps=10, epoch=0.0, epochs=2.0)
END = Progress(step=10, steps=10, epoch=100.0, epochs=100.0)
IMAGES = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(arch="vit", **given):
    net = create_backbone(SPECS[arch], 32, seed=0, arch=arch)
    return HsslSearch({arch: net}, resolve_options("hssl", SMALL | given), image_size=32, seed=0).eval()


@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_the_base_learns_from_the_mean_of_the_candidates_losses(arch):
    method = make(arch).train()
    assert method.kinds == ["convnext", "resnet", "swin", "vit", "mixer", "pool"]
    views = [IMAGES[:6], IMAGES[6:]]
    out = method(views, STEP)
    losses = [out[f"loss_{kind}"] for kind in method.kinds]
    assert out["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert len({round(loss.item(), 5) for loss in losses}) == len(losses)
    out["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == ("teacher" not in name), name


def test_each_candidate_has_its_own_projector_teacher_and_centre():
    method = make(candidates=["vit", "pool"])
    method.train()([IMAGES[:6], IMAGES[6:]], STEP)
    method.after_step(STEP)
    assert not torch.equal(*method.centres)
    assert method.towers.heads["vit"].mlp is not method.towers.heads["pool"].mlp
    assert set(method.teacher_towers.auxiliaries) == {"vit", "pool"}


def test_registered_methods_find_it_by_the_option_that_it_decides():
    assert load_search("hssl") is load_search("hssl_ibot") is HsslSearch
    with pytest.raises(UserError, match="dino has no option that a search could decide"):
        load_search("dino")


def fixed(method, outputs, features):
    """Let the teacher's heads and base say these: candidate (or ``base``) → a row an image."""
    towers = method.teacher_towers
    place = {image.sum().item(): row for row, image in enumerate(IMAGES)}

    def rows(images):
        return [place[image.sum().item()] for image in images]

    read = towers.read
    seen = {}
    towers.read = lambda net, images: seen.update(rows=rows(images)) or read(net, images)
    towers.base = lambda last: outputs["base"][seen["rows"]]
    towers.pooled = lambda last: {kind: features[kind][seen["rows"]] for kind in method.kinds}
    towers.project = lambda pooled: {kind: outputs[kind][seen["rows"]] for kind in method.kinds}


def test_a_candidate_that_says_what_the_base_says_comes_last():
    method = make(candidates=["vit", "pool", "mixer"], teacher_temperature=0.1)
    base = 2 * F.one_hot(torch.arange(12), 16).float()
    outputs = {"base": base, "vit": base, "pool": base.roll(1, dims=1), "mixer": base + base.roll(1, dims=1)}
    features = {kind: torch.randn(12, 64) for kind in method.kinds}
    fixed(method, outputs, features)
    ranking = method.rank([IMAGES], END)
    assert [row["candidate"] for row in ranking] == ["pool", "mixer", "vit"]
    other = torch.log_softmax(base[0] / 0.1, dim=0)
    assert ranking[0]["discrepancy"] == pytest.approx(-other[1].item(), rel=1e-4)  # all on the wrong one
    assert ranking[1]["discrepancy"] == pytest.approx(-other[:2].mean().item(), rel=1e-4)
    assert ranking[2]["discrepancy"] == pytest.approx(0, abs=1e-6)


def test_the_teacher_is_as_warm_as_it_was_at_the_end_of_the_training():
    def first(progress, **given):
        method = make(candidates=["vit", "pool"], teacher_warmup_epochs=50, **given)
        base = 2 * F.one_hot(torch.arange(12), 16).float()
        outputs = {"base": base, "vit": base / 2, "pool": base.roll(1, dims=1)}
        fixed(method, outputs, {kind: torch.randn(12, 64) for kind in method.kinds})
        return [row["discrepancy"] for row in method.rank([IMAGES], progress)]

    middle = Progress(step=10, steps=10, epoch=25.0, epochs=25.0)
    warming = first(middle, teacher_temperature_start=0.2, teacher_temperature=0.6)
    assert warming == pytest.approx(first(END, teacher_temperature=0.4))
    assert warming != pytest.approx(first(END, teacher_temperature=0.6))


def test_of_equal_discrepancies_the_greater_cka_distance_comes_first():
    method = make(candidates=["vit", "pool"])
    base = F.one_hot(torch.arange(12), 16).float()
    with torch.no_grad():
        same = method.teacher.features(IMAGES)
    fixed(
        method,
        {"base": base, "vit": base, "pool": base},
        {"vit": 3 * same, "pool": torch.randn(12, 64)},
    )
    ranking = method.rank([IMAGES], END)
    assert [row["candidate"] for row in ranking] == ["pool", "vit"]
    assert ranking[0]["discrepancy"] == ranking[1]["discrepancy"]
    assert ranking[1]["cka_distance"] == pytest.approx(0, abs=1e-6) and ranking[0]["cka_distance"] > 0.01


@pytest.mark.parametrize(
    ("arch", "host"), [("cnn", "dino"), ("vit", "ibot"), ("vit", "simclr"), ("cnn", "cass")]
)
def test_ranking_does_not_depend_on_how_the_images_are_cut_into_batches(arch, host):
    method = make(arch, host=host)
    whole = method.rank([IMAGES], END)
    for sizes in ([5, 7], [1] * 12):
        cut = method.rank(iter(IMAGES.split(sizes)), END)
        assert [row["candidate"] for row in cut] == [row["candidate"] for row in whole]
        for one, other in zip(cut, whole):
            for name in ("discrepancy", "cka_distance", "loss"):
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)
    assert method.rank([IMAGES], END) == whole
    assert all(set(row) == {"candidate", "discrepancy", "cka_distance", "loss"} for row in whole)
    assert [row["discrepancy"] for row in whole] == sorted((r["discrepancy"] for r in whole), reverse=True)


def test_loss_is_what_base_and_head_of_the_student_lose_to_the_teachers_head():
    method = make(candidates=["vit", "pool"], host="simclr")
    with torch.no_grad():
        last = method.towers.read(method.backbone, IMAGES)
        base, own = method.towers.base(last), method.towers.auxiliary(last)
        taught = method.teacher_towers.auxiliary(method.towers.read(method.teacher, IMAGES))
    for row in method.rank([IMAGES], END):
        target = taught[row["candidate"]]
        terms = [2 - 2 * F.cosine_similarity(target, x) for x in (base, own[row["candidate"]])]
        assert row["loss"] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
        assert row["discrepancy"] == pytest.approx(terms[0].mean().item(), rel=1e-4)


def test_without_images_there_is_no_ranking():
    with pytest.raises(UserError, match="no images to rank its candidates by"):
        make(candidates=["vit", "pool"]).rank([], END)


def test_cka_is_that_of_the_centred_gram_matrices():
    x, y = torch.randn(20, 5), torch.randn(20, 7)
    y[:, :3] += 2 * x[:, :3] + 5
    centre = torch.eye(20) - 1 / 20
    one, other = (centre @ z @ z.T @ centre for z in (x, y))
    expected = (one * other).sum() / (one.norm() * other.norm())
    cka = LinearCka()
    for rows in (slice(0, 3), slice(3, 20)):
        cka.add(x[rows], y[rows])
    assert cka.value() == pytest.approx(expected.item(), rel=1e-4)


def test_cka_knows_no_rotation_no_scale_and_no_shift():
    x = torch.randn(20, 5)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    cka = LinearCka()
    cka.add(x, 3 * x @ rotation + 2)
    assert cka.value() == pytest.approx(1, abs=1e-5)
    constant = LinearCka()
    constant.add(x, torch.zeros(20, 4))
    assert constant.value() == 0
