"""`python -m data_prep.parts.tiny_llm`: a 4-layer Llama from scratch, for tests and quick sweeps.

Grouped-query attention, 192 wide, a byte-level tokenizer that knows the words of the training texts of one data set
(`--data`) and spells any other in bytes, pretrained on those texts without any image for about twenty core-seconds: it
then knows the language and the blind answers, like any LLM, and has never seen a picture. Deterministic: the same seed
makes the same weights.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.arguments import Parser, whole
from data_prep.parts.builtin import cache_dir
from data_prep.store.errors import DataError
from data_prep.store.split import Split
from data_prep.text.encoder import Encoded, TextEncoder
from model.batch import IGNORE

NAME, DATA = "tiny-llama", "easy_vqa"
_SPECIAL = ("<pad>", "<s>", "</s>")
_SPLITS = ("train", "caption_train")


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of `texts`, with the space before it, is one token; others are spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2**16,  # more than there are: merges end where words do
        min_frequency=1,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


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
        folder: Where it goes; left alone when it is there, but for one with the word-level tokenizer of old.
        data: Prepared data set, `<root>/easy_vqa`, with splits `train` and `caption_train`.
        steps: Training steps.

    Raises:
        DataError: the data are not prepared.
    """
    if (folder / "config.json").is_file() and '"type":"BPE"' in _compact(folder / "tokenizer.json"):
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
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder


def _compact(file: Path) -> str:
    return "".join(file.read_text(encoding="utf-8").split())


def main() -> int:
    """Make the model in the cache."""
    parser = Parser(prog="python -m data_prep.parts.tiny_llm", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=None, help="default: $VLORA_CACHE or .cache")
    parser.add_argument("--steps", type=whole(1, 10**6), default=150)
    parser.add_argument("--data", default=DATA, help=f"name of the data set whose words it knows; default {DATA}")
    arguments = parser.parse_args()
    cache = arguments.cache or cache_dir()
    data = cache / "data" / arguments.data
    if missing := [name for name in _SPLITS if not (data / name).is_dir()]:
        raise DataError(
            f"{data / missing[0]} is missing; prepare it: python -m data_prep source=... name={arguments.data}"
        )
    name = NAME if arguments.data == DATA else f"{NAME}-{arguments.data}"
    print(make(cache / "llm" / name, data, arguments.steps))
    return 0


if __name__ == "__main__":
    from common.errors import run_cli

    run_cli(main)
