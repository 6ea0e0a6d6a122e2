"""The server over real sockets: OpenAI's protocol, its errors, one request at a time, and clients that go.

The model is a stand-in that spells the alphabet, so that every answer is known; one test serves a trained one.
"""

import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptdist.comms import Comms
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.serve.completion import ServedModel, StopStrings
from gptdist.world import World
from tests.dist.commands import Commands

uvicorn = pytest.importorskip("uvicorn", reason="the server is the extra `serve`")
pytest.importorskip("fastapi", reason="the server is the extra `serve`")

CONTEXT = 64
KEY = "sesame-9"


class Alphabet:
    """An engine that expects b after a, and so on; after z the end. Counts what it computes, and may be slow."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(sequence_length=CONTEXT)
        self.network = SimpleNamespace(can_remember=False)
        self.computed = 0
        self.at_work = 0
        self.most_at_work = 0
        self.seconds = 0.0
        self.broken = False

    def logits(self, tokens: Tensor) -> Tensor:
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        time.sleep(self.seconds)
        self.computed += 1
        self.at_work -= 1
        last = int(tokens[0, -1])
        logits = torch.zeros(1, tokens.shape[1], 300)
        logits[0, -1, 256 if last == ord("z") else (last + 1) % 256] = torch.nan if self.broken else 10.0
        return logits


class Server:
    """A server in a thread of its own; asks it things."""

    def __init__(self, engine: Alphabet, port: int) -> None:
        self.engine = engine
        self.port = port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON where it is) and headers."""
        connection = self.connect()
        content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if content is not None else {}
        connection.request(method, path, content, kind | {name.replace("_", "-"): headers[name] for name in headers})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        found = dict(response.getheaders())
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text, found

    def complete(self, **body: Any) -> dict[str, Any]:
        status, answer, _ = self.ask("POST", "/v1/completions", {"temperature": 0, **body})
        assert status == 200, answer
        return dict(answer)

    def refuse(self, status: int, body: Any, path: str = "/v1/completions", **headers: str) -> dict[str, Any]:
        found, answer, _ = self.ask("POST", path, body, **headers)
        assert found == status, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return dict(answer["error"])

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        status, text, headers = self.ask("POST", path, {"temperature": 0, "stream": True, **body})
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
        events = text.removesuffix("\n\n").split("\n\n")
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    from gptdist.serve.api import build_app

    engine = Alphabet()
    model = ServedModel("alphabet", engine, Comms(World()), CorpusTokenizer.of_bytes())  # type: ignore[arg-type]
    config = uvicorn.Config(
        build_app(model, **settings), log_level="error", ws="none", timeout_graceful_shutdown=2, access_log=False
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Server(engine, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(hosts=frozenset({"127.0.0.1", "localhost"})) as found:
        yield found


@pytest.fixture(autouse=True)
def fast(request: pytest.FixtureRequest) -> None:
    if "server" in request.fixturenames:
        engine = request.getfixturevalue("server").engine
        engine.seconds, engine.broken, engine.most_at_work = 0.0, False, 0


def test_models(server: Server) -> None:
    status, answer, _ = server.ask("GET", "/v1/models")
    assert status == 200 and [model["id"] for model in answer["data"]] == ["alphabet"]
    assert answer["data"][0]["context_length"] == CONTEXT
    assert server.ask("GET", "/v1/models/alphabet")[1]["object"] == "model"
    assert server.ask("GET", "/v1/models/gpt-4")[0] == 404


def test_a_completion(server: Server) -> None:
    answer = server.complete(prompt="abc", max_tokens=4, model="alphabet")
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "defg", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert len(server.complete(prompt="a")["choices"][0]["text"]) == 16, "OpenAI's default"


def test_the_end_of_text_ends_it(server: Server) -> None:
    answer = server.complete(prompt="w", max_tokens=40)
    assert answer["choices"][0]["text"] == "xyz" and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stop", ["fg", ["xx", "fg"], ["fgx", "f"], ["g", "fg"]])
def test_stop_strings_end_it_and_are_not_told(server: Server, stop: Any) -> None:
    for stream in (False, True):
        body = {"prompt": "a", "max_tokens": 20, "stop": stop}
        answers = server.stream("/v1/completions", **body) if stream else [server.complete(**body)]
        assert "".join(answer["choices"][0]["text"] for answer in answers) == "bcde"
        assert answers[-1]["choices"][0]["finish_reason"] == "stop"


def test_several_prompts_and_ids(server: Server) -> None:
    choices = server.complete(prompt=["a", "k"], max_tokens=2)["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "bc"), (1, "lm")]
    assert server.complete(prompt=[97, 98], max_tokens=2)["choices"][0]["text"] == "cd"
    assert [one["text"] for one in server.complete(prompt=[[97], [109]], max_tokens=2)["choices"]] == ["bc", "no"]
    # An empty prompt begins a document: after the end-of-text id, of which this model expects the first byte.
    assert server.complete(prompt="", max_tokens=3)["usage"]["prompt_tokens"] == 1


def test_a_stream(server: Server) -> None:
    events = server.stream("/v1/completions", prompt="a", max_tokens=3, stream_options={"include_usage": True})
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["b", "c", "d", ""]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, None, "length"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == 4
    assert len({event["id"] for event in events}) == 1
    many = server.stream("/v1/completions", prompt=["a", "k"], max_tokens=2)
    assert "".join(event["choices"][0]["text"] for event in many if event["choices"][0]["index"] == 1) == "lm"


def test_log_probabilities(server: Server) -> None:
    told = server.complete(prompt="a", max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    assert told["tokens"] == ["b", "c", "d"] and told["text_offset"] == [0, 1, 2]
    sure = 10 - torch.tensor([10.0, *[0.0] * 256]).logsumexp(0).item()  # of 257 ids: what the tokenizer knows
    assert told["token_logprobs"] == pytest.approx([sure] * 3, abs=1e-5)
    assert [max(place, key=place.get) for place in told["top_logprobs"]] == ["b", "c", "d"]
    events = server.stream("/v1/completions", prompt="a", max_tokens=3, logprobs=0)
    assert [event["choices"][0]["logprobs"]["tokens"] for event in events[:3]] == [["b"], ["c"], ["d"]]
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events[:3]] == [[0], [1], [2]]


def test_a_seed_settles_the_draws(server: Server) -> None:
    def drawn(**body: Any) -> str:
        return str(server.complete(prompt="a", max_tokens=24, temperature=2.0, **body)["choices"][0]["text"])

    assert drawn(seed=4) == drawn(seed=4) != drawn(seed=5)
    assert drawn(seed=4, top_k=1) == "bcdefghijklmnopqrstuvwxy"
    assert drawn(seed=4, top_p=0.01) == "bcdefghijklmnopqrstuvwxy"
    assert drawn() != drawn()


def test_a_chat_is_plain_text(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    body = {"messages": messages, "max_tokens": 3}
    status, answer, _ = server.ask("POST", "/v1/chat/completions", {"temperature": 0, **body})
    assert status == 200 and answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == ";<="  # after the colon of `Assistant:`
    assert answer["usage"]["prompt_tokens"] == len("System: Be brief.\n\nUser: a\n\nAssistant:")
    events = server.stream("/v1/chat/completions", **body)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == ";<="
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"{", None, "not JSON"),
        (b"\xff\xfe", None, "not JSON"),
        (b"[]", None, "Input should be"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0; it is -1"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        (b'{"temperature": NaN}', "temperature", "finite"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**9}, "max_tokens", "less than or equal to"),
        ({"n": 2}, "n", "should be 1"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [[]]}, "prompt", "empty list"),
        ({"prompt": ["a"] * 65}, "prompt", "at most 64"),
        ({"prompt": [97, 299]}, "prompt", "299; this model's tokenizer knows 0 to 256"),
        ({"prompt": [-1]}, "prompt", "the id -1"),
        ({"prompt": "\ud800"}, None, "not JSON"),
        ({"prompt": 5}, "prompt", "it is 5"),
        ({"prompt": "x" * 65}, "prompt", "65 tokens; this model's context is 64"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"logprobs": 50}, "logprobs", "less than or equal to 20"),
        ({"echo": True}, "echo", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"temprature": 0.5}, "temprature", "Did you mean temperature?"),
        ({"seed": 2**70}, "seed", "less than"),
    ],
)
def test_what_is_refused(server: Server, body: Any, param: str | None, says: str) -> None:
    error = server.refuse(400, body)
    assert says in error["message"], error
    assert error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": []}, "at least 1"),
        ({}, "Field required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "not supported"),
        ({"messages": [{"role": "user", "content": "x" * 60}]}, "context is 64"),
    ],
)
def test_what_is_refused_of_a_chat(server: Server, body: Any, says: str) -> None:
    assert says in server.refuse(400, body, "/v1/chat/completions")["message"]


