"""An image is encoded once: sets of weights as values, conversations whose images change, merged weights."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

import vlora
from model.generator.weights import PerceptualWeights
from tests.vlora.conftest import make_folder, square
from vlora import Conversation

RED, BLUE, GREEN = square((220, 20, 20)), square((20, 20, 220)), square((20, 180, 20))
QUESTIONS = ["what color is the shape?", "is there a red shape?", "what color is there?"]


def weights(loaded, *images):
    model, processor = loaded
    return model.perceive(processor.image_processor(list(images))["pixel_values"])


def prompt(loaded, *questions):
    _, processor = loaded
    rows = [processor.text.encode_prompt([{"role": "user", "content": q}]) for q in questions]
    return processor.batch(rows, [[] for _ in rows])


def logits(loaded, question, held, **more):
    with torch.no_grad():
        return loaded[0](**prompt(loaded, question), perceptual_weights=held, **more).logits[0, -1]


def test_weights_are_values(loaded, tmp_path):
    red, blue = weights(loaded, RED), weights(loaded, BLUE)
    both = logits(loaded, QUESTIONS[0], weights(loaded, RED, BLUE))
    torch.testing.assert_close(logits(loaded, QUESTIONS[0], red + blue), both, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(loaded, QUESTIONS[0], red), logits(loaded, QUESTIONS[0], blue), atol=1e-3)
    plain = logits(loaded, QUESTIONS[0], None)
    torch.testing.assert_close(logits(loaded, QUESTIONS[0], 0.0 * red), plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(loaded, QUESTIONS[0], red + -1.0 * red), plain, atol=1e-6, rtol=0)
    red.save(tmp_path / "red.safetensors")
    again = PerceptualWeights.load(tmp_path / "red.safetensors")
    assert logits(loaded, QUESTIONS[0], again).equal(logits(loaded, QUESTIONS[0], red))
    torch.testing.assert_close(logits(loaded, QUESTIONS[0], again + blue), both, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no perceptual weights"):
        PerceptualWeights.load(_other_file(tmp_path))


def _other_file(folder):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_weights_of_another_model_are_refused(loaded, parts, tmp_path):
    other = vlora.load(make_folder(parts, tmp_path / "other", types="qv"))
    with pytest.raises(ValueError, match="different models"):
        weights(loaded, RED) + weights(other, RED)
    with pytest.raises(ValueError, match="one set of weights per row"):
        PerceptualWeights.batch([None, None])


OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_row_has_its_own_weights_or_none(loaded, options):
    """A batch of different images, one without: each row as alone, for every way to decode."""
    model, _ = loaded
    held = [weights(loaded, RED), None, weights(loaded, BLUE, GREEN)]
    together = prompt(loaded, *QUESTIONS)
    out = model.generate(**together, perceptual_weights=PerceptualWeights.batch(held), max_new_tokens=5, **options)
    each = len(out) // len(held)
    for number, (question, one) in enumerate(zip(QUESTIONS, held, strict=True)):
        alone = prompt(loaded, question)
        expected = model.generate(**alone, perceptual_weights=one, max_new_tokens=5, **options)
        start, own = together["input_ids"].shape[1], alone["input_ids"].shape[1]
        for k in range(each):
            new, wanted = out[number * each + k, start:], expected[k, own:]
            size = min(len(new), len(wanted))
            assert new[:size].equal(wanted[:size]) and not new[size:].any() and not wanted[size:].any()


def test_sampling_is_repeatable_and_streaming_says_the_same(loaded):
    with Conversation(*loaded, images=[RED]) as talk:
        options = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 6}
        answers = []
        for seed in (0, 0, 1, 2, 3):
            torch.manual_seed(seed)
            talk.clear()
            answers.append(talk.ask(QUESTIONS[0], **options))
        assert answers[0] == answers[1] and len(set(answers)) > 1
        torch.manual_seed(0)
        talk.clear()
        assert "".join(talk.stream(QUESTIONS[0], **options)) == answers[0]


def fresh(loaded, images, dialogue, question):
    """The answer of a new conversation with the same turns."""
    model, processor = loaded
    turns = [*dialogue, {"role": "user", "content": question}]
    prompt = processor.text.prompt(turns, len(images))
    inputs = processor.batch([prompt.input_ids], [list(images)], [prompt.image_at])
    out = model.generate(**inputs, max_new_tokens=6)
    return processor.answer(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("connector", "merge"), [("vlora", False), ("vlora", True), ("mlp", False), ("qformer", False), ("crossattn", True)]
)
def test_images_may_change_between_turns(parts, tmp_path, connector, merge):
    """Each answer is that of a conversation that begins anew with the images of now."""
    loaded = vlora.load(make_folder(parts, tmp_path / "m", connector))
    before = {k: v.clone() for k, v in loaded[0].model.llm.state_dict().items()}
    changes = [
        lambda t: None,
        lambda t: t.add(BLUE),
        lambda t: None,
        lambda t: t.show([GREEN]),
        lambda t: t.show([]),
        lambda t: t.add(RED),
    ]
    with Conversation(*loaded, images=[RED], merge=merge) as talk:
        for number, change in enumerate(changes):
            change(talk)
            expected = None if talk.report else fresh(loaded, talk.images, talk.dialogue, QUESTIONS[number % 3])
            dialogue, images = list(talk.dialogue), talk.images
            got = talk.ask(QUESTIONS[number % 3], max_new_tokens=6)
            talk_report, held = talk.report, talk.weights
            if expected is None:  # merged before the question: compare outside
                talk.use_branch()
                expected = fresh(loaded, images, dialogue, QUESTIONS[number % 3])
                talk.merge = True
            assert got == expected, number
            assert (talk_report is not None) == (merge and held is not None)
    after = loaded[0].model.llm.state_dict()
    assert all(after[key].equal(value) for key, value in before.items())


def test_a_second_question_computes_only_its_own_tokens(loaded):
    model, _ = loaded
    seen = []
    hook = model.model.llm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    encoded = []
    vision = model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    try:
        with Conversation(*loaded, images=[RED]) as talk:
            talk.ask(QUESTIONS[0], max_new_tokens=3)
            first = list(seen)
            seen.clear()
            talk.ask(QUESTIONS[1], max_new_tokens=3)
            prompt_ids = loaded[1].text.encode_prompt(talk.dialogue[:-1])
    finally:
        hook.remove()
        vision.remove()
    # The first prompt stays in the cache.
    assert seen[0] <= len(prompt_ids) - first[0] and set(seen[1:]) <= {1} and encoded == [1]


def test_merged_decodes_as_the_branch_does_and_refuses_other_images(loaded):
    model, _ = loaded
    red = weights(loaded, RED)
    branch = logits(loaded, QUESTIONS[0], red)
    with model.merged(red) as report:
        torch.testing.assert_close(logits(loaded, QUESTIONS[0], None), branch, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="merged"):
            logits(loaded, QUESTIONS[0], red)
    assert report.branches == ("m",) and "merged into float32" in str(report)
    assert not torch.allclose(logits(loaded, QUESTIONS[0], None), branch, atol=1e-3)


def test_a_stream_that_nobody_reads_stops(loaded):
    with Conversation(*loaded, images=[RED]) as talk:
        talk.ask(QUESTIONS[0], max_new_tokens=2)
        turns = list(talk.dialogue)
        reader = talk.stream(QUESTIONS[1], max_new_tokens=100, eos_token_id=-1)
        next(reader)
        reader.close()
        assert talk.dialogue == turns
        assert talk.ask(QUESTIONS[1], max_new_tokens=3) == fresh_limited(loaded, turns)


def fresh_limited(loaded, dialogue):
    model, processor = loaded
    turns = [*dialogue, {"role": "user", "content": QUESTIONS[1]}]
    inputs = processor.batch([processor.text.encode_prompt(turns)], [[RED]])
    return processor.answer(model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :])


def test_saved_weights_hold_only_tensors(loaded, tmp_path):
    red = weights(loaded, RED)
    red.save(tmp_path / "w.safetensors")
    assert {key.split(".")[0] for key in load_file(tmp_path / "w.safetensors")} == {"a", "b"}


def test_evaluation_may_merge(loaded):
    """Rows of several images, several per image and without any: the answers of the branch."""
    from model.generation import answers
    from tests.model.parts import batch as make_batch
    from train.evaluate import merged_answers

    model, processor = loaded
    batch = make_batch(rows=[0, 0, 1, 2], images=[0, 2, 2], length=6)
    batch.input_ids %= len(processor.tokenizer)
    formats = [processor.text] * 4
    texts, report = merged_answers(model.model, batch, formats, 5)
    assert texts == answers(model.model, batch, formats, 5)
    assert report is not None and report.branches == ("m",)


def test_200_mixed_prompts_get_the_same_text_in_every_mode(loaded):
    """None, one or several images, first and later turns: with the kept cache, alone, in a batch, and merged."""
    model, processor = loaded
    pick = random.Random(0)
    pictures = [square(tuple(pick.randrange(256) for _ in range(3))) for _ in range(6)]
    sets = [[], *([picture] for picture in pictures), pictures[:2], pictures[2:5], pictures[1:]]
    starts = ["what color is the", "is there a", "how many of the"]
    nouns, turns, tokens = ["shape", "red circle", "picture", "large blue square there"], 4, 4
    prompts, kept = [], []
    for number in range(50):
        images = sets[number % len(sets)]
        with Conversation(*loaded, images=images) as talk:
            for _ in range(turns):
                question = f"{pick.choice(starts)} {pick.choice(nouns)}?"
                dialogue = [*talk.dialogue, {"role": "user", "content": question}]
                prompts.append((images, processor.text.encode_prompt(dialogue), talk.weights))
                kept.append(talk.ask(question, max_new_tokens=tokens))
    assert len(prompts) == 200 and len(set(kept)) > 50

    def ask(chosen, held):
        inputs = processor.batch([ids for _, ids, _ in chosen], [[] for _ in chosen])
        budget = tokens + len(processor.text.answer_prefix)
        out = model.generate(**inputs, perceptual_weights=held, max_new_tokens=budget)
        return [processor.answer(row) for row in out[:, inputs["input_ids"].shape[1] :]]

    some = range(3, 200, 5)  # every kind of turn and set
    assert [ask([prompts[number]], prompts[number][2])[0] for number in some] == [kept[number] for number in some]
    mixed = []
    for start in range(0, 200, 25):
        chosen = prompts[start : start + 25]
        mixed += ask(chosen, PerceptualWeights.batch([held for _, _, held in chosen]))
    assert mixed == kept
    for images in sets[1:]:
        numbers = [number for number, prompt in enumerate(prompts) if prompt[0] is images]
        with model.merged(prompts[numbers[0]][2]):
            assert ask([prompts[number] for number in numbers], None) == [kept[number] for number in numbers]
