"""Answers that the tokenizer cannot spell, and tokens without an embedding, are found before training."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_prep.parts.tiny_llm import build_tokenizer
from data_prep.report import to_look_at
from data_prep.store.manifest import read_manifest
from data_prep.store.sample import Sample
from data_prep.store.split import Split
from data_prep.store.writer import write_split
from data_prep.text.encoder import TextEncoder
from model.loading import ModelError, load_tokenizer
from tests.train import world
from train.data.collate import Text
from train.data.unknown import unknown_targets


def word_level(*words):
    vocabulary = {word: n for n, word in enumerate(["<unk>", "</s>", "<s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def split(folder, answers):
    talk = [world.dialogue("which", answer) for answer in answers]
    write_split(folder, [Sample(str(n), [], [turns], "x") for n, turns in enumerate(talk)])
    return Split(folder)


def test_answers_that_cannot_be_spelled_are_named(tmp_path):
    data = split(tmp_path / "digits", ["seven"] * 98 + ["a handwritten eight"] * 2)
    message = unknown_targets(data, Text(TextEncoder(word_level("seven", "a"), "qa")))
    assert "digits: the tokenizer cannot spell 2.0% of the answers' tokens (such as 'handwritten', 'eight')" in message
    assert unknown_targets(data, Text(TextEncoder(word_level("seven", "a", "handwritten", "eight"), "qa"))) is None
    rare = split(tmp_path / "rare", ["seven"] * 199 + ["eight"])
    assert unknown_targets(rare, Text(TextEncoder(word_level("seven"), "qa"))) is None  # 0.25 %


def test_the_tiny_llm_can_spell_anything(tmp_path):
    tokenizer = build_tokenizer(["Question: what is it? Answer: a teal circle"])
    text = TextEncoder(tokenizer, "qa")
    assert text.unknown_id is None
    for answer in ("a handwritten seven", "東京 😀", "a teal circle"):
        row = text.encode(world.dialogue("what is it?", answer))
        assert text.decode([label for label in row.labels if label >= 0]) == answer
    assert len(tokenizer(" a teal circle").input_ids) == 3  # words of its texts are one token each
    assert unknown_targets(split(tmp_path / "set", ["seven"]), Text(text)) is None


def test_a_token_without_an_embedding_is_refused(tmp_path):
    tokenizer = word_level("seven")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == 4
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"1 tokens beyond the model's 4 embeddings, first '\[PAD\]' with id 4"):
        load_tokenizer(str(tmp_path))


def test_data_prep_counts_them(tmp_path):
    from data_prep.prepare import _counter
    from data_prep.verify import Verifier

    word_level("seven", "Question", "Answer", ":").save_pretrained(tmp_path / "tokenizer")
    verifier = Verifier(tokens=_counter(str(tmp_path / "tokenizer"), "qa"))
    for answer in ("seven", "eight"):
        assert verifier.check(Sample(answer, [], [world.dialogue("which", answer)], "x")) is None
    assert verifier.statistics["tokens"] == {"all": 14, "supervised": 4, "unknown": 1}
    manifest = read_manifest(split(tmp_path / "set", ["seven"]).folder)
    manifest.statistics["tokens"] = dict(verifier.statistics["tokens"])
    assert "1 of the tokens to learn (25.00%) cannot be spelled" in " ".join(to_look_at(manifest))
