"""Folders laid out exactly as Vicuna-7B-v1.5 and CLIP-ViT-L/14-336 are on the hub, with tiny shapes.

Vicuna: two `pytorch_model-0000x-of-00002.bin` shards with their index, `tokenizer.model` without a `tokenizer.json`.
CLIP: both towers in one `pytorch_model.bin`, image processor settings in the old form (plain numbers).
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import torch
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from data_prep.text.templates import VICUNA_SYSTEM

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEXT = (
    f"{VICUNA_SYSTEM} USER: What is it? ASSISTANT: A teal circle. what color is the shape? is there a red blue green "
    "black shape? yes no"
)
VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def _dump(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content, indent=2))


def sentencepiece_model(vocabulary: int = 320) -> bytes:
    """A real `tokenizer.model`."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 50),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


def vicuna(folder: Path, layers: int = 4, seed: int = 0) -> LlamaForCausalLM:
    """Write the language model's folder; returns the model that is in it."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    for number in range(layers):  # as the checkpoints of 2023 have it
        tensors[f"model.layers.{number}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    weight_map = {name: names[number > len(tensors) // 2] for number, name in enumerate(tensors)}
    for shard in names:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _dump(folder, "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
    token = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    words = {name: {**token, "content": content} for name, content in SPECIAL.items()}
    more = {"clean_up_tokenization_spaces": False, "model_max_length": 4096, "pad_token": None, "padding_side": "right"}
    _dump(folder, "tokenizer_config.json", {**tokenizer, **words, **more, "sp_model_kwargs": {}})
    _dump(folder, "special_tokens_map.json", {**SPECIAL, "pad_token": "<unk>"})
    generation = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0, "temperature": 0.9}
    version = {"top_p": 0.6, "transformers_version": "4.31.0", "_from_model_config": True}
    _dump(folder, "generation_config.json", generation | version)
    config = {
        "_name_or_path": "vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096, "model_type": "llama",
        "num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
        "vocab_size": 320, **sizes,
    }  # fmt: skip
    _dump(folder, "config.json", config)
    return model.half().float()


def clip(folder: Path, seed: int = 1) -> CLIPModel:
    """Write the encoder's folder; returns the model that is in it."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=16)).eval()
    published = dict(model.state_dict())
    published["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(published, folder / "pytorch_model.bin")
    _dump(folder, "config.json", {
        "_commit_hash": None, "architectures": ["CLIPModel"], "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip", "projection_dim": 16, "torch_dtype": "float32", "transformers_version": None,
        "text_config": {"model_type": "clip_text_model", "projection_dim": 16, **text},
        "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **VISION},
    })  # fmt: skip
    _dump(folder, "preprocessor_config.json", {
        "crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 28,
    })  # fmt: skip
    for name, content in (("vocab.json", "{}"), ("merges.txt", "#version: 0.2\n"), ("tokenizer_config.json", "{}")):
        (folder / name).write_text(content)
    return model
