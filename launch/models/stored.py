"""Where checkpoints are, and the config and the tokenizer of one, without torch: for tools that compute nothing.

Knows a run's folder and a checkpoint's run state. Loads no weights.
"""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from gptdist.checkpoint.read import Checkpoint
from gptdist.config.sections import RunConfig
from gptdist.data.corpora import corpus_names
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CheckpointError
from gptdist.model.parameters import logical_shapes
from gptdist.remote import is_url, without_secrets

TOKENIZER_FILE = "tokenizer.json"


def checkpoints_dir(config: RunConfig) -> Path:
    """Where the run's checkpoints are."""
    return Path(config.checkpoint.dir or Path(config.launch.run_dir) / "checkpoints")


def stored_config(checkpoint: Checkpoint) -> RunConfig:
    """The config it was saved with, its weights being those of its model. Raises CheckpointError."""
    try:
        config = RunConfig.model_validate(checkpoint.state["config"])
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{checkpoint.path} was saved by another version of gptdist "
            f"({checkpoint.state.get('versions', {}).get('gptdist')}): its "
            f"config's {'.'.join(map(str, first['loc']))} is not understood here ({first['msg']}). Use that version."
        ) from error
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.path} does not say of which model it is: no {error} in its state."
        ) from None
    wanted = {f"weight/{name}": shape for name, shape in logical_shapes(config.model).items()}
    held = {name: checkpoint.shape(name) for name in checkpoint.names("weight/")}
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            raise CheckpointError(
                f"{checkpoint.path} is not of the model that its config says: {name} is {held.get(name)}, not "
                f"{wanted.get(name)}."
            )
    return config


def stored_tokenizer(checkpoint: Checkpoint, config: RunConfig) -> CorpusTokenizer:
    """From the run's folder, else from the corpus; it must be the one the model was trained with.

    Raises CheckpointError.
    """
    trained_on = checkpoint.state["data"]
    wanted, end_of_text = trained_on["tokenizer"], trained_on["end_of_text"]
    places = list(_tokenizer_places(checkpoint, config))
    for place in places:
        if is_url(place) or Path(place).exists():
            tokenizer = CorpusTokenizer.load(place, end_of_text)
            if tokenizer.sha256 == wanted:
                return tokenizer
    raise CheckpointError(
        f"the tokenizer that {checkpoint.path} was trained with (sha256 {wanted[:12]}...) is in none of "
        f"{', '.join(without_secrets(str(place)) for place in dict.fromkeys(places))}. Put its file there."
    )


def versions_of(*packages: str) -> dict[str, str | None]:
    """What is installed here; None for what is not, or is run from its sources."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _tokenizer_places(checkpoint: Checkpoint, config: RunConfig) -> Iterator[Path | str]:
    path = checkpoint.path.absolute()
    for folder in (path.parent.parent, path.parent, path):  # a run's, of checkpoints, its own
        yield folder / TOKENIZER_FILE
    yield Path(config.launch.run_dir) / TOKENIZER_FILE
    if config.data.corpus is not None or config.data.blend is not None:
        yield from corpus_names(config.data)
