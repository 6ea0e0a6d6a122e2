"""Values and texts to Weights & Biases; the only importer of wandb (the extra `wandb`).

Knows no names of values. The id of the run is kept beside its other logs, so that a restart goes on with the same
curves.
"""

import html
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WandbSink:
    """One Weights & Biases run a run folder; connects with the first value."""

    name = "wandb"

    def __init__(self, project: str, run_dir: Path, start_step: int) -> None:
        self._project = project
        self._run_dir = run_dir
        self._start_step = start_step
        self._run: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # The step is a value like others and the x axis: wandb's own counter refuses to go back after a resume.
        self._connected().log({**values, "step": step})

    def text(self, step: int, tag: str, text: str) -> None:
        import wandb

        self._connected().log({tag: wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _connected(self) -> Any:
        if self._run is None:
            import wandb

            run = wandb.init(
                project=self._project,
                name=self._run_dir.name,
                id=self._run_id(),
                resume="allow",
                dir=str(self._run_dir),
                settings=wandb.Settings(init_timeout=30),  # training waits for this, and again at each retry
            )
            run.define_metric("*", step_metric="step")
            self._run = run
        return self._run

    def _run_id(self) -> str:
        path = self._run_dir / "wandb_id"
        if self._start_step and path.exists():
            return path.read_text().strip()
        run_id = secrets.token_hex(8)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id + "\n")
        return run_id
