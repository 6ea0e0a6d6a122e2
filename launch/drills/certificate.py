"""What came of a drill: one line a fault, and whether all passed.

Pure: knows no process and no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One fault, or one kind of fault tried `times` times. `problem` is None where all went as it must; `skipped` says
    why it was not tried at all. `noticed`: how the fault showed, in the words of the system; `after`: how many seconds
    after it struck; `steps_lost`: taken, and to be taken again. None: there is no such thing to tell."""

    fault: str
    times: int = 1
    noticed: str = ""
    problem: str | None = None
    skipped: str | None = None
    seconds: float = 0.0
    after: float | None = None
    steps_lost: int | None = None

    @property
    def verdict(self) -> str:
        if self.skipped is not None:
            return f"skipped: {self.skipped}"
        return "passed" if self.problem is None else f"FAILED: {self.problem}"


def all_passed(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed; what was skipped did not."""
    return all(finding.problem is None for finding in findings)


def render_certificate(findings: Sequence[Finding]) -> Table:
    """For the console."""
    table = Table(box=None, pad_edge=False)
    columns = {
        "fault": [finding.fault for finding in findings],
        "times": [str(finding.times) for finding in findings],
        "seconds": [f"{finding.seconds:.1f}" for finding in findings],
        "after": ["" if finding.after is None else f"{finding.after:.1f} s" for finding in findings],
        "steps lost": ["" if finding.steps_lost is None else str(finding.steps_lost) for finding in findings],
        "noticed": [finding.noticed for finding in findings],
        "verdict": [finding.verdict.partition("\n")[0] for finding in findings],
    }
    told = {title: cells for title, cells in columns.items() if any(cells)}
    for title in told:
        table.add_column(title, justify="left" if title in ("fault", "noticed", "verdict") else "right")
    for row in zip(*told.values(), strict=True):
        table.add_row(*map(escape, row))
    return table


def certificate_record(findings: Sequence[Finding]) -> dict[str, object]:
    """The same as JSON."""
    return {
        "passed": all_passed(findings),
        "findings": [
            {
                "fault": finding.fault,
                "times": finding.times,
                "seconds": round(finding.seconds, 3),
                "noticed": finding.noticed,
                "after_seconds": finding.after and round(finding.after, 3),
                "steps_lost": finding.steps_lost,
                "verdict": finding.verdict,
            }
            for finding in findings
        ],
    }
