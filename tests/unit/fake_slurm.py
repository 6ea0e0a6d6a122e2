"""Commands of Slurm that answer what a test tells them to, and remember what they were asked. Knows no test."""

import stat
from pathlib import Path

RECORDER = """#!/bin/bash
call=$(mktemp "$FAKE_SLURM/calls/$(date +%s%N)-XXXX")
printf '%s\\0' "${0##*/}" "$@" > "$call"
export FAKE_STDIN="$call.stdin"
[ -t 0 ] || cat > "$FAKE_STDIN"
if [ -f "$FAKE_SLURM/${0##*/}.answer" ]; then . "$FAKE_SLURM/${0##*/}.answer"; fi
"""
COMMANDS = ("sbatch", "sinfo", "squeue", "scontrol", "scancel")
LAB = "main*|3|1-infinite|infinite|4|2000|gpu:2(S:0)|up"
"""Three nodes of the partition `main`, as sinfo tells of them."""


class FakeSlurm:
    """`folder/bin` belongs first on the PATH, and FAKE_SLURM must name `folder`."""

    def __init__(self, folder: Path, commands: tuple[str, ...] = COMMANDS) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        (folder / "calls").mkdir(parents=True)
        self.bin.mkdir()
        for name in commands:
            self.add(name)
        self.answers("sinfo", f"echo '{LAB}'")
        self.answers("sbatch", 'echo $((100 + $(ls "$FAKE_SLURM/calls" | wc -l)))')

    def add(self, name: str, text: str = RECORDER) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def answers(self, name: str, bash: str) -> None:
        """From now on `name` runs this."""
        (self.folder / f"{name}.answer").write_text(bash)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of `name`, oldest first."""
        asked = [path.read_bytes().decode().split("\0")[:-1] for path in self._records()]
        return [words[1:] for words in asked if words[0] == name]

    def stdin(self, name: str) -> list[str]:
        """What each call of `name` was given to read."""
        return [
            Path(f"{path}.stdin").read_text()
            for path in self._records()
            if path.read_bytes().startswith(name.encode() + b"\0")
        ]

    def _records(self) -> list[Path]:
        return sorted(path for path in (self.folder / "calls").iterdir() if path.suffix != ".stdin")
