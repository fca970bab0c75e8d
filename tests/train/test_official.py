"""Released checkpoints: what we import computes what the authors' formulas say, and goes back bit for bit."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from data_prep.text.encoder import TextEncoder
from data_prep.text.templates import VICUNA_SYSTEM
from model import official
from model.batch import IGNORE, Batch
from model.config import ConnectorConfig, GeneratorConfig, ModelConfig
from model.connectors import VLoRAConnector
from model.loading import load_tokenizer
from model.pretrained import ModelError
from model.vlm import VisionLanguageModel
from tests.model import hub, released
from tests.train.world import dialogue
from train import config as configuration
from train.evaluate import load_model
from train.official import Options, export_run, import_checkpoint

IDS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(1))
FEATURES = torch.randn(4, 4, 24, generator=torch.Generator().manual_seed(2))
SEEN = torch.tensor([1.0, 1.0, 0.0, 1.0])


def llama():
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **sizes)).eval()


def model_of(config, tensors):
    ours = ModelConfig(generator=official.generator_config(config), connector=ConnectorConfig(name="vlora"))
    llm = llama()
    connector = VLoRAConnector.build(ours, llm, 4, 24)
    connector.load_state_dict(official.import_connector(tensors, config))
    return VisionLanguageModel(None, connector, llm).eval()


def batch(features=FEATURES, seen=SEEN):
    rows = torch.arange(4)
    return Batch(IDS, torch.ones_like(IDS), IDS, rows, features[seen > 0], rows[seen > 0], torch.ones(3), 4)


CASES = [
    released.config(types, separate, every, alpha)
    for types, separate, every, alpha in [
        ("qkvom", True, 1, None), ("qkvom", False, 1, 8.0), ("qkvom", True, 2, 2.0), ("qkvom", False, 4, None),
        ("qkvom", True, 8, None), ("qkvm", False, 2, None), ("qkv", True, 4, 16.0), ("qko", False, 8, None),
        ("qkvo", True, 3, None), ("qkvom", False, 5, 4.0), ("kvm", True, 6, None), ("qom", False, 7, None),
        ("qk", True, 2, None), ("movkq", True, 2, None), ("movkq", False, 2, 8.0), ("m", True, 1, None),
    ]
]  # fmt: skip


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c['vlora_type']}-{c['weights_sep']}-{c['skip_layers']}")
@torch.no_grad()
def test_import_computes_what_the_release_does_and_exports_it_back(config):
    tensors = released.checkpoint(config)
    model = model_of(config, tensors)
    weights = model.condition(batch()).weights
    for (layer, kind), (a, b) in released.weights(tensors, config, FEATURES, SEEN).items():
        (site,) = (s for s in model.placement.sites if (s.layer, s.type) == (layer, kind))
        torch.testing.assert_close(weights.a[site], a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights.scale * weights.b[site], b.T, rtol=0, atol=1e-6)
    expected = released.logits(llama(), released.weights(tensors, config, FEATURES, SEEN), input_ids=IDS)
    inputs = {"input_ids": IDS, "perceptual_weights": weights.for_rows(batch().rows)}
    found = model.llm.get_decoder()(**inputs, use_cache=False).last_hidden_state @ model.llm.lm_head.weight.T
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    back = official.export_connector(model.connector.state_dict(), config)
    assert list(back) == list(tensors) or back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_the_paper_s_generator_has_209_tensors_at_two_blocks_and_its_published_size():
    config = released.config(vlora_depth=2)
    assert len(released.checkpoint(config)) == 209 == len(list(official._names(config)))
    fields = official.official_config(GeneratorConfig(init="paper", alpha=64), 32, 4096, 576, 1024)
    assert fields == {
        "vlora_dim": 512, "vlora_depth": 8, "vlora_visual_dim": 1024, "vlora_pos_num": 576, "vlora_llm_dim": 4096,
        "vlora_llm_depth": 32, "vlora_rank": 64, "vlora_alpha": 64, "vlora_type": "qkvom", "weights_sep": True,
        "skip_layers": 4,
    }  # fmt: skip
    assert official.generator_config(fields) == GeneratorConfig(init="paper", alpha=64)
    with pytest.raises(ModelError, match=r"cannot hold this generator: generator\.init is not paper.*types q,gate"):
        official.official_config(GeneratorConfig(types="q,gate", image_norm=True), 32, 4096, 576, 1024)


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused():
    config = released.config()
    tensors = released.checkpoint(config)
    with pytest.raises(ModelError, match=r"lacks model\.mm_projector\.gen\.queries"):
        official.import_connector(tensors, config | {"weights_sep": False})
    with pytest.raises(ModelError, match=r"holds model\.mm_projector\.gen\.0\.decoders\.1"):
        official.import_connector(tensors, config | {"vlora_depth": 1})
    with pytest.raises(ModelError, match=r"Bs has shape \(1, 20, 128\), config\.json means \(1, 20, 256\)"):
        official.import_connector(tensors, config | {"vlora_rank": 8})


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    home = tmp_path_factory.mktemp("parts")
    tower, llm = hub.clip(home / "clip"), hub.vicuna(home / "vicuna", layers=8)
    from train.fetch import fetch

    fetch("vision", str(home / "clip"), home / "cache")
    fetch("llm", str(home / "vicuna"), home / "cache")
    return home, tower, llm


def write(folder, config, tensors, home):
    folder.mkdir()
    torch.save(tensors, folder / ("mm_projector.bin" if len(tensors) == 209 else "pytorch_model.bin"))
    base = json.loads((home / "vicuna/config.json").read_text()) | {"model_type": "llava_vlora"}
    base |= {"mm_vision_tower": f"{home}/clip", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(base | config | {"architectures": ["LlavaVLoRALlamaForCausalLM"]}))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((home / "vicuna" / name).read_bytes())


def test_folders_become_runs_and_come_back_bit_for_bit(parts, tmp_path):
    """`mm_projector.bin` beside a base model, and a whole checkpoint with its language model and vision tower."""
    home, tower, llm = parts
    config = released.config()
    projector = released.checkpoint(config)
    whole = dict(projector) | {name: t.half() for name, t in llm.state_dict().items()}
    whole |= {official.TOWER + n: t for n, t in tower.state_dict().items() if n.startswith("vision_model.")}
    whole |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(8)}
    for name, tensors in (("projector", projector), ("whole", whole)):
        write(tmp_path / name, config, tensors, home)
        options = Options(
            checkpoint=str(tmp_path / name), out=str(tmp_path / f"{name}-run"), cache_dir=str(home / "cache"),
            llm=None if name == "whole" else str(home / "vicuna"),
        )  # fmt: skip
        run = import_checkpoint(options)
        model = load_model(configuration.load(run / "config.yaml"), run, torch.device("cpu")).float()
        pixels = torch.randn(4, 3, 28, 28)
        with torch.no_grad():
            features = tower.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            deltas = released.weights(projector, config, features, SEEN)
            expected = released.logits(llm.eval(), deltas, input_ids=IDS)
            given = batch(pixels)
            weights = model.condition(given).weights.for_rows(given.rows)
            hidden = model.llm.get_decoder()(input_ids=IDS, perceptual_weights=weights, use_cache=False)
            found = hidden.last_hidden_state @ model.llm.lm_head.weight.T
        # The run computes in bf16 weights, the reference in fp32: the same to their rounding.
        assert (found - expected).norm() <= 2e-2 * expected.norm()
        back = export_run(Options(run=str(run), out=str(tmp_path / f"{name}-back")))
        again = torch.load(back / "mm_projector.bin", weights_only=True)
        assert len(again) == 209 and all(torch.equal(again[k], t) for k, t in projector.items())
        assert official.generator_config(json.loads((back / "config.json").read_text())) == official.generator_config(
            config | {"vlora_alpha": 4}
        )
    _, tensors = official.read_folder(tmp_path / "whole")
    (tmp_path / "whole-back/mm_projector.bin").unlink()
    _, again = official.read_folder(tmp_path / "whole-back")
    kept = {name: t for name, t in tensors.items() if "rotary_emb" not in name}
    assert again.keys() == kept.keys() and all(torch.equal(again[name], t) for name, t in kept.items())
    with pytest.raises(UserError, match="holds no language model; give llm="):
        alone = Options(checkpoint=str(tmp_path / "projector"), out=str(tmp_path / "x"), cache_dir=str(home / "cache"))
        import_checkpoint(alone)


def official_rows(tokenizer, question, answer):
    """The release's ids of one round, by its own rule: pieces around the image, each tokenised with a word mark."""
    whole = f"{VICUNA_SYSTEM} USER: {{}}\n{question} ASSISTANT: {answer}</s>"
    before, after = whole.split("{}")
    tokens = [tokenizer.bos_token_id, *pieces_of(tokenizer, before), 0, *pieces_of(tokenizer, after[: -len("</s>")])]
    return [*tokens, tokenizer.eos_token_id]


