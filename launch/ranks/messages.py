"""What agents and the lead tell each other, as lines of JSON.

Knows kinds of messages and their fields, no socket. Nothing that arrives is trusted: a line that is not exactly one of
these messages is refused.
"""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from launch.ranks.failure_report import RankStack
from launch.ranks.hang import Standing
from launch.ranks.verdict import RankEnd

Name = Annotated[str, Field(max_length=255)]
_Kind = TypeVar("_Kind")


class Unreadable(Exception):
    """A line that is no message, from a peer that is not ours or is of another version."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# -- from an agent to the lead ---------------------------------------------------------------------------------------


class Hello(_Message):
    """Who the agent is: the first words of a handshake."""

    kind: Literal["hello"] = "hello"
    first_rank: int = Field(ge=0)
    ranks: int = Field(ge=1)
    host: Name
    pid: int


class Beats(_Message):
    """Where its ranks stand."""

    kind: Literal["beats"] = "beats"
    generation: int
    standings: tuple[Standing, ...]


class Ended(_Message):
    """A rank is no more. `now_nanoseconds`: of the agent's clock, which the times in `end` are of."""

    kind: Literal["ended"] = "ended"
    generation: int
    end: RankEnd
    now_nanoseconds: int


class Stacks(_Message):
    """What its ranks are doing."""

    kind: Literal["stacks"] = "stacks"
    generation: int
    stacks: tuple[RankStack, ...]


class Signalled(_Message):
    """The agent got a signal that is to be passed on to all ranks."""

    kind: Literal["signalled"] = "signalled"
    number: int


# -- from the lead to agents -----------------------------------------------------------------------------------------


class Start(_Message):
    """Start your ranks, which meet at this address."""

    kind: Literal["start"] = "start"
    generation: int
    master_address: Name
    master_port: int


class Dump(_Message):
    """Tell what your ranks are doing."""

    kind: Literal["dump"] = "dump"


class PassOn(_Message):
    """Pass this signal on to your ranks."""

    kind: Literal["pass on"] = "pass on"
    number: int


class End(_Message):
    """End your ranks: TERM, and KILL to those that are still there after `grace_seconds`."""

    kind: Literal["end"] = "end"
    grace_seconds: float = Field(ge=0)


class Exit(_Message):
    """It is over: leave with this code."""

    kind: Literal["exit"] = "exit"
    code: int


class Alive(_Message):
    """Nothing new; the sender is there."""

    kind: Literal["alive"] = "alive"


Word = Beats | Ended | Stacks | Signalled | Alive
"""What agents say once they are known."""
Order = Start | Dump | PassOn | End | Exit | Alive

_HELLO: TypeAdapter[Hello] = TypeAdapter(Hello)
_WORDS: TypeAdapter[Word] = TypeAdapter(Annotated[Word, Field(discriminator="kind")])
_ORDERS: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="kind")])


def encode(message: _Message) -> bytes:
    """One line."""
    return message.model_dump_json().encode() + b"\n"


def read_word(line: bytes) -> Word:
    """Raises Unreadable."""
    return _read(_WORDS, line)


def read_order(line: bytes) -> Order:
    """Raises Unreadable."""
    return _read(_ORDERS, line)


def read_hello(line: bytes) -> Hello:
    """Raises Unreadable."""
    return _read(_HELLO, line)


def _read(adapter: TypeAdapter[_Kind], line: bytes) -> _Kind:
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        raise Unreadable(str(error).splitlines()[0]) from None