def test_refusals_with_a_status_of_their_own(server: Server) -> None:
    assert server.refuse(404, {"model": "gpt-4"})["code"] == "model_not_found"
    assert server.refuse(404, {}, "/v1/embeddings")["message"] == "POST /v1/embeddings: Not Found."
    assert "application/json" in server.refuse(415, b"{}", Content_Type="text/plain")["message"]
    assert "8 MiB" in server.refuse(413, b" " * ((8 << 20) + 1))["message"]
    assert server.refuse(403, {}, Host="evil.example")["code"] == "unknown_host"
    assert server.ask("GET", "/v1/completions")[0] == 405
    # Neutral values, and what concerns nobody here, are taken.
    server.complete(prompt="a", presence_penalty=0, echo=False, user="me", logit_bias=None, n=1)


def test_a_model_that_is_broken_says_so(server: Server) -> None:
    server.engine.broken = True
    assert "not finite" in server.refuse(500, {"prompt": "a"})["message"]
    events = server.stream("/v1/completions", prompt="a")
    assert events[-1]["error"]["type"] == "server_error"


def test_one_request_at_a_time_in_order(server: Server) -> None:
    server.engine.seconds = 0.01
    with ThreadPoolExecutor(4) as asking:
        answers = list(asking.map(lambda letter: server.complete(prompt=letter, max_tokens=6), "acek"))
    assert [answer["choices"][0]["text"] for answer in answers] == ["bcdefg", "defghi", "fghijk", "lmnopq"]
    assert server.engine.most_at_work == 1


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_is_no_longer_computed_for(server: Server, stream: bool) -> None:
    """And who waits behind gets their turn."""
    engine = server.engine
    engine.seconds = 0.02
    before = engine.computed
    connection = server.connect()
    body = {"prompt": [1] * 8, "max_tokens": 60000, "temperature": 0, "stream": stream, "top_k": 1}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    while engine.computed < before + 5:
        time.sleep(0.01)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert server.complete(prompt="a", max_tokens=2)["choices"][0]["text"] == "bc"
    after = engine.computed
    time.sleep(0.2)
    assert engine.computed == after < before + 60