def pieces_of(tokenizer, text):
    """SentencePiece's own encoding: with the mark in front, as the legacy tokenizer has it."""
    return tokenizer(text, add_special_tokens=False).input_ids


def test_text_of_the_release(parts):
    home, _, _ = parts
    tokenizer = load_tokenizer(str(home / "vicuna"))
    talk, caption = (TextEncoder(tokenizer, name, official=True) for name in ("vicuna_v1", "plain"))
    row = talk.encode(dialogue("What is it?", "A teal circle."), 1)
    assert row.input_ids == official_rows(tokenizer, "What is it?", "A teal circle.")
    (slot,) = row.slots
    assert row.input_ids[slot] == 0 and row.labels[slot] == IGNORE and row.image_at == (slot + 1,)
    row = caption.encode(dialogue("", "a red shape"), 1)
    assert row.input_ids == [1, 0, *pieces_of(tokenizer, "a red shape\n")] and row.slots == (1,)
    assert row.labels == [IGNORE, IGNORE, *row.input_ids[2:]]
    assert caption.answer_end == (row.input_ids[-1],) and caption.decode(row.input_ids[2:]) == "a red shape"
    # A later round begins with a word mark behind the end token; without an image nothing is put in.
    turns = dialogue("What is it?", "red") + dialogue("is it?", "no")
    later = talk.encode(turns).input_ids
    end = later.index(tokenizer.eos_token_id)
    assert later[end + 1 :] == [*pieces_of(tokenizer, "USER: is it? ASSISTANT: no"), tokenizer.eos_token_id]
    assert talk.encode(turns).slots == ()
    with pytest.raises(ValueError, match="templates plain and vicuna_v1, not chat"):
        TextEncoder(tokenizer, "chat", official=True)


