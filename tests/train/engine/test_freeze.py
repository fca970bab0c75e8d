"""What a stage trains: `stage.train`, `stage.freeze`, `stage.freeze_lower`."""

import pytest
import torch

from common.errors import UserError
from model.generator.placement import decoder_layers
from tests.model import parts
from train.config import StageConfig, TrainedParts
from train.engine.engine import freeze

LLM_TOO = TrainedParts(llm=True)


def trained_layers(model) -> list[bool]:
    return [all(p.requires_grad for p in layer.parameters()) for layer in decoder_layers(model.llm)]


@pytest.mark.parametrize("llm", ["llama-gqa", "gemma2", "phi"])
@pytest.mark.parametrize(
    ("connector", "lowest"),
    [("vlora", 2), ("crossattn", 2), ("mlp", 0), ("qformer", 0)],
)  # visual tokens enter at the bottom
def test_freeze_lower_keeps_just_what_no_image_changes(connector, lowest, llm):
    model = parts.build(parts.config(connector, every=None, layers=[2, 3]), llm)
    freeze(model, StageConfig(name="finetune", train=LLM_TOO, freeze_lower=True))
    assert trained_layers(model) == [number >= lowest for number in range(4)]
    assert not model.llm.get_input_embeddings().weight.requires_grad
    assert all(p.requires_grad for p in model.connector.parameters())

    seen: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for outputs, layer in zip(seen, decoder_layers(model.llm), strict=True):
        layer.register_forward_hook(
            lambda _m, _i, out, to=outputs: to.append(out[0] if isinstance(out, tuple) else out)
        )
    one, other = parts.batch([0], [0]), parts.batch([0], [0])
    other.images.neg_()
    with torch.no_grad():
        model(one), model(other)
    assert [torch.equal(*outputs) for outputs in seen] == [number < lowest for number in range(4)]


def test_freeze_lower_is_for_whatever_layers_have_deltas_and_adds_to_the_patterns():
    model = parts.build(parts.config(every=None, layers=[1, 3]))
    freeze(model, StageConfig(train=LLM_TOO, freeze=["llm.model.layers.3.*"], freeze_lower=True))
    assert trained_layers(model) == [False, True, True, False]
    model = parts.build(parts.config(every=4))
    freeze(model, StageConfig(train=TrainedParts(llm="lora"), freeze_lower=True))
    adapted = {name.split(".")[2] for name, p in model.llm.named_parameters() if p.requires_grad}
    assert adapted == {"3"}


def test_a_pattern_that_names_nothing_is_refused():
    with pytest.raises(UserError, match=r"stage\.freeze: 'llm\.model\.layers\.4\.\*' matches no parameter"):
        freeze(parts.build(parts.config()), StageConfig(train=LLM_TOO, freeze=["llm.model.layers.4.*"]))
