"""The server through OpenAI's own client: answers, streaming, load, isolation, bounds."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

openai = pytest.importorskip("openai", reason="pip install -r requirements-serve.txt")

from tests.serve.conftest import NAME, running, uri, user  # noqa: E402
from tests.vlora.conftest import square  # noqa: E402
from vlora import Conversation  # noqa: E402

RED, BLUE = square((220, 20, 20)), square((20, 20, 220))
QUESTION = "what color is the shape?"


def client(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


def ask(address, *messages, **options):
    options = {"max_tokens": 8, "temperature": 0} | options
    return client(address).chat.completions.create(model=NAME, messages=list(messages), **options)


def alone(loaded, images, question, tokens=8):
    with Conversation(*loaded, images=images) as talk:
        answer = talk.ask(question, max_new_tokens=tokens)
        return answer, talk.last_tokens - len(loaded[1].text.answer_prefix)


@pytest.mark.parametrize("images", [[], [RED], [RED, BLUE]], ids=len)
def test_answers_are_those_of_the_model(served, loaded, images):
    expected, tokens = alone(loaded, images, QUESTION)
    got = ask(served[1], user(QUESTION, *images))
    assert got.choices[0].message.content == expected
    assert got.usage.completion_tokens == tokens and got.usage.total_tokens == got.usage.prompt_tokens + tokens
    assert got.choices[0].finish_reason in ("stop", "length") and got.model == NAME


def test_images_over_several_turns(served, loaded):
    with Conversation(*loaded, images=[RED]) as talk:
        first = talk.ask(QUESTION, max_new_tokens=5)
        talk.add(BLUE)
        second = talk.ask("is there a red shape?", max_new_tokens=5)
    turns = [user(QUESTION, RED), {"role": "assistant", "content": first}, user("is there a red shape?", BLUE)]
    assert ask(served[1], *turns, max_tokens=5).choices[0].message.content == second


def test_streaming_says_the_same(served, loaded):
    expected, tokens = alone(loaded, [RED], QUESTION)
    chunks = list(ask(served[1], user(QUESTION, RED), stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip() == expected
    assert chunks[-1].usage.completion_tokens == tokens and chunks[-2].choices[0].finish_reason


def test_stop_seed_and_length(served, loaded):
    whole, _ = alone(loaded, [RED], QUESTION, 12)
    pairs = [whole[n : n + 2] for n in range(1, len(whole) - 1)]
    stop = next(pair for pair in pairs if pair.isprintable() and "\ufffd" not in pair)
    stopped = ask(served[1], user(QUESTION, RED), max_tokens=12, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.message.content == whole[: whole.index(stop)].strip()
    streamed = ask(served[1], user(QUESTION, RED), max_tokens=12, stop=[stop], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed).strip() == stopped.message.content
    one = ask(served[1], user(QUESTION, RED), max_tokens=1)
    assert one.choices[0].finish_reason == "length" and one.usage.completion_tokens == 1
    said = [
        ask(served[1], user(QUESTION, RED), temperature=2, top_p=0.95, seed=s).choices[0].message.content
        for s in (1, 1, 2, 3, 4)
    ]
    assert said[0] == said[1] and len(set(said)) > 1


def test_64_clients_with_64_images_get_their_own_answers(served, loaded):
    colors = list(itertools.product((10, 90, 170, 250), repeat=3))
    images = [square(color) for color in colors]
    expected = [alone(loaded, [image], QUESTION)[0] for image in images]
    assert len(set(expected)) > 1
    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(ask, served[1], user(QUESTION, image)) for image in images]
        got = [future.result().choices[0].message.content for future in futures]
    assert got == expected


def test_nothing_leaks_between_requests(loaded):
    """A secret planted in one request, decoded in the same batch: the others' answers do not change by a letter."""
    secret = {"role": "system", "content": "blue green black " * 10}
    with running(loaded) as (service, address), ThreadPoolExecutor(16) as pool:
        calm = ask(address, user(QUESTION, RED)).choices[0].message.content
        jobs = []
        for number in range(24):
            messages = [secret, user("what color?", BLUE)] if number % 2 else [user(QUESTION, RED)]
            jobs.append(pool.submit(ask, address, *messages))
        answers = [job.result() for job in jobs]
        assert {a.choices[0].message.content for a in answers[::2]} == {calm}
        assert len({a.usage.prompt_tokens for a in answers[::2]}) == 1
        # Nothing of a request is kept after it but the weights of images.
        wait_until(lambda: service.batcher.active == 0)
        assert service.batcher._kv is None and len(service.cache) == 2


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def endless(loaded):
    """The model never ends an answer by itself: the processor knows no end."""
    model, processor = loaded
    import copy

    other = copy.copy(processor)
    other.text = copy.copy(processor.text)
    other.text.answer_end = (-1,)
    return model, other


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_killed_frees_its_place(loaded, stream, monkeypatch):
    with running(endless(loaded), max_rows=1) as (service, address):
        host, port = address.removeprefix("http://").split(":")
        body = {"model": NAME, "messages": [user(QUESTION, RED)], "stream": stream, "max_tokens": 900}
        monkeypatch.setattr(service.model.config.get_text_config(), "max_position_embeddings", 100000)
        raw = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        connection = socket.create_connection((host, int(port)))
        connection.sendall(head + raw)
        wait_until(lambda: service.batcher.active == 1)
        connection.close()
        before = service.batcher.generated
        wait_until(lambda: service.batcher.active == 0)
        assert service.batcher.generated - before < 890
        assert ask(address, user(QUESTION, RED), max_tokens=3).choices[0].finish_reason == "length"


