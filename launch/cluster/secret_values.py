"""Which values of a config look like secrets: keys, tokens, passwords. They are refused, and never shown.

Pure: names, values and problems; knows no file and no section.
"""

import re
from collections.abc import Sequence

from gptdist.config.marked import Marked
from gptdist.config.problems import COMMAND_LINE, Problem
from gptdist.config.schema import KeyPath, shown_path

_SECRET_WORDS = frozenset(
    {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "PAT", "CREDENTIAL", "CREDENTIALS"}
)
_SECRET_ENDS = ("PASSWORD", "PASSWD", "SECRET", "TOKEN", "APIKEY")
"""Of words such as PGPASSWORD."""
_PATH_WORDS = frozenset({"FILE", "PATH", "DIR"})
_PATH_NAMES = frozenset({"GOOGLE_APPLICATION_CREDENTIALS"})
_SECRET_VALUE = re.compile(
    r"(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abop]-|wandb_v1_|npm_|dckr_pat_|nvapi-|AIza)[A-Za-z0-9_-]{8,}"
    r"|(AKIA|ASIA)[A-Z0-9]{12,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\."
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\w://[^/\s]*:[^/\s]*@"
    r"|^[0-9a-f]{40}$"
)
_REMEDY = (
    "which a cluster file is no place for (it is not shown here). Set it in the environment that you submit from, "
    "which the job inherits; or write it into a file of mode 0600 and give that as cluster.secrets_file."
)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name would hold a secret: WANDB_API_KEY, not TOKENIZERS_PARALLELISM."""
    words = name.upper().split("_")
    secret = any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) for word in words)
    return secret and words[-1] not in _PATH_WORDS and name not in _PATH_NAMES


def is_secret_value(value: str) -> bool:
    """Whether a value has the form of a well-known kind of key, or is a URL with a password."""
    return _SECRET_VALUE.search(value) is not None


def without_secret_overrides(overrides: Sequence[str], problems: list[Problem]) -> list[str]:
    """The overrides of a cluster that hold no secret; a problem is added for each that does."""
    kept = []
    for override in overrides:
        name, _, value = override.partition("=")
        why = _why(tuple(name.split(".")), value)
        if why:
            problems.append(Problem(f"{name} {why}, {_REMEDY}", COMMAND_LINE))
        else:
            kept.append(override)
    return kept


def without_secrets(tree: Marked, problems: list[Problem], path: KeyPath = ()) -> Marked:
    """`tree` with its secrets masked; a problem is added for each."""
    if isinstance(tree.value, dict):
        children = {key: without_secrets(child, problems, (*path, key)) for key, child in tree.value.items()}
        return Marked(children, tree.origin)
    if isinstance(tree.value, tuple):
        items = (without_secrets(item, problems, (*path, str(number))) for number, item in enumerate(tree.value))
        return Marked(tuple(items), tree.origin)
    why = _why(path, "" if tree.value is None else str(tree.value))
    if not why:
        return tree
    problems.append(Problem(f"{shown_path(path)} {why}, {_REMEDY}", tree.origin))
    return Marked("***", tree.origin)


def _why(path: KeyPath, value: str) -> str:
    if "env" in path[:-1] and is_secret_name(path[-1]):
        return "is a secret by its name"
    return "is a secret by the look of its value" if is_secret_value(value) else ""
