"""The two models of a proof, each run in a process of its own: ours, and `transformers`, which only this file imports.

Both compute in fp32 on the GPU where there is one, else on the CPU, and leave logits as .npy files.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.read import Checkpoint
from gptdist.config.sections import RunConfig
from gptdist.errors import ExchangeError
from gptdist.exchange.conformance import kept_positions
from gptdist.exchange.numbers import rounded
from launch.models.stored import versions_of


def ours(checkpoint: Path, config: RunConfig, dtype: str, tokens: Path, out: Path) -> dict[str, Any]:
    """our model"""
    import torch

    from gptdist.engine.engine import InferenceEngine
    from gptdist.layout import Layout
    from gptdist.world import World
    from launch.rendezvous import join, leave

    class Rounded:
        """The checkpoint's weights as the export has them."""

        def __init__(self, opened: Checkpoint) -> None:
            self._opened = opened

        def read(self, name: str, box: Box) -> torch.Tensor:
            return torch.from_numpy(rounded(self._opened.read(name, box), dtype))

    out.mkdir()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    join(World(), config.launch.timeout, device)
    try:
        train = config.train.model_copy(update={"precision": "fp32", "recompute": "none"})
        engine = InferenceEngine(config.model, train, Layout(), World())
        try:
            # It was exported just now: who owns it was asked then.
            with Checkpoint.open(checkpoint, verify=False, trust_others=True) as opened:
                engine.load_weights(Rounded(opened))
            for number, row in enumerate(json.loads(tokens.read_text())):
                logits = engine.logits(torch.tensor([row]))[0].numpy()
                np.save(out / f"{number}.npy", logits[kept_positions(*logits.shape)])
        finally:
            engine.close()
    finally:
        leave()
    return {"about": versions_of("torch", "megatron-core") | {"device": _device_name(device)}}


def theirs(folder: Path, tokens: Path, texts: list[str], out: Path) -> dict[str, Any]:
    """`transformers`"""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    out.mkdir()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    model, report = loaded
    wrong = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    # A tied head is not stored, and is missing only by name.
    if wrong["unexpected_keys"] or wrong["mismatched_keys"] or (wrong["missing_keys"] and not _is_tied(model)):
        raise ExchangeError(f"transformers does not find in the folder what its architecture has: {wrong}")
    model = model.to(device).eval()
    with torch.no_grad():
        for number, row in enumerate(json.loads(tokens.read_text())):
            logits = model(torch.tensor([row], device=device), use_cache=False).logits[0].float().cpu().numpy()
            np.save(out / f"{number}.npy", logits[kept_positions(*logits.shape)])
    ids = {}
    if texts:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = {text: list(tokenizer(text)["input_ids"]) for text in texts}
    about: dict[str, Any] = versions_of("torch", "transformers", "tokenizers") | {"device": _device_name(device)}
    return {"about": about | {"architecture": type(model).__name__}, "ids": ids}


def _is_tied(model: Any) -> bool:
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"
