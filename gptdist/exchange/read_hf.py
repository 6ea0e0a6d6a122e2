"""A model's folder as Hugging Face's tools write it, read as if it were ours: by logical name and box.

Knows the folder's files: config.json, safetensors and their index. Reads by memory map, never pickle. What an
architecture is, is in `architecture.py`; how tensors lie, in `tensors.py`.
"""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import ValidationError

from gptdist.checkpoint.logical import Box, Shape
from gptdist.config.sections import ModelConfig
from gptdist.errors import ExchangeError
from gptdist.exchange.architecture import exported_dialect, hf_config, imported_model
from gptdist.exchange.conformance import CARD
from gptdist.exchange.dialect import Dialect
from gptdist.exchange.safetensors_file import DTYPES, SafetensorsFile
from gptdist.exchange.tensors import LogicalView, hf_tensors

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LARGEST_JSON = 64 << 20


class HuggingFaceSource:
    """An open folder. Raises ExchangeError for one that our models do not compute, or that is not whole."""

    def __init__(self, folder: Path, sequence_length: int | None = None) -> None:
        """`sequence_length`: use a shorter context than the model's."""
        self.path = folder
        self.config = read_json(folder / CONFIG)
        self.model: ModelConfig
        self.dialect: Dialect
        self.model, self.dialect = imported_model(self.config, sequence_length)
        self._files = _Files(folder, self.dialect, self.model.tie_embeddings)
        self._files.check_sizes(self.model)
        tensors = hf_tensors(self.model, self.dialect)
        for tensor in tensors:
            self._files.check(tensor.name, tensor.shape)
        self._files.check_nothing_else({tensor.name for tensor in tensors})
        exported = self._exported_model()
        if exported is not None:
            self.model, tensors = exported, hf_tensors(exported, self.dialect)
        self._view = LogicalView(self.model, tensors, self._files)

    def names(self, prefix: str = "") -> list[str]:
        """Logical tensors whose name starts with `prefix`, sorted; all are `weight/...`."""
        return self._view.names(prefix)

    def shape(self, name: str) -> Shape:
        """Of the whole logical tensor."""
        return self._view.shape(name)

    def read(self, name: str, box: Box | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """`box` (default: all) of a logical tensor `weight/...`, fp32, the caller's own; `out`: an array to fill.

        Exact: whatever fp32, bf16 or fp16 the folder holds.
        """
        return self._view.read(name, box, out)

    def close(self) -> None:
        """Let all files go."""
        self._files.close()

    def _exported_model(self) -> ModelConfig | None:
        """The model that this folder was exported of, with settings that config.json has no place for.

        It is in the conformance card; believed where it is what config.json says, and biases it has not are zero.
        """
        try:
            card = read_json(self.path / CARD)
            model = ModelConfig.model_validate(card["config"]["model"])
            again = hf_config(model, str(card["dtype"]), self.config.get("eos_token_id"))
            dialect = exported_dialect(model)
        except (ExchangeError, ValidationError, KeyError, TypeError):
            return None
        if dialect != self.dialect or any(self.config.get(key) != value for key, value in again.items()):
            return None
        lacking = [tensor for tensor in hf_tensors(model, dialect) if not tensor.parts]
        for tensor in lacking:
            values = np.empty(tensor.shape, np.float32)
            self._files.read_into(values, tensor.name, (slice(None),))
            if values.any():
                return None
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Files:
    """The safetensors files of a folder as one set of tensors, by the architecture's full names."""

    def __init__(self, folder: Path, dialect: Dialect, tied: bool) -> None:
        self._folder = folder
        self._files = [SafetensorsFile(folder / name) for name in _file_names(folder)]
        self._dialect = dialect
        where: dict[str, SafetensorsFile] = {}
        for file in self._files:
            for name in file.tensors:
                if name in where:
                    raise ExchangeError(f"{folder}: tensor {name} is in {where[name].path.name} and {file.path.name}.")
                where[name] = file
        self._where = where
        names = dialect.names
        # Saved from the network without its head, names lack the base.
        self._base = names.base if f"{names.base}{names.word}.weight" in where else ""
        head = self._stored_name(f"{names.output}.weight")
        if tied and head in where:
            self._check_tied(head, self._stored_name(f"{names.base}{names.word}.weight"))
        self._unused = {head} if tied else set()

    def check_sizes(self, model: ModelConfig) -> None:
        """Raises ExchangeError for a config.json whose list of tensors would be longer than the files could hold."""
        names = self._dialect.names
        self.check(f"{names.base}{names.word}.weight", (model.vocab_size, model.hidden_size))
        if model.num_layers > len(self._where):
            raise ExchangeError(
                f"{self._folder} has {len(self._where)} tensors, too few for the {model.num_layers:,} layers that its "
                "config.json says the model has. Files may be missing: fetch the folder again."
            )

    def check(self, name: str, shape: Shape) -> None:
        """Raises ExchangeError unless the tensor is there, of that shape, of floats that can be read."""
        stored_name = self._stored_name(name)
        file = self._where.get(stored_name)
        if file is None:
            raise ExchangeError(
                f"{self._folder} has no tensor {stored_name}, which its config.json says the model has. Files may be "
                "missing: fetch the folder again."
            )
        stored = file.tensors[stored_name]
        if stored.dtype not in DTYPES:
            raise ExchangeError(
                f"{file.path}: tensor {stored_name} is of {stored.dtype}; weights can be {', '.join(DTYPES)}."
            )
        if stored.shape != shape:
            raise ExchangeError(
                f"{file.path}: tensor {stored_name} is {list(stored.shape)}, but by config.json it is {list(shape)}."
            )

    def check_nothing_else(self, names: set[str]) -> None:
        """Raises ExchangeError for tensors that the architecture has not: they would be lost."""
        known = {self._stored_name(name) for name in names} | self._unused
        for name in sorted(self._where):
            if name not in known and not name.endswith(self._dialect.names.ignored):
                raise ExchangeError(
                    f"{self._where[name].path} holds {name}, which the architecture of config.json "
                    f"({self._dialect.kind}) has not. The model is more than gptdist would compute."
                )

    def read_into(self, out: np.ndarray, name: str, where: tuple[slice, ...]) -> None:
        """Fill fp32 `out` with a part of a tensor."""
        stored_name = self._stored_name(name)
        self._where[stored_name].read_into(out, stored_name, where)

    def close(self) -> None:
        self._where.clear()
        self._files.clear()

    def _stored_name(self, name: str) -> str:
        names = self._dialect.names
        if name == "embed_out.weight" and name not in self._where and "lm_head.weight" in self._where:
            return "lm_head.weight"
        return self._base + name.removeprefix(names.base) if name.startswith(names.base) else name

    def _check_tied(self, head: str, word: str) -> None:
        if word not in self._where:
            return  # `check` says so
        first, second = self._where[head].tensors[head], self._where[word].tensors[word]
        same = first.shape == second.shape and first.dtype == second.dtype and first.dtype in DTYPES
        if same:
            one, other = self._where[head].bits(head), self._where[word].bits(word)
            same = all(
                np.array_equal(one[row : row + 4096], other[row : row + 4096]) for row in range(0, len(one), 4096)
            )
        if not same:
            raise ExchangeError(
                f"{self._folder}: config.json says that {head} is {word} (tie_word_embeddings), but the folder holds "
                "two different tensors. Set tie_word_embeddings to false if both are meant."
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ExchangeError."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ExchangeError(f"{path} is larger than any such file is ({path.stat().st_size:,} bytes).")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ExchangeError(
            f"{path} is not there: {path.parent} is no folder of a Hugging Face model. Give one with config.json and "
            "*.safetensors."
        ) from None
    except OSError as error:
        raise ExchangeError(f"cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ExchangeError(f"{path} is not a JSON object.")
    return value


def _file_names(folder: Path) -> list[str]:
    """The safetensors files that make up the model. A name never leads out of the folder."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ExchangeError(f"{folder / INDEX} has no weight_map. Fetch it again.")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ExchangeError(
                    f"{folder / INDEX} names the file {name!r}: only plain *.safetensors names inside the folder are "
                    "allowed. Do not use this folder unless you know who made it."
                )
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickled:
        raise ExchangeError(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when it is read; gptdist reads "
            "safetensors only. Where you trust the folder, convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    raise ExchangeError(f"{folder} has neither {SINGLE} nor {INDEX}: there are no weights. Fetch the folder again.")