def test_a_flood_is_turned_away_and_the_server_stays_healthy(loaded):
    with running(endless(loaded), max_rows=2, max_waiting=2) as (_, address):
        codes, answers = [], []
        lock = threading.Lock()

        def one(_):
            try:
                answer = ask(address, user(QUESTION, RED), max_tokens=60)
                with lock:
                    answers.append(answer.choices[0].message.content)
            except openai.RateLimitError as error:
                with lock:
                    codes.append((error.status_code, error.response.headers["retry-after"]))

        with ThreadPoolExecutor(24) as pool:
            list(pool.map(one, range(24)))
        assert codes and set(codes) == {(429, "1")} and answers and len(set(answers)) == 1
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        assert ask(address, user(QUESTION, RED), max_tokens=2).usage.completion_tokens == 2


def test_an_answer_that_takes_too_long_is_given_up(loaded):
    with running(endless(loaded), seconds=0.05) as (service, address):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(address, user(QUESTION, RED), max_tokens=900)
        assert caught.value.status_code == 504
        wait_until(lambda: service.batcher.active == 0)


def changed(**keys):
    return {"model": NAME, "messages": [{"role": "user", "content": QUESTION}]} | keys


def talk(*roles):
    return changed(messages=[{"role": role, "content": "x"} for role in roles])


def said(content):
    return changed(messages=[{"role": "user", "content": content}])


def shown(url):
    return said([{"type": "image_url", "image_url": {"url": url}}])


