"""Answers end where training ended them: small models of several chat templates are trained, and asked."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.text.encoder import TextEncoder
from model.batch import IGNORE, Batch
from model.config import ModelConfig
from model.connectors import Connector
from model.generation import answers
from model.vlm import VisionLanguageModel
from tests.data_prep.text.families import FAMILIES

FACTS = {"sky": "blue", "grass": "green", "blood": "red"}


def rows(encoded, pad, left=False):
    """A batch without images."""
    length = max(len(ids) for ids, _ in encoded)
    ids, labels = (torch.full((len(encoded), length), fill) for fill in (pad, IGNORE))
    mask = torch.zeros_like(ids)
    for n, (row, targets) in enumerate(encoded):
        at = slice(length - len(row), length) if left else slice(len(row))
        ids[n, at], labels[n, at], mask[n, at] = torch.tensor(row), torch.tensor(targets), 1
    images = torch.zeros(1, 4, 8)
    return Batch(ids, mask, labels, torch.arange(len(encoded)), images, torch.tensor([0]), torch.zeros(1), len(encoded))


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost such small models more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["gemma", "phi3", "qwen2.5-base", "qwen3", "llama3-base", "mistral", "yi", "glm4"])
def test_a_trained_model_ends_its_answers(name):
    torch.manual_seed(0)
    tokenizer = FAMILIES[name].tokenizer()
    text = TextEncoder(tokenizer, "chat")
    dialogues = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in FACTS.items()]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))
    model = VisionLanguageModel(None, Connector(ModelConfig(), 8), llm)
    encoded = [text.encode(dialogue) for dialogue in dialogues]
    batch = rows([(row.input_ids, row.labels) for row in encoded], text.pad_id)
    optimizer = torch.optim.Adam(llm.parameters(), lr=3e-3)
    loss = torch.tensor(1.0)
    for _ in range(300):
        if loss < 0.05:
            break
        loss = llm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    prompts = [text.encode_prompt(dialogue) for dialogue in dialogues]
    asked = rows([(prompt, [IGNORE] * len(prompt)) for prompt in prompts], text.pad_id, left=True)
    longest = max(len(text.encode(d).input_ids) - len(p) for d, p in zip(dialogues, prompts, strict=True))
    assert answers(model, asked, [text], longest + 10) == list(FACTS.values())
    out = model.generate(asked, longest + 10, text.pad_id, text.answer_end)
    assert out.shape[1] <= longest, "generation ran past the end of the answers"
    # A sampled answer and a format of its own for every row take the same way.
    options = {"do_sample": True, "temperature": 0.01}
    assert answers(model, asked, [text] * len(FACTS), longest, **options) == list(FACTS.values())
