"""A learnt token that attends to patches: timm's CaiT blocks, on whole images and on a few neighbours."""

from functools import partial

import pytest
import torch
from timm.models.cait import LayerScaleBlockClassAttn

from pipeline.nets.class_attention import ClassAttention, ClassAttentionBlock


def head(**given):
    torch.manual_seed(0)
    made = ClassAttention(8, heads=2, **given)
    for parameter in made.parameters():  # far from the initial weights, where all outputs are alike
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_a_block_is_caits_without_layer_scale():
    torch.manual_seed(0)
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    theirs = LayerScaleBlockClassAttn(8, num_heads=2, qkv_bias=True, init_values=1.0, norm_layer=norm)
    ours = ClassAttentionBlock(8, heads=2)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    names = {"query": "attn.q", "key": "attn.k", "value": "attn.v", "proj": "attn.proj"}
    for name, part in ours.named_children():
        theirs.get_submodule(names.get(name, name)).load_state_dict(part.state_dict())
    token, patches = torch.randn(3, 1, 8), torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(token, patches), theirs(patches, token))


@pytest.mark.parametrize("depth", [1, 3])
def test_a_set_of_patches_becomes_one_vector_whatever_their_order(depth):
    made, patches = head(depth=depth), torch.randn(3, 6, 8)
    assert len(made.blocks) == depth
    vectors = made(patches)
    assert vectors.shape == (3, 8)
    torch.testing.assert_close(made(patches[:, torch.randperm(6)]), vectors)
    torch.testing.assert_close(made(patches[1:2])[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[1])


def test_patches_that_do_not_exist_count_for_nothing():
    made, patches = head(), torch.randn(3, 4, 8)
    exists = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    vectors = made(patches, exists)
    for row, (own, there) in enumerate(zip(patches, exists)):
        torch.testing.assert_close(made(own[None, there])[0], vectors[row])
    assert torch.equal(made(patches.masked_fill(~exists[..., None], 1e3), exists), vectors)


def test_every_parameter_learns():
    made = head()
    made(torch.randn(2, 3, 8)).pow(3).sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
