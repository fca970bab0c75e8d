"""`python -m data_prep.parts.tiny_llm`: a 4-layer Llama from scratch, for tests and quick sweeps.

Grouped-query attention, 192 wide, a word-level tokenizer of the easy-VQA training texts, pretrained on those texts
without any image for about twenty core-seconds: it then knows the language and the blind answers, like any LLM, and has
never seen a picture. Deterministic: the same seed makes the same weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_prep.parts.builtin import cache_dir
from data_prep.store.errors import DataError
from data_prep.store.split import Split
from data_prep.text.encoder import Encoded, TextEncoder
from model.batch import IGNORE

NAME = "tiny-llama"
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_SPLITS = ("train", "caption_train")


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Words and punctuation marks of `texts`, as tokens."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing("$A", None, [])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pretrain(rows: list[Encoded], vocabulary: int, pad: int, steps: int, batch_size: int = 64) -> LlamaForCausalLM:
    """A new model trained on `rows`, all of their tokens, AdamW with a cosine from 2e-3."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=256,
        pad_token_id=pad,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = [rows[i] for i in torch.randint(len(rows), (batch_size,), generator=generator).tolist()]
        length = max(len(row.input_ids) for row in chosen)
        ids = torch.full((batch_size, length), pad)
        labels = torch.full((batch_size, length), IGNORE)
        for i, row in enumerate(chosen):
            ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
            labels[i, : len(row.input_ids)] = ids[i, : len(row.input_ids)]
        # Padding is on the right: a causal model needs no mask for it.
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model.eval()


def make(folder: Path, data: Path, steps: int) -> Path:
    """Write the Hugging Face folder of the model, once.

    Args:
        folder: Where it goes; left alone when it is there.
        data: Prepared easy-VQA, `<root>/easy_vqa`.
        steps: Training steps.

    Raises:
        DataError: the data are not prepared.
    """
    if (folder / "config.json").is_file():
        return folder
    dialogues = [d for name in _SPLITS for sample in Split(data / name) for d in sample.conversations]
    texts = ["Question: Answer:", *{turn["content"] for dialogue in dialogues for turn in dialogue}]
    tokenizer = build_tokenizer(texts)
    encoder = TextEncoder(tokenizer, "qa")
    rows = [encoder.encode(dialogue) for dialogue in dialogues]
    model = pretrain(rows, len(tokenizer), tokenizer.pad_token_id, steps)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, folder)
    return folder


def main() -> int:
    """Make the model in the cache."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.parts.tiny_llm", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=None, help="default: $VLORA_CACHE or .cache")
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    cache = arguments.cache or cache_dir()
    data = cache / "data" / "easy_vqa"
    if not data.is_dir():
        raise DataError(f"{data} is missing; run: python -m data_prep source=easy_vqa")
    print(make(cache / "llm" / NAME, data, arguments.steps))
    return 0


if __name__ == "__main__":
    from common.errors import run_cli

    run_cli(main)
