import pytest

from common.errors import ConfigError
from model.config import GeneratorConfig, parse_types
from model.generator.placement import place, placed_layers
from tests.model.parts import decoder


def test_released_placement_of_a_32_layer_llm():
    assert placed_layers(GeneratorConfig(), 32) == (3, 7, 11, 15, 19, 23, 27, 31)


def test_every_nth_layer_of_a_depth_that_it_does_not_divide():
    assert placed_layers(GeneratorConfig(), 30) == (3, 7, 11, 15, 19, 23, 27)


@pytest.mark.parametrize(
    ("every", "above", "layers"),
    [
        (4, 0.5, (15, 19, 23, 27)),
        (1, 0.9, (27, 28, 29)),
        (15, 0.5, (29,)),
        (4, 0.89, (27,)),  # 26.7 layers: the 27th is above
    ],
)
def test_only_layers_above_a_share_of_the_depth(every, above, layers):
    assert placed_layers(GeneratorConfig(every=every, above=above), 30) == layers


def test_a_share_of_the_depth_that_leaves_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"generator\.above=0\.95: the highest of every 4 layers is 27 of 30"):
        placed_layers(GeneratorConfig(above=0.95), 30)


@pytest.mark.parametrize("every", [None, 0, 31])
def test_no_layer_to_place_is_refused(every):
    with pytest.raises(ValueError, match=r"generator\.every=.*from 1 to 30"):
        placed_layers(GeneratorConfig(every=every), 30)


@pytest.mark.parametrize("layers", [[], [3, 1], [1, 1], [0, 4], [-1]])
def test_explicit_layers_must_be_ascending_and_in_range(layers):
    with pytest.raises(ValueError, match="ascending, distinct indices from 0 to 3"):
        placed_layers(GeneratorConfig(every=None, layers=layers), 4)


def test_layers_stand_in_place_of_every():
    assert placed_layers(GeneratorConfig(every=2, above=0.5, layers=[1]), 4) == (1,)


def test_widths_come_from_the_llm_itself():
    placement = place(decoder("llama-gqa"), GeneratorConfig(types="q,k,v,o,gate,up,down,m", every=4, rank=4))
    widths = {site.type: (site.d_in, site.d_out) for site in placement.sites}
    assert widths == {
        "q": (32, 32),
        "k": (32, 16),
        "v": (32, 16),
        "o": (32, 32),
        "gate": (32, 48),
        "up": (32, 48),
        "down": (48, 32),
        "m": (32, 32),
    }


def test_rank_above_a_projections_width_is_refused():
    with pytest.raises(ValueError, match=r"generator\.rank=17 is above the width of k in layer 1"):
        place(decoder("llama-gqa"), GeneratorConfig(rank=17, every=2))


def test_a_type_the_decoder_lacks_is_refused_with_what_it_has():
    with pytest.raises(ValueError, match=r"PhiForCausalLM has no separate projection for 'gate'.*mlp\.fc1"):
        place(decoder("phi"), GeneratorConfig(types="gate", every=2, rank=4))


@pytest.mark.parametrize("types", ["qkvom", "q,k,v,o,m", ["q", "k", "v", "o", "m"]])
def test_types_may_be_written_three_ways(types):
    assert parse_types(types) == ("q", "k", "v", "o", "m")


@pytest.mark.parametrize("types", ["qx", "qq", "", [], 0, None, {"q": 1}, [["q"]], float("nan")])
def test_bad_types_are_refused(types):
    with pytest.raises(ConfigError, match=r"generator\.types"):
        parse_types(types)