@torch.no_grad()
def test_the_slot_is_dead_but_counted_and_answers_lag_by_one():
    """Prompt and answer against a decoder that is told every position and mask."""
    config = released.config()
    tensors = released.checkpoint(config, seed=5)
    model, given = model_of(config, tensors), batch()
    at = 3
    given.input_ids = IDS.clone()
    given.input_ids[:, at] = 0
    given.attention_mask[:, at] = 0
    given.slots = torch.zeros_like(IDS, dtype=torch.bool)
    given.slots[:, at] = True
    deltas = released.weights(tensors, config, FEATURES, SEEN)
    length = IDS.shape[1]
    expected = released.logits(
        llama(), deltas, input_ids=given.input_ids, attention_mask=given.attention_mask,
        position_ids=torch.arange(length).expand(4, -1),
    )  # fmt: skip
    inputs = model.inputs(given, model.condition(given)).keywords
    found = model.llm.get_decoder()(**inputs, use_cache=False).last_hidden_state @ model.llm.lm_head.weight.T
    keep = [n for n in range(length) if n != at]
    assert (found - expected)[:, keep].norm() <= 1e-5 * expected[:, keep].norm()
    new = model.generate(given, 4, pad_token_id=0, answer_end=[63])
    for step in range(new.shape[1]):
        mask = torch.cat([given.attention_mask, torch.ones(4, step, dtype=torch.int64)], dim=1)
        positions = torch.cat([torch.arange(length), length - 1 + torch.arange(step)]).expand(4, -1)
        ids = torch.cat([given.input_ids, new[:, :step]], dim=1)
        logits = released.logits(llama(), deltas, input_ids=ids, attention_mask=mask, position_ids=positions)
        going_on = (new[:, :step] != 63).all(1)
        assert torch.equal(logits[going_on, -1].argmax(-1), new[going_on, step])
