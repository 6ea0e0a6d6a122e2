"""What `gptdist generate` makes of its command line and of standard input; no model."""

import io
import types

import pytest

from gptdist.errors import GenerationError
from launch.arguments.command import parse_arguments
from launch.models.generate import DEFAULT_PROMPT, Order, _order


def order(monkeypatch: pytest.MonkeyPatch, *words: str, stdin: bytes = b"") -> Order:
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(stdin)))
    return _order(parse_arguments(["generate", "run", *words]))


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    found = order(monkeypatch, "--prompt", "one", "--prompt", "-", stdin="zwölf\n\n".encode())
    assert found.prompts == ("one", "zwölf\n"), "but for the end of the last line"
    assert order(monkeypatch, "--prompt", "-").prompts == ("",)


def test_standard_input_that_is_no_text_or_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenerationError, match="not UTF-8 at byte 3"):
        order(monkeypatch, "--prompt", "-", stdin=b"abc\xff")
    monkeypatch.setattr("launch.models.generate._MOST_PROMPT_BYTES", 10)
    with pytest.raises(GenerationError, match="more than any context"):
        order(monkeypatch, "--prompt", "-", stdin=b"x" * 11)
    with pytest.raises(GenerationError, match="once"):
        order(monkeypatch, "--prompt", "-", "--prompt", "-")


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    found = order(monkeypatch)
    assert (found.prompts, found.temperature, found.top_k, found.top_p) == ((DEFAULT_PROMPT,), 0.8, None, 1.0)
    assert (found.beams, found.length_penalty, found.no_repeat, found.tokens) == (1, 1.0, 0, 64)


@pytest.mark.parametrize("words", [["--temperature", "0"], ["--top-k", "1"], ["--top-p", "1"]])
def test_beams_draw_nothing(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    with pytest.raises(GenerationError, match="draws nothing"):
        order(monkeypatch, "--beams", "2", *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--top-p", "0"], "above 0 and at most 1"),
        (["--top-p", "1.5"], "above 0 and at most 1"),
        (["--top-p", "nan"], "above 0 and at most 1"),
        (["--top-k", "0"], "at least 1"),
        (["--temperature", "-0.1"], "at least 0"),
        (["--temperature", "nan"], "at least 0"),
        (["--beams", "0"], "at least 1"),
        (["--tensor", "0"], "at least 1"),
        (["--tokens", "0"], "at least 1"),
        (["--length-penalty", "-1"], "at least 0"),
    ],
)
def test_settings_out_of_range(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["generate", "run", *words])
    assert ended.value.code == 2 and says in capsys.readouterr().err
