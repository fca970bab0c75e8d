import math

import pytest
import torch

from model.config import GeneratorConfig
from model.generator.generator import PerceptualWeightsGenerator
from model.generator.image_norm import ImageNorm
from model.generator.placement import place
from model.generator.weights import base_norms
from model.vlm import build_model
from tests.model import parts
from train import config as configuration


def generator(llm: str = "llama-gqa", **options) -> PerceptualWeightsGenerator:
    sizes = {"num_blocks": 2, "width": 16, "num_heads": 2, "rank": 4, "every": 2} | options
    config = GeneratorConfig(**sizes)
    torch.manual_seed(0)
    return PerceptualWeightsGenerator(config, place(parts.decoder(llm), config), num_patches=5, feature_width=12)


def run(
    module, images: int, samples: list[int], weight: list[float] | None = None, n: int | None = None, seed: int = 1
):
    features = torch.randn(images, 5, 12, generator=torch.Generator().manual_seed(seed))
    weight = torch.tensor(weight or [1.0] * images)
    return module(features, torch.tensor(samples), weight, n or max(samples) + 1)


@pytest.mark.parametrize("shared", [False, True])
def test_factors_fit_every_projection(shared):
    weights = run(generator(shared=shared, types="q,k,v,o,gate,up,down,m"), 2, [0, 1])
    for site in weights.placement.sites:
        assert weights.a[site].shape == (2, site.d_in, 4)
        assert weights.b[site].shape == (4, site.d_out)
        assert not weights.b[site].any()  # dW = 0 before training


@pytest.mark.parametrize("init", ["paper", "stable"])
def test_a_of_a_sample_is_the_sum_over_its_images(init):
    module = generator(init=init).double()
    features = torch.randn(3, 5, 12, dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    together = module(features, torch.tensor([0, 0, 1]), ones, 2)
    apart = module(features, torch.tensor([0, 1, 2]), ones, 3)
    for site, a in together.a.items():
        torch.testing.assert_close(a[0], apart.a[site][0] + apart.a[site][1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a[1], apart.a[site][2], rtol=1e-12, atol=1e-12)


def test_a_sample_without_images_gets_exactly_zero():
    module = generator()
    with torch.no_grad():
        for head in module.stacks[0].heads.values():
            head.bias.fill_(0.5)
    weights = run(module, 2, [0, 2], n=4)
    dummy = run(module, 1, [0], weight=[0.0], n=2)
    for site, a in weights.a.items():
        assert not a[1].any() and not a[3].any() and a[0].any()
        assert not dummy.a[site].any()


def test_parameter_count_of_the_released_generator():
    """851.9 M for a 7B Llama (paper notes, derived from the released code): the model of `experiment=vlora_7b`."""
    config = configuration.resolve(configuration.compose_overrides(["experiment=vlora_7b"]))
    model = build_model(config.model, torch.bfloat16, meta=True)
    assert model.llm.config.hidden_size == 4096 and len(model.placement.sites) == 5 * 8
    assert sum(p.numel() for p in model.connector.parameters()) == 851_891_712


def test_paper_init_matches_the_released_code():
    module = generator(init="paper", width=64, num_heads=4)
    stack = module.stacks[0]
    assert stack.queries.std().item() == pytest.approx(1, abs=0.15)  # the hook never reaches them
    assert module.keys.pos_embed.std().item() == pytest.approx(1, abs=0.15)
    block = stack.blocks[0]
    for linear in (block.linear1, block.linear2, block.self_attn.out_proj, stack.heads["32"], module.keys.visual_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not linear.bias.any()
    xavier = math.sqrt(2 / (64 + 3 * 64))  # in_proj stays PyTorch's
    assert block.self_attn.in_proj_weight.std().item() == pytest.approx(xavier, rel=0.1)
    assert isinstance(module.keys.norm, torch.nn.Identity)


def test_stable_init_is_image_dependent_from_step_zero_and_paper_init_is_not():
    shares = {}
    for init in ("paper", "stable"):
        module = generator(init=init, width=64, num_heads=4).eval()
        shares[init] = run(module, 16, list(range(16))).image_share().item()
    assert shares["stable"] > 5 * shares["paper"]


def test_image_norm_takes_away_what_all_images_share():
    module = generator(image_norm=True, init="paper", width=64, num_heads=4).train()
    assert run(module, 16, list(range(16))).image_share().item() == pytest.approx(1, abs=0.05)


def test_image_norm_against_batch_norm():
    """Independent reference: torch's BatchNorm1d without affine, in training and in evaluation."""
    torch.manual_seed(0)
    ours, theirs = ImageNorm((6,)), torch.nn.BatchNorm1d(6, eps=1e-4, momentum=None, affine=False)
    x = torch.randn(9, 6) * 3 + 1
    torch.testing.assert_close(ours(x, torch.ones(9)), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    ours.eval()
    torch.testing.assert_close(ours(x, torch.ones(9)), (x - ours.mean) * torch.rsqrt(ours.var + 1e-4))


def test_image_norm_leaves_out_dummies():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 6), torch.tensor([1.0, 1, 0, 1, 1])
    first, second = ImageNorm((6,)), ImageNorm((6,))
    kept = weight > 0
    torch.testing.assert_close(first(x, weight)[kept], second(x[kept], torch.ones(4)), rtol=1e-5, atol=1e-5)
    assert torch.equal(ImageNorm((6,))(x[:1], torch.zeros(1)), x[:1] * torch.rsqrt(torch.tensor(1 + 1e-4)))


def test_norms_and_share_against_the_full_matrices():
    model = parts.build(parts.config(alpha=8.0))
    weights = model.condition(parts.batch(rows=[0, 1, 2], images=[0, 1, 2])).weights
    assert weights.scale == 2.0
    for site, norm in weights.norms().items():
        full = torch.stack([weights.delta(site, sample).norm() for sample in range(3)]).mean()
        torch.testing.assert_close(norm, full, rtol=1e-4, atol=1e-5)
    deltas = torch.stack([torch.cat([weights.delta(s, n).flatten() for s in weights.a]) for n in range(3)])
    torch.testing.assert_close(weights.products(), deltas @ deltas.T, rtol=1e-4, atol=1e-5)
    stacked = torch.cat([a.flatten(1) for a in weights.a.values()], 1).double()
    share = stacked.var(0, correction=0).sum() / stacked.square().mean(0).sum()
    assert weights.image_share().item() == pytest.approx(share.item(), rel=1e-4)
    norms = base_norms(model.llm, weights.placement)
    assert norms[weights.placement.sites[0]] == pytest.approx(
        model.llm.model.layers[1].self_attn.q_proj.weight.norm().item()
    )


def test_width_must_divide_by_heads():
    with pytest.raises(ValueError, match=r"generator\.width=16 is not divisible by generator\.num_heads=3"):
        generator(num_heads=3)
