"""The block beside torch's own: the same parameters, outputs and gradients."""

import pytest
import torch
from torch import nn

from model.blocks import Block


@pytest.mark.parametrize(("images", "queries", "patches"), [(3, 5, 17), (1, 1, 1), (2, 9, 4)])
def test_it_is_torchs_own_block(images, queries, patches):
    torch.manual_seed(1)
    ours = Block(24, 4, 40)
    after = torch.rand(1)
    torch.manual_seed(1)
    reference = nn.TransformerDecoderLayer(24, 4, 40, 0.0, "gelu", batch_first=True, norm_first=True)
    assert torch.equal(after, torch.rand(1))  # no other random numbers are drawn
    assert all(map(torch.equal, ours.state_dict().values(), reference.state_dict().values()))
    assert list(ours.state_dict()) == list(reference.state_dict())
    inputs = torch.randn(images, queries, 24), torch.randn(images, patches, 24)
    found = []
    for block in (ours.double(), reference.double()):
        leaves = [x.double().requires_grad_() for x in inputs]
        block(*leaves).square().sum().backward()
        found.append([*(leaf.grad for leaf in leaves), *(p.grad for p in block.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
