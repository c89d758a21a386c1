"""The demo's server: what it answers, what it refuses, one text at a time. The page itself: tests/browser/test_demo.py."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="starlette is missing: pip install 'jaxlm[demo]'")
from starlette.testclient import TestClient

from jaxlm import api
from jaxlm.tokenizers import make_tokenizer
from tests import tiny
from tests.test_api import random_params, save
from tools import demo

ROOT = Path(__file__).resolve().parents[2]


def make_lm(family, **fields):
    """All that the server asks of a model which never computes."""
    tokenizer = make_tokenizer("bytes", num_sentinels=0)
    about = dict(checkpoint="W", family=family, model=None, params=None, tokenizer=tokenizer)
    about |= dict(num_ids=tokenizer.vocab_size, max_len=64, mesh=None, prefix=())
    return api.LanguageModel(**about, end_id=tokenizer.eos_id, **fields)


def client_of(lm, **options):
    return TestClient(demo.make_app(lm, **options), base_url="http://127.0.0.1:8000")


@pytest.fixture(scope="module")
def client():
    """Of a decoder for requests that are refused before anything is computed."""
    return client_of(make_lm("gpt"))


def load_tiny(folder, spec):
    config = tiny.tiny_config(spec, "no store")
    return api.load(save(folder, config, random_params(config)))


def read_lines(response):
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


# --- answers ----------------------------------------------------------------------------------------------------------


def check_answer(lines, pieces, is_greedy):
    """The lines tell the pieces, and their probabilities are some of one distribution for each token."""
    assert [line["text"] for line in lines] == [piece.text for piece in pieces]
    assert [line["finish"] for line in lines] == [""] * (len(lines) - 1) + ["length"]
    tokens = [token for line in lines for token in line["tokens"]]
    logprobs = [logprob for piece in pieces for _, logprob in piece.tokens]
    np.testing.assert_allclose([token["token"][1] for token in tokens], np.exp(logprobs))
    for token in tokens:
        (_, p), others, place = token["token"], token["alternatives"], token["place"]
        values = [other for _, other in others]
        assert values == sorted(values, reverse=True) and len(values) == demo.ALTERNATIVES
        assert 0 < sum(values) + (p if place < 0 else 0) < 1 + 1e-5
        if place < 0:
            assert p <= values[-1] and token["token"][0] not in [name for name, _ in others]
        else:
            assert others[place][0] == token["token"][0] and others[place][1] == pytest.approx(p)
        assert not is_greedy or place == 0


def test_tokens_stream_with_their_probabilities_and_the_likeliest_others(tmp_path):
    lm = load_tiny(tmp_path, "configs/gpt.py:tiny")
    client = client_of(lm)
    for options in ({"temperature": 0}, {"temperature": 2, "seed": 3}):
        options |= {"top_k": 0, "max_new_tokens": 5}
        pieces = list(api.stream(lm, "def ", alternatives=demo.ALTERNATIVES, **options))
        lines = read_lines(client.post("/generate", json={"text": "def ", **options}))
        assert len(lines) >= 5  # a token at a time
        check_answer(lines, pieces, is_greedy=options["temperature"] == 0)
    for spoil in (
        lambda lines: lines[0]["tokens"][0]["alternatives"].reverse(),
        lambda lines: lines[1]["tokens"][0]["token"].__setitem__(1, 0.5),
        lambda lines: lines.pop(0),
    ):
        wrong = json.loads(json.dumps(lines))
        spoil(wrong)
        with pytest.raises(AssertionError):
            check_answer(wrong, pieces, is_greedy=False)
    too_long = client.post("/generate", json={"text": "x" * 99})
    assert too_long.status_code == 400
    assert "100 tokens, and the context holds 32" in too_long.json()["error"]


@pytest.mark.parametrize("family", ["encoder_decoder", "xlnet"])
def test_a_model_that_the_page_cannot_show_is_refused(family):
    with pytest.raises(api.BadInput, match="W is an encoder"):
        demo.make_app(make_lm(family))


def test_masks_are_filled(tmp_path):
    lm = load_tiny(tmp_path, "configs/bert.py:tiny")
    text = "def [MASK](self, [MASK]):"
    [line] = read_lines(client_of(lm).post("/fill_mask", json={"text": text, "top_k": 3}))
    [masks] = api.fill_mask(lm, [text], top_k=3)
    assert line["parts"] == ["def ", "(self, ", "):"]
    assert line["masks"] == [[[c.token, c.probability] for c in mask] for mask in masks]
    refused = client_of(lm).post("/fill_mask", json={"text": "no mask"})
    assert refused.status_code == 400 and "no [MASK] in it" in refused.json()["error"]


def test_tokens_are_named_with_their_space_and_as_their_vocabulary_spells_half_characters():
    lm = make_lm("gpt")
    name = lambda id: demo.token_text(lm, id)
    space, newline, letter, half = (int(lm.tokenizer.encode(c)[0]) for c in " \nxé")
    assert [name(space), name(newline), name(letter)] == [" ", "\n", "x"]
    assert name(half) == lm.tokenizer.token(half) and "\ufffd" not in name(half)
    assert name(lm.tokenizer.eos_id) == lm.tokenizer.token(lm.tokenizer.eos_id)


def test_the_page_learns_the_options_whose_defaults_are_those_of_the_api(client):
    about = client.get("/model").json()
    assert about["path"] == "generate" and about["max_len"] == 64
    defaults = {option["name"]: option["default"] for option in about["options"]}
    assert defaults["temperature"] == 0.8 and defaults["max_new_tokens"] == 64  # the context
    assert demo.read_wanted(
        json.dumps({"text": "", **defaults}).encode(), demo.options_of(make_lm("gpt"))
    )
    assert client_of(make_lm("bert")).get("/model").json()["path"] == "fill_mask"


# --- refusals ---------------------------------------------------------------------------------------------------------

WRONG = [
    ({}, "text: expected a text"),
    ({"text": 3}, "text: expected a text"),
    ({"text": "a", "temprature": 1}, 'unknown: "temprature"'),
    (
        {"text": "a", "temperature": "hot"},
        'temperature: expected a number from 0 to 5, found "hot"',
    ),
    ({"text": "a", "temperature": True}, "found true"),
    ({"text": "a", "temperature": None}, "found null"),
    ({"text": "a", "top_k": 1.5}, "top_k: expected a whole number from 0 to"),
    ({"text": "a", "max_new_tokens": 65}, "max_new_tokens: expected a whole number from 1 to 64"),
    ({"text": "a", "seed": 2**32}, "from 0 to 4294967295, found 4294967296"),
    ({"text": "a", "alternatives": 9}, 'unknown: "alternatives"'),
    ({"text": None, "top_p": 0, "x": 1}, 'unknown: "x"; text: expected a text; top_p: expected'),
    (["text"], "expected a JSON object"),
]


@pytest.mark.parametrize("wanted,said", WRONG)
def test_a_request_with_wrong_fields_is_refused_with_all_that_is_wrong(client, wanted, said):
    response = client.post("/generate", json=wanted)
    assert response.status_code == 400 and said in response.json()["error"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 60_000, b'{"text": "a", "top_p": NaN}']
)
def test_what_is_no_json_or_no_number_is_refused(client, body):
    response = client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]


def test_bodies_are_limited_and_must_say_that_they_are_json(client):
    long = client.post("/generate", json={"text": "x" * demo.MOST_BYTES})
    assert long.status_code == 413 and "too long" in long.json()["error"]
    form = client.post(
        "/generate", content=b'{"text": "a"}', headers={"content-type": "text/plain"}
    )
    assert form.status_code == 415
    assert client.get("/generate").status_code in (404, 405)
    assert client.post("/fill_mask", json={"text": "[MASK]"}).status_code in (404, 405)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""]
)
def test_another_host_name_is_refused(client, host):
    for path in ("/", "/model"):
        assert client.get(path, headers={"host": host}).status_code == 400
    assert client.post("/generate", json={"text": ""}, headers={"host": host}).status_code == 400


def test_names_that_are_allowed_are_answered():
    client = client_of(make_lm("gpt"), hosts=["box.example"])
    assert client.get("/model", headers={"host": "box.example:8000"}).status_code == 200
    assert client.get("/model", headers={"host": "localhost"}).status_code == 400


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/page.css", "/model", "/nothing", "/../demo.py", "/%2e%2e/demo.py"]
)
def test_every_answer_forbids_what_the_page_does_not_need(client, path):
    response = client.get(path)
    is_there = path in ("/", "/page.js", "/page.css", "/model")
    assert response.status_code == (200 if is_there else 404)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "server" not in response.headers


def test_a_model_without_a_head_is_refused_at_the_start():
    with pytest.raises(api.BadInput, match="W has no language model's head"):
        demo.make_app(make_lm("gpt", no_lm="has no language model's head"))


# --- one at a time ----------------------------------------------------------------------------------------------------


class Asker:
    """A client of the application itself, which can go away in the middle."""

    def __init__(self, app, text="a"):
        self.body = json.dumps({"text": text}).encode()
        self.sent, self.is_sent, self.gone = [], asyncio.Event(), asyncio.Event()
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = dict(type="http", method="POST", path="/generate", raw_path=b"/generate")
        scope |= dict(query_string=b"", root_path="", scheme="http", headers=headers)
        self.task = asyncio.create_task(app(scope, self.receive, self.send))

    async def receive(self):
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        self.is_sent.set()

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def lines(self):
        return b"".join(m["body"] for m in self.sent[1:]).decode().splitlines()


class Slow:
    """Stands in for the model: makes a line when it is let to, and notes what it began, made and ended."""

    __name__ = "generate"

    def __init__(self, num_lines):
        self.num_lines, self.allowed, self.notes = num_lines, threading.Semaphore(0), []

    def __call__(self, lm, text):
        self.notes.append(f"begin {text}")
        try:
            for number in range(self.num_lines):
                assert self.allowed.acquire(timeout=30)
                self.notes.append(f"{text}{number}")
                yield {"text": f"{text}{number}"}
        finally:
            self.notes.append(f"end {text}")


@pytest.fixture
def slow(monkeypatch):
    model = Slow(num_lines=3)
    monkeypatch.setattr(demo, "generate", model)
    return model


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def test_texts_are_computed_one_at_a_time_and_who_is_too_many_is_told(slow):
    async def story():
        app = demo.make_app(make_lm("gpt"))
        askers = []
        for name in "abcde":  # one is computed, four wait
            askers.append(Asker(app, name))
            await until(lambda: slow.notes)
            await asyncio.sleep(0.02)
        late = Asker(app, "f")
        await late.task
        assert late.status == 503
        assert "5 texts are computed or waiting already" in late.sent[1]["body"].decode()
        assert dict(late.sent[0]["headers"])[b"retry-after"] == b"5"
        assert slow.notes == ["begin a"]
        for _ in range(15):
            slow.allowed.release()
        await asyncio.gather(*(asker.task for asker in askers))
        assert [len(asker.lines) for asker in askers] == [3] * 5
        again = Asker(app, "g")
        for _ in range(3):
            slow.allowed.release()
        await again.task
        assert again.status == 200  # there is room again

    asyncio.run(story())
    one = lambda name: [f"begin {name}", *(f"{name}{n}" for n in range(3)), f"end {name}"]
    assert slow.notes == [note for name in "abcdeg" for note in one(name)]


def test_a_client_that_goes_away_ends_its_text_at_the_next_token(slow):
    async def story():
        app = demo.make_app(make_lm("gpt"))
        gone, next_one, left = Asker(app, "a"), Asker(app, "b"), Asker(app, "c")
        slow.allowed.release()
        await until(lambda: len(gone.sent) == 2)  # the start and a line
        left.gone.set()  # while it waits
        gone.gone.set()
        slow.allowed.release()
        await gone.task
        for _ in range(3):
            slow.allowed.release()
        await asyncio.gather(next_one.task, left.task)
        assert [json.loads(line)["text"] for line in next_one.lines] == ["b0", "b1", "b2"]
        assert left.sent == []

    asyncio.run(story())
    assert slow.notes == ["begin a", "a0", "a1", "end a", "begin b", "b0", "b1", "b2", "end b"]


def test_a_line_is_sent_before_the_next_is_made(slow):
    async def story():
        asker = Asker(demo.make_app(make_lm("gpt")))
        for made in range(1, 4):
            slow.allowed.release()
            await until(lambda: len(asker.lines) == made)
            assert f"a{made}" not in slow.notes
        await asker.task

    asyncio.run(story())


# --- the command ------------------------------------------------------------------------------------------------------


def test_without_the_extra_one_line_says_what_to_install():
    code = "import sys; sys.modules['starlette'] = None; import tools.demo"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "pip install 'jaxlm[demo]'" in done.stderr


def test_listening_everywhere_needs_a_name(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--checkpoint=W", "--host=0.0.0.0"])
    assert "--allow_host=NAME" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_and_a_port_that_is_taken_are_one_line(
    tmp_path, monkeypatch, capsys
):
    def refused(*arguments):
        with pytest.raises(SystemExit):
            demo.main(arguments)
        return capsys.readouterr().err

    monkeypatch.setattr(demo, "keep_freed_memory", lambda: None)  # they are for the whole process
    monkeypatch.setattr(demo.logging, "set_verbosity", lambda level: None)
    said = refused(f"--checkpoint={tmp_path / 'W'}", "--port=0")
    assert said.startswith("no checkpoint in ") and said.count("\n") == 1
    monkeypatch.setattr(api, "load", lambda checkpoint: make_lm("gpt"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refused("--checkpoint=W", f"--port={taken.getsockname()[1]}")
    assert "expected 0 (any that is free) to 65535" in refused("--checkpoint=W", "--port=99999")