def test_a_key_is_asked_for() -> None:
    with serving(api_key=KEY) as server:
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
            assert server.refuse(401, {"prompt": "a"}, **wrong)["code"] == "invalid_api_key"
            status, _, headers = server.ask("GET", "/v1/models", **wrong)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert server.ask("GET", "/v1/models", Authorization=f"Bearer {KEY}")[0] == 200
        assert server.ask("GET", "/", Host="any.name")[0] == 200, "the page itself asks for the key"


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    status, page, headers = server.ask("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(r"https?://|//\w|@import|\bsrc=|<link|url\(|innerHTML|eval\(", page)
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert server.ask("GET", path)[0] == 404, "FastAPI's own pages load scripts from elsewhere"


def test_stop_strings_over_any_pieces() -> None:
    text, stops = "one two\n\nUser: three", ["\n\nUser:", "three"]
    for cut in range(len(text)):
        for second in range(cut, len(text)):
            found, told = StopStrings(stops), ""
            for piece in (text[:cut], text[cut:second], text[second:]):
                part, stopped = found.push(piece)
                told += part
                if stopped:
                    break
            assert (told, stopped) == ("one two", True)
    held = StopStrings(["abc"])
    assert [held.push(piece) for piece in ("xa", "b", "a", "b")] == [
        ("x", False),
        ("", False),
        ("ab", False),
        ("", False),
    ]
    assert held.finish() == "ab"


def test_the_command(commands: Commands, tmp_path: Path) -> None:
    """From a run's folder to an answer, and to the end on Ctrl-C."""
    run = tmp_path / "run"
    commands.run(*commands.train_words(run, train__steps=3)).expect(0)
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    key.chmod(0o600)
    command = commands.start("serve", run, "--port", 0, "--api-key-file", key)
    output = tmp_path / f".command-{commands._count}" / "stdout"
    assert command.wait_until(lambda: "page:" in output.read_text() if output.exists() else False), command.wait()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", output.read_text())
    assert found and "step 3 of" in output.read_text()
    server = Server(Alphabet(), int(found[1]))
    body = {"prompt": "def ", "max_tokens": 8, "temperature": 0}
    status, answer, _ = server.ask("POST", "/v1/completions", body, Authorization=f"Bearer {KEY}")
    assert status == 200 and answer["model"] == "run" and answer["usage"]["completion_tokens"] == 8
    said = commands.run("generate", run, "--prompt", "def ", "--tokens", 8, "--temperature", 0).expect(0).out
    assert said == "def " + answer["choices"][0]["text"] + "\n"
    commands.run("serve", run, "--port", found[1]).one_error(f"port {found[1]} of", "already in use", "--port")
    command.send(signal.SIGINT)
    ended = command.wait(30).expect(0)
    assert not ended.errors and "Traceback" not in ended.err


def test_mistakes_of_the_command(commands: Commands, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    commands.run("serve", tmp_path, "--api-key-file", empty).one_error("must hold one key")
    commands.run("serve", tmp_path, "--api-key-file", tmp_path / "none").one_error("cannot be read")
    commands.run("serve", tmp_path, "--port", 0, "--host", "no.such.host.invalid").one_error("no address")
    commands.run("serve", tmp_path, "--port", 0, "--host", "203.0.113.7").one_error("cannot listen")
    open_to_all = commands.run("serve", tmp_path, "--port", 0, "--host", "0.0.0.0")
    open_to_all.one_error("no checkpoint")
    assert "warning: listening on 0.0.0.0" in open_to_all.err and "no key" in open_to_all.err
