"""`dlm eval report`: tables and plots of runs, as Markdown and as one page of HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dlm.cli import Command
from dlm.errors import ConfigError


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `dlm eval report`.

    Args:
        runs: folders of runs, or folders that hold them (the words that are no options).
        output: folder of the report.
        title: of the report.
        texts: questions whose answers are shown side by side.
        ldw: figures that `dlm inspect ldw` wrote (.json).
        against: decoders and systems with which everything is compared, such as "conv,smollm2"; by default
            the first run of the same pace, and of the same label.
    """

    runs: list[str] = field(default_factory=list)
    output: str = "runs/report"
    title: str = "Evaluation"
    texts: int = 8
    ldw: str = ""
    against: str = ""

    def __post_init__(self) -> None:
        """Check that there is something to report."""
        if not self.runs:
            raise ConfigError("name the folders of runs, such as runs/eval")
        if self.texts < 0:
            raise ConfigError(f"texts must not be negative, got {self.texts}")
        if self.ldw and not Path(self.ldw).is_file():
            raise ConfigError(f"ldw: no such file as {self.ldw}")


def run(config: ReportConfig) -> int:
    """Write the report, and say where."""
    from dlm.lock import alone_in, check_writable
    from eval.report.report import find_runs, write_report

    check_writable(config.output)
    against = [name.strip() for name in config.against.split(",") if name.strip()]
    runs = find_runs(config.runs)
    with alone_in(config.output):
        files = write_report(runs, Path(config.output), config.title, config.texts, config.ldw, against)
    print(*files, sep="\n")
    return 0


COMMAND = Command("write a report of runs: Markdown, HTML, plots", ReportConfig, run, positional="runs")