WRONG = [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b'"x"', 400), (b"\xff\xfe", 400), (b"[" * 100000, 400),
    ({}, 404), (changed(model="gpt-9"), 404), (changed(model=None), 404), (changed(model=["x"]), 404),
    (changed(messages=None), 400), (changed(messages=[]), 400), (changed(messages="hello"), 400),
    (changed(messages=[1]), 400), (changed(messages=[{}]), 400), (talk("robot"), 400),
    (talk("assistant"), 400), (said(None), 400), (said(5), 400), (said([5]), 400),
    (said([{"type": "video"}]), 400), (said([{"type": "text"}]), 400), (said([{"type": "image_url"}]), 400),
    (talk(*["user"] * 3), 400), (talk(*["user"] * 500), 400),
    (changed(temperature="hot"), 400), (changed(temperature=-1), 400), (changed(temperature=float("nan")), 400),
    (changed(top_p=0), 400), (changed(top_p=2), 400), (changed(max_tokens=0), 400), (changed(max_tokens=1.5), 400),
    (changed(max_tokens=10**9), 400), (changed(n=2), 400), (changed(stop=""), 400), (changed(stop=["a"] * 9), 400),
    (changed(stream="yes"), 400), (changed(seed="x"), 400), (changed(tools=[{}]), 400),
    (changed(stream_options=3), 400),
    (shown("http://127.0.0.1/x.png"), 400), (shown("https://example.com/a.png"), 400),
    (shown("file:///etc/passwd"), 400),
    (shown("/etc/passwd"), 400), (shown("data:text/plain;base64,aGk="), 400), (shown("data:image/png;base64,!!!"), 400),
    (shown("data:image/png;base64,aGVsbG8="), 400), (shown(uri(RED)[:-40]), 400), (shown("ftp://x/y"), 400),
    (said("x" * 300_000), 400), (said("word " * 5000), 400),
    (said([{"type": "image_url", "image_url": {"url": uri(RED)}}] * 9), 400),
]  # fmt: skip


def test_malformed_requests_get_clear_answers(served, capfd):
    assert len(WRONG) >= 40
    with httpx.Client(base_url=served[1], timeout=60) as http:
        for body, status in WRONG:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = http.post("/v1/chat/completions", content=raw)
            assert answer.status_code == status, (body, answer.text)
            error = answer.json()["error"]
            assert error["message"] and "\n" not in error["message"] and "Traceback" not in answer.text
        assert http.get("/v1/nothing").status_code == 404 and http.get("/v1/chat/completions").status_code == 405
        assert http.get("/page/../api.py").status_code == 404 and http.get("/page/%2e%2e%2fapi.py").status_code == 404
        assert http.get("/health").status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_bounds_of_body_and_pixels(loaded):
    from serve.images import Sources

    with running(loaded, max_body=5000, sources=Sources(max_pixels=100)) as (_, address):
        answer = httpx.post(f"{address}/v1/chat/completions", content=b"x" * 6000)
        assert answer.status_code == 413 and "larger than 5000 bytes" in answer.text
        answer = httpx.post(f"{address}/v1/chat/completions", json=shown(uri(RED)))
        assert answer.status_code == 400 and "at most 100 are accepted" in answer.text


