"""How an agent and the lead find out that they belong to the same start of the same run, before anything else is said.

Each proves to the other that it knows the run's key, over a number that the other has just drawn; nobody learns the key
from it. Without a key it only tells strangers and earlier starts of a run apart. Pure: lines in, lines out.
"""

import hashlib
import hmac
import json
import secrets
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.ranks.messages import Hello

LONGEST_LINE = 4096
"""Of somebody who is not known yet."""
VERSION = 1

Drawn = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Refused(Exception):
    """It is not one of ours; the text says why."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Greeting(_Line):
    """From the lead, to whoever connects."""

    gptdist_control: int
    drawn: Drawn


class _Introduction(_Line):
    """From the agent. `identity`: of the start of the run."""

    identity: str = Field(max_length=255)
    hello: Hello
    drawn: Drawn
    proof: Drawn


class _Answer(_Line):
    """From the lead; `refused` is why not."""

    proof: Drawn | None = None
    refused: str | None = Field(None, max_length=1000)


class LeadsHandshake:
    """The lead's side, of one connection."""

    def __init__(self, identity: str, key: bytes) -> None:
        self._identity = identity
        self._key = key
        self._drawn = secrets.token_hex(32)

    def greeting(self) -> bytes:
        return _render(_Greeting(gptdist_control=VERSION, drawn=self._drawn))

    def check(self, line: bytes) -> tuple[Hello, bytes]:
        """Who it is, and what to answer it. Raises Refused."""
        said: _Introduction = _parse(_Introduction, line)
        if said.identity != self._identity:
            raise Refused(f"it belongs to another start or run ({said.identity!r}, this is {self._identity!r})")
        if not _is_proof(said.proof, self._key, "agent", self._drawn, said.drawn, said.identity, said.hello):
            raise Refused("it has another key")
        proof = _prove(self._key, "lead", self._drawn, said.drawn, said.identity, said.hello)
        return said.hello, _render(_Answer(proof=proof))

    @staticmethod
    def refuse(why: str) -> bytes:
        return _render(_Answer(refused=why[:1000]))


class AgentsHandshake:
    """The agent's side, of one connection."""

    def __init__(self, identity: str, key: bytes, hello: Hello) -> None:
        self._identity = identity
        self._key = key
        self._hello = hello
        self._drawn = secrets.token_hex(32)
        self._leads = ""

    def introduce(self, line: bytes) -> bytes:
        """What to answer to the lead's greeting. Raises Refused."""
        greeting: _Greeting = _parse(_Greeting, line)
        if greeting.gptdist_control != VERSION:
            raise Refused(f"it is another version (control {greeting.gptdist_control}, this is {VERSION})")
        self._leads = greeting.drawn
        proof = _prove(self._key, "agent", self._leads, self._drawn, self._identity, self._hello)
        return _render(_Introduction(identity=self._identity, hello=self._hello, drawn=self._drawn, proof=proof))

    def check(self, line: bytes) -> None:
        """Whether the lead's answer is one. Raises Refused."""
        answer: _Answer = _parse(_Answer, line)
        if answer.proof is None:
            raise Refused(answer.refused or "it says no more")
        if not _is_proof(answer.proof, self._key, "lead", self._leads, self._drawn, self._identity, self._hello):
            raise Refused("it has another key")


def _prove(key: bytes, role: str, leads: str, agents: str, identity: str, hello: Hello) -> str:
    said = json.dumps([VERSION, role, leads, agents, identity, hello.model_dump()])
    return hmac.new(key, said.encode(), hashlib.sha256).hexdigest()


def _is_proof(proof: str, key: bytes, *said: Any) -> bool:
    return hmac.compare_digest(proof, _prove(key, *said))


def _render(line: _Line) -> bytes:
    return line.model_dump_json().encode() + b"\n"


def _parse(kind: Any, line: bytes) -> Any:
    try:
        return kind.model_validate_json(line)
    except ValidationError:
        raise Refused("it does not speak our language") from None
