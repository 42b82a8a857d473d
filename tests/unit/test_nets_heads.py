"""Projectors, and DINO's head."""

import torch
from torch import nn

from pipeline.nets.heads import DinoHead, Prototypes, mlp


def test_mlp_has_the_layers_that_were_asked_for():
    kinds = [type(m) for m in mlp(4, 8, 2, layers=3)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(m) for m in mlp(4, 8, 2, layers=1)] == [nn.Linear]
    head = mlp(4, 8, 2)
    assert head[0].bias is None and head[-1].bias is not None  # batch normalisation has its own
    assert head(torch.rand(3, 4)).shape == (3, 2)


def test_prototypes_score_by_the_cosine_whatever_their_length():
    prototypes = Prototypes(4, 6)
    x = nn.functional.normalize(torch.randn(3, 4), dim=1)
    scores = prototypes(x)
    with torch.no_grad():
        prototypes.weight.mul_(5.0)
    torch.testing.assert_close(prototypes(x), scores)
    assert scores.abs().max() <= 1


def test_learnt_lengths_scale_the_scores():
    prototypes = Prototypes(4, 6, fixed_norm=False)
    x = torch.randn(3, 4)
    scores = prototypes(x)
    with torch.no_grad():
        prototypes.gain.fill_(2.0)
    torch.testing.assert_close(prototypes(x), 2 * scores)


def test_dino_head_has_a_unit_bottleneck():
    head = DinoHead(5, hidden=16, bottleneck=8, out_dim=32)
    x = torch.randn(3, 5)
    torch.testing.assert_close(head.embed(x).norm(dim=1), torch.ones(3))
    assert head(x).shape == (3, 32)