def test_files_only_below_an_allowed_folder(loaded, tmp_path):
    from serve.images import Sources

    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "red.png").write_bytes(RED)
    (tmp_path / "secret.png").write_bytes(BLUE)
    (tmp_path / "open" / "link.png").symlink_to(tmp_path / "secret.png")
    allowed = f"file://{tmp_path}/open/"
    with running(loaded, sources=Sources((allowed,))) as (_, address):
        expected = ask(address, user(QUESTION, RED)).choices[0].message.content
        one = [{"type": "image_url", "image_url": {"url": f"{allowed}red.png"}}, {"type": "text", "text": QUESTION}]
        assert ask(address, {"role": "user", "content": one}).choices[0].message.content == expected
        for name in ("link.png", "../secret.png", "%2e%2e/secret.png"):
            with pytest.raises(openai.BadRequestError, match="opens no file"):
                ask(address, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": allowed + name}}]})


def test_api_key(loaded):
    with running(loaded, api_key="s3cret") as (_, address):
        assert client(address, "s3cret").models.list().data[0].id == NAME
        for key in ("wrong", "s3cre", "s3cret1"):
            with pytest.raises(openai.AuthenticationError):
                client(address, key).models.list()
        assert httpx.get(f"{address}/health").status_code == 200 and httpx.get(f"{address}/").status_code == 200
        assert httpx.get(f"{address}/metrics").status_code == 401


def test_metrics_and_the_image_cache(loaded):
    with running(loaded, cache_bytes=1) as (service, address):
        for image in (RED, RED, BLUE, RED):
            ask(address, user(QUESTION, image), max_tokens=2)
        text = httpx.get(f"{address}/metrics").text
        assert "vlora_image_cache_hits 1.0" in text and "vlora_image_cache_misses 3.0" in text
        assert 'vlora_requests_total{status="200"} 4.0' in text and "vlora_cached_images 1.0" in text
        sites = httpx.post(f"{address}/vlora/map", json={"image": uri(RED)}).json()["sites"]
        assert {site["type"] for site in sites} == set("qkvom") and all(site["share"] > 0 for site in sites)
        assert service.batcher.alive


@pytest.mark.parametrize("connector", ["mlp", "crossattn"])
def test_other_connectors_are_served_too(parts, tmp_path, connector):
    """Different images, several and none decoded together: each as asked alone."""
    from tests.vlora.conftest import make_folder
    from vlora import load

    model = load(make_folder(parts, tmp_path / "m", connector))
    shown = ([RED], [BLUE], [], [RED, BLUE])
    expected = [alone(model, images, QUESTION)[0] for images in shown]
    assert len(set(expected)) > 1
    with running(model) as (_, address), ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(ask, address, user(QUESTION, *images)) for images in shown]
        assert [job.result().choices[0].message.content for job in jobs] == expected
        # Several images stand at their places in the text, as in a training row.
        part = {name: user("", image)["content"][0] for name, image in (("red", RED), ("blue", BLUE))}
        text = {"type": "text", "text": QUESTION}
        answers = {}
        for order in ([part["red"], part["blue"], text], [text, part["red"], text, part["blue"]]):
            message = {"role": "user", "content": order}
            answer = ask(address, message).choices[0].message.content
            prompt = model[1].apply_chat_template([message], tokenize=True, return_dict=True)
            assert len(set(prompt["image_at"].tolist())) == 1 + (order[0] is text)
            out = model[0].generate(**prompt, max_new_tokens=8)
            answers[order[0] is text] = answer
            assert answer == model[1].answer(out[0, prompt["input_ids"].shape[1] :])
        assert len(answers) == 2
        assert httpx.post(f"{address}/vlora/map", json={"image": uri(RED)}).status_code == 400


@pytest.mark.parametrize("connector", ["vlora", "mlp"])
def test_prompts_that_are_read_together_are_answered_as_alone(parts, tmp_path, connector):
    """Rows of unlike length, with images and without; what fails, fails alone."""
    from serve.batcher import Batcher, Request
    from serve.images import ImageCache, Sources
    from tests.vlora.conftest import make_folder
    from vlora import load

    model, processor = loaded = load(make_folder(parts, tmp_path / "m", connector))
    asked = [([RED], QUESTION), ([], QUESTION), ([BLUE, RED], "is there a blue shape?"), ([BLUE], "yes? " * 12)]
    expected = [alone(loaded, images, question)[0] for images, question in asked]
    batcher = Batcher(model, processor, ImageCache())
    batcher.close()  # what its thread does is done here
    told: dict[int, list] = {number: [] for number in range(5)}

    def request(number, ids, images=(), image_at=()):
        seen = [Sources().see(uri(image), processor) for image in images]
        longest = 8 + len(processor.text.answer_prefix)
        return Request(ids, seen, longest, lambda *said: told[number].append(said), image_at=image_at)

    works = []
    for number, (images, question) in enumerate(asked):
        prompt = processor.text.prompt([{"role": "user", "content": question}], len(images))
        works.append(request(number, prompt.input_ids, images, prompt.image_at))
    batcher._admit([*works, request(4, [10**6])])
    while batcher.active:
        batcher._step()
    assert ["".join(piece for piece, _ in told[n]).strip() for n in range(4)] == expected
    assert told[4] == [("", "error: IndexError")]
