import pytest
import torch

from common import settings
from common.errors import ConfigError
from model.batch import IGNORE
from model.connectors import CONNECTORS, FeatureNorm, TokenConnector, connector_class
from tests.model import parts
from train.measure.flops import FlopCounter
from train.measure.summary import describe


def loss(model, batch):
    out = model(batch)
    return (out.loss_sum / out.n_targets).item()


@pytest.mark.parametrize("connector", CONNECTORS)
def test_padding_and_company_do_not_change_a_row(connector):
    """A row alone = the same row padded in a batch with others."""
    model = parts.build(parts.config(connector)).eval()
    both = parts.batch(rows=[0, 1], images=[0, 1], length=6)
    both.labels[:, :2] = IGNORE
    wide = parts.batch(rows=[0, 1], images=[0, 1], length=9)
    wide.input_ids[:, :6], wide.input_ids[:, 6:] = both.input_ids, 0
    wide.labels[:, :6], wide.labels[:, 6:] = both.labels, IGNORE
    wide.attention_mask[:, 6:] = 0
    wide.images = both.images
    assert loss(model, both) == pytest.approx(loss(model, wide), rel=1e-5)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_the_image_matters(connector):
    model = parts.build(parts.config(connector)).eval()
    batch = parts.batch(rows=[0], images=[0])
    other = parts.batch(rows=[0], images=[0])
    other.images = other.images + 1
    assert abs(loss(model, batch) - loss(model, other)) > 1e-5


@pytest.mark.parametrize("connector", CONNECTORS)
def test_text_only_rows_are_the_plain_llm(connector):
    """In a mixed batch, and in one with a dummy image only; every connector parameter still gets a gradient."""
    model = parts.build(parts.config(connector)).eval()
    mixed = parts.batch(rows=[0, 1], images=[0])
    inputs = model.inputs(mixed, model.condition(mixed))
    ours = model.llm.get_decoder()(**inputs.keywords).last_hidden_state.flatten(0, 1)[inputs.text[1]]
    plain = model.llm.get_decoder()(input_ids=mixed.input_ids[1:]).last_hidden_state[0]
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)

    dummy = parts.batch(rows=[0, 1], images=[0], image_weight=[0.0])
    dummy.images = torch.zeros_like(dummy.images)
    model(dummy).loss_sum.backward()
    for name, parameter in model.connector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("connector", CONNECTORS)
def test_batched_generation_equals_one_at_a_time(connector):
    model = parts.build(parts.config(connector)).eval()
    batch = parts.batch(rows=[0, 0, 1, 2], images=[0, 1], length=8)
    lengths = [8, 5, 3, 6]
    for row, n in enumerate(lengths):  # left padding
        batch.input_ids[row, : 8 - n] = 0
        batch.attention_mask[row, : 8 - n] = 0
    together = model.generate(batch, 6, pad_token_id=0, answer_end=[1])
    for row, (n, sample) in enumerate(zip(lengths, [0, 0, 1, 2], strict=True)):
        one = parts.batch(rows=[0], images=[0], length=n)
        one.input_ids = batch.input_ids[row : row + 1, 8 - n :]
        if sample < 2:
            one.images = batch.images[sample : sample + 1]
        else:
            one.image_weight = torch.zeros(1)
        alone = model.generate(one, 6, pad_token_id=0, answer_end=[1])[0]
        assert torch.equal(together[row, : len(alone)], alone)


@pytest.mark.parametrize("connector", ("mlp", "qformer"))
def test_visual_tokens_stand_in_order_in_front_of_the_text(connector):
    model = parts.build(parts.config(connector)).eval()
    batch = parts.batch(rows=[0, 1, 2], images=[0, 0, 2])
    inputs = model.inputs(batch, model.condition(batch))
    per_image = model.connector.visual_tokens
    assert per_image == {"mlp": 4, "qformer": 3}[connector]
    tokens = model.connector.projector(model.connector.normalized(model.encode(batch.images)))
    embeds = inputs.keywords["inputs_embeds"]
    assert embeds.shape == (3, 2 * per_image + 7, 32)
    assert torch.equal(embeds[0, : 2 * per_image], tokens[:2].flatten(0, 1))
    # Tokens that a row lacks stand in front, masked, so that the others follow each other.
    assert torch.equal(embeds[2, per_image : 2 * per_image], tokens[2]) and not embeds[1, : 2 * per_image].any()
    assert inputs.keywords["attention_mask"][:, : 2 * per_image].tolist() == [
        [1] * 2 * per_image,
        [0] * 2 * per_image,
        [0] * per_image + [1] * per_image,
    ]
    assert inputs.text[:, 0].tolist() == [row * embeds.shape[1] + 2 * per_image for row in range(3)]


def test_feature_norm_uses_the_given_statistics():
    norm = FeatureNorm(3)
    x = torch.randn(5, 4, 3) * torch.tensor([1.0, 5, 0.1]) + 2
    norm.set(x.mean((0, 1)), x.std((0, 1)))
    out = norm(x)
    torch.testing.assert_close(out.mean((0, 1)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 1)), torch.ones(3))
    assert norm.measured


def test_rows_without_targets_give_a_zero_loss_with_a_graph():
    """A rank whose dialogues were all dropped must still run the same modules as the others."""
    model = parts.build(parts.config())
    batch = parts.batch(rows=[0], images=[0])
    batch.labels[:] = IGNORE
    out = model(batch)
    assert out.loss_sum.item() == 0 and out.n_targets == 0
    out.loss_sum.backward()
    assert not model.connector.generator.stacks[0].queries.grad.any()


def test_unknown_connector():
    config = parts.config()
    config.connector.name = "magic"
    with pytest.raises(ConfigError, match="connector.name=magic: choose one of vlora, mlp, qformer"):
        connector_class(config)


class MeanConnector(TokenConnector):
    """One visual token per image, the mean of its patches: a connector that nothing of ours knows."""

    reads = ()
    visual_tokens = 1

    def __init__(self, config, feature_width, hidden_size):
        super().__init__(config, feature_width)
        self.out = torch.nn.Linear(feature_width, hidden_size)
        self.projector = lambda features: self.out(features.mean(1, keepdim=True))

    @classmethod
    def build(cls, config, llm, num_patches, feature_width):
        return cls(config, feature_width, llm.config.hidden_size)

    @classmethod
    def tokens_per_image(cls, config, num_patches):
        return 1

    def flops(self):
        return 2.0 * self.out.weight.numel()


def test_one_more_connector_is_one_class_and_one_line(monkeypatch):
    """Configuration, model, table, FLOPs and memory plan all take it from the registry."""
    config = parts.config("mean")
    with pytest.raises(ConfigError, match="connector.name=mean: choose one of vlora, mlp, qformer"):
        settings.check(config)
    monkeypatch.setitem(CONNECTORS, "mean", MeanConnector)
    settings.check(config)
    model = parts.build(config)
    batch = parts.batch(rows=[0, 1], images=[0, 0, 1])
    model(batch).loss_sum.backward()
    assert model.connector.out.weight.grad.any()
    assert "1 visual tokens per image" in describe(model)
    step = FlopCounter(model, features_cached=False).step(rows=2, text_tokens=14, targets=12, images=3)
    assert step.connector == 3 * 3 * 2 * 24 * 32
