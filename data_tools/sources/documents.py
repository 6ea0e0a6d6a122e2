"""What a source yields: a document, or why there is none in that place."""

from typing import NamedTuple


class Document(NamedTuple):
    """A text and the key that says where it came from; keys are unique in a corpus."""

    key: str
    text: str


class BadDocument(NamedTuple):
    """A place without a usable text. `reason` names file, place and fault, as a sentence without its full stop."""

    key: str
    reason: str
