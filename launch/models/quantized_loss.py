"""What rounding weights costs: held-out perplexity of a checkpoint and of a GGUF file made of it, through our engine.

Runs in a process of its own, which loads torch; the export does not.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any


def measure(checkpoint: Path, file: Path, corpus: Path | str | None, samples: int | None) -> dict[str, Any]:
    """perplexity"""
    import torch

    from gptdist.checkpoint.logical import Box
    from gptdist.exchange.gguf import gguf_view
    from gptdist.exchange.gguf_file import GgufFile
    from gptdist.exchange.tensors import LogicalView
    from gptdist.train.evaluate import held_out_values
    from launch.models.card import corpus_name
    from launch.models.evaluate import open_validation
    from launch.models.trained import open_trained

    class Exported:
        """The file's weights, as fp32."""

        def __init__(self, view: LogicalView) -> None:
            self._view = view

        def read(self, name: str, box: Box) -> torch.Tensor:
            return torch.from_numpy(self._view.read(name, box))

    # It was exported just now: who owns it was asked then.
    with open_trained(checkpoint, trust_others=True) as trained, ExitStack() as closing:
        reader = open_validation(trained, corpus, closing)[0]
        model, train = trained.config.model, trained.config.train
        windows = min(samples or train.eval_samples, reader.num_windows(model.sequence_length))
        before = held_out_values(trained.engine, reader, windows, train.micro_batch_size)["eval/perplexity"]
        with GgufFile(file) as opened:
            trained.engine.load_weights(Exported(gguf_view(opened, model)))
        after = held_out_values(trained.engine, reader, windows, train.micro_batch_size)["eval/perplexity"]
        return {
            "checkpoint": before,
            "exported": after,
            "change": after / before - 1,
            "windows": windows,
            "tokens": windows * model.sequence_length,
            "corpus": corpus_name(reader.corpus),
            "index": reader.manifest.split(reader.split).index.sha256,
            "computed": "fp32 activations, weights as the file's numbers say",
        }
