import pytest
import torch
from transformers import (
    Aimv2VisionConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    PixtralVisionConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from model.config import VisionConfig
from model.loading import ModelError, fingerprint, pretrained_config
from model.vision import VisionEncoder, build_vision
from tests.model import parts

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
ENCODERS = {
    "clip": (CLIPVisionConfig(**SIZES), 1),
    "siglip": (SiglipVisionConfig(**SIZES), 0),
    "dinov2": (Dinov2Config(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}), 1),
}


@pytest.mark.parametrize("keep_cls", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_width_and_patches_are_read_from_the_encoder(name, keep_cls):
    config, prefix = ENCODERS[name]
    encoder = VisionEncoder(AutoModel.from_config(config).eval(), VisionConfig(layer=-2, keep_cls=keep_cls))
    pixels = torch.randn(2, 3, 32, 32)
    features = encoder(pixels)
    assert features.shape == (2, encoder.num_patches, encoder.feature_width)
    assert encoder.num_patches == 16 + prefix * keep_cls
    expected = encoder.encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(features, expected if keep_cls else expected[:, prefix:])
    assert not features.requires_grad or any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_another_image_size_interpolates_positions(name):
    encoder = VisionEncoder(AutoModel.from_config(ENCODERS[name][0]).eval(), VisionConfig(layer=-1, image_size=48))
    assert encoder(torch.randn(1, 3, 48, 48)).shape == (1, 36, 32)


def test_a_frozen_encoder_stays_in_evaluation_mode_and_builds_no_graph():
    encoder = VisionEncoder(AutoModel.from_config(ENCODERS["clip"][0]), VisionConfig(layer=-1))
    encoder.requires_grad_(False)
    encoder.train()
    assert not encoder.training and not encoder(torch.randn(1, 3, 32, 32)).requires_grad
    encoder.requires_grad_(True)
    encoder.train()
    assert encoder.training and encoder(torch.randn(1, 3, 32, 32)).requires_grad


def test_the_vision_half_of_a_two_tower_checkpoint_is_loaded(tmp_path):
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPModel(CLIPConfig(vision_config=SIZES, text_config=text)).eval()
    clip.save_pretrained(tmp_path)
    encoder = build_vision(VisionConfig(path=str(tmp_path), layer=-2), torch.float32)
    pixels = torch.randn(1, 3, 32, 32)
    expected = clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(encoder.eval()(pixels), expected)


def test_bad_options_and_paths_are_named(tmp_path):
    encoder = AutoModel.from_config(ENCODERS["clip"][0])
    with pytest.raises(ValueError, match=r"vision\.layer=-9"):
        VisionEncoder(encoder, VisionConfig(layer=-9))
    with pytest.raises(ValueError, match=r"vision\.image_size=33 is not a multiple of the patch size 8"):
        VisionEncoder(encoder, VisionConfig(image_size=33))
    with pytest.raises(ModelError, match=r"vision\.path=.*no such folder.*data_prep\.parts"):
        pretrained_config("vision", str(tmp_path / "none"), None)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has hidden_size=32, but vision.architecture expects 64"):
        pretrained_config("vision", str(tmp_path), {"hidden_size": 64})


def test_fingerprint_tells_weights_apart(tmp_path):
    first, second = (AutoModel.from_config(ENCODERS["clip"][0]) for _ in range(2))
    first.save_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    second.save_pretrained(tmp_path / "c")
    prints = [fingerprint(str(tmp_path / n)) for n in "abc"]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("name", parts.ENCODERS)
@pytest.mark.parametrize("size", [28, 42])
def test_the_front_end_sees_the_number_of_tokens(name, size):
    with torch.device("meta"):
        VisionEncoder(AutoModel.from_config(parts.ENCODERS[name]), VisionConfig(layer=-1, image_size=size))


def test_encoders_of_another_kind_are_refused_in_one_line():
    with torch.device("meta"):
        rows = AutoModel.from_config(PixtralVisionConfig(**SIZES))  # all images in one row
        with pytest.raises(
            ModelError, match="pixtral (returns 16 tokens .* 17 were expected; docs/models.md lists|takes no image of)"
        ):
            VisionEncoder(rows, VisionConfig(path="./pixtral", layer=-1))
        fixed = AutoModel.from_config(Aimv2VisionConfig(**SIZES))
        with pytest.raises(ModelError, match=r"aimv2_vision_model takes no image of 64 pixels .*vision.image_size=32"):
            VisionEncoder(fixed, VisionConfig(path="./aimv2", layer=-1, image_size=64))
        naflex = AutoModel.from_config(Siglip2VisionConfig(num_hidden_layers=1))
        with pytest.raises(ModelError, match=r"vision.path=./naflex: .* has no fixed image size"):
            VisionEncoder(naflex, VisionConfig(path="./naflex", layer=-1))


def test_the_pooling_head_of_siglip_is_left_out_and_changes_nothing():
    whole = parts.vision("siglip")
    pixels = torch.randn(2, 3, 28, 28)
    expected = whole(pixel_values=pixels, output_hidden_states=True)
    encoder = VisionEncoder(whole, VisionConfig(layer=-1, final_norm=True))
    assert torch.equal(encoder(pixels), expected.last_hidden_state)
    assert not [name for name, _ in encoder.named_parameters() if "head" in name]
