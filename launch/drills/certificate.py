"""What came of a drill: one line a fault, and whether all passed.

Pure: knows no process and no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One fault, or one kind of fault tried `times` times. `problem` is None where all went as it must; `skipped` says
    why it was not tried at all. `noticed`: how the fault showed, in the words of the system."""

    fault: str
    times: int = 1
    noticed: str = ""
    problem: str | None = None
    skipped: str | None = None
    seconds: float = 0.0

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
    for title in ("fault", "times", "seconds", "noticed", "verdict"):
        table.add_column(title, justify="right" if title in ("times", "seconds") else "left")
    for finding in findings:
        table.add_row(finding.fault, str(finding.times), f"{finding.seconds:.1f}", finding.noticed, finding.verdict)
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
                "verdict": finding.verdict,
            }
            for finding in findings
        ],
    }
