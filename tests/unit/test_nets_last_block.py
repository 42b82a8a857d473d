"""The last block's tokens beside the pooled vector, and patches masked on the way in."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.nets.backbone import create_backbone
from pipeline.nets.last_block import check_maskable, last_block
from pipeline.specs import Backbone

TINY = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
NETS = {
    "cnn": Backbone(name="test_resnet"),
    "vit": Backbone(name="vit_tiny_patch16_224", args=TINY),
    "mean": Backbone(name="vit_tiny_patch16_224", args=TINY | {"class_token": False, "global_pool": "avg"}),
}


def make(kind):
    return create_backbone(NETS[kind], 32, seed=0).headless().eval()


IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["cnn", "vit", "mean"])
def test_features_are_those_of_the_net(kind):
    net = make(kind)
    with torch.no_grad():
        last = last_block(net, IMAGES)
        assert torch.equal(last.features, net.features(IMAGES))
        assert last.tokens.shape[:2] == (3, last.height * last.width)
        if kind != "cnn":
            assert torch.equal(last.normed, net.feature_map(IMAGES).flatten(2).transpose(1, 2))


def test_tokens_are_raw_and_normed_is_after_the_nets_last_norm():
    net = make("vit")
    with torch.no_grad():
        last = last_block(net, IMAGES, class_token=True)
        torch.testing.assert_close(net.net.norm(last.tokens), last.normed)
        torch.testing.assert_close(net.net.norm(last.class_token), last.features)
    assert (last.tokens - last.normed).abs().max() > 0.1


def test_tokens_stand_row_by_row():
    net = make("vit")
    changed = IMAGES.clone()
    changed[:, :, 8:16, 24:] = 0  # row 1, column 3 of patches of 8 pixels
    with torch.no_grad():
        net.net.blocks = torch.nn.ModuleList([torch.nn.Identity()])
        difference = last_block(net, changed).tokens - last_block(net, IMAGES).tokens
    assert difference.abs().amax(dim=(0, 2)).nonzero().flatten().tolist() == [1 * 4 + 3]


def test_a_masked_patch_is_not_seen_and_the_others_are():
    net = make("vit")
    masks = torch.zeros(3, 16, dtype=torch.bool)
    masks[:, 5] = True
    changed = IMAGES.clone()
    changed[:, :, 8:16, 8:16] = 0
    token = torch.full((64,), 0.5)
    with torch.no_grad():
        seen = [last_block(net, x).features for x in (IMAGES, changed)]
        blind = [last_block(net, x, masks=masks, mask_token=token).features for x in (IMAGES, changed)]
    assert not torch.equal(*seen) and torch.equal(*blind)
    assert not torch.equal(seen[0], blind[0])


def test_a_mask_leaves_position_embeddings_in_their_places():
    """All patches masked: what tells tokens apart is where they are."""
    net = make("vit")
    with torch.no_grad():
        everywhere = torch.ones(3, 16, dtype=torch.bool)
        last = last_block(net, IMAGES, masks=everywhere, mask_token=torch.zeros(64))
    assert torch.equal(last.tokens[0], last.tokens[1])
    assert (last.tokens[0, 0] - last.tokens[0, 1]).abs().max() > 0.01


def test_a_mask_is_gone_with_its_forward_pass():
    net = make("vit")
    with torch.no_grad():
        before = net.features(IMAGES)
        last_block(net, IMAGES, masks=torch.ones(3, 16, dtype=torch.bool), mask_token=torch.zeros(64))
        assert torch.equal(net.features(IMAGES), before)


def test_a_mask_token_learns_only_where_it_stands():
    net = make("vit")
    token = torch.zeros(64, requires_grad=True)
    masks = torch.zeros(3, 16, dtype=torch.bool)
    last_block(net, IMAGES, masks=masks, mask_token=token).features.sum().backward()
    assert token.grad.abs().max() == 0
    masks[1, 3] = True
    last_block(net, IMAGES, masks=masks, mask_token=token).features[1, 0].backward()
    assert token.grad.abs().max() > 0


def test_vits_can_be_masked_and_other_nets_are_refused():
    for kind in ("vit", "mean"):
        check_maskable(make(kind))
    swin = Backbone(name="swin_tiny_patch4_window7_224", args={"embed_dim": 24, "depths": [1, 1, 1, 1]})
    for spec, size in ((NETS["cnn"], 32), (swin, 64)):
        net = create_backbone(spec, size, seed=0).train()
        with pytest.raises(UserError, match=f"'{spec.name}' has no patch embeddings that could be masked"):
            check_maskable(net)
        assert net.training
