"""`dlm encode`: rows as token ids in one file, for machines without `datasets` or a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dlm.cli import Command
from dlm.errors import ConfigError


@dataclass(frozen=True)
class EncodeConfig:
    """Settings of `dlm encode`.

    Args:
        source: rows, as for dlm train --data.source.
        model: whose tokenizer encodes them: what dlm train --model.init will be given.
        template: chat template, as for dlm train --model.template; by default chatml, or a checkpoint's own.
        window: longest row in tokens; longer ones are cut.
        limit: only the first so many rows; 0 for all.
        output: file to write, such as rows.npz.
    """

    source: str = "tatsu-lab/alpaca"
    model: str = "smollm2-135m-instruct"
    template: str | None = None
    window: int = 256
    limit: int = 0
    output: str = "rows.npz"

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.window < 2:
            raise ConfigError(f"window must be at least 2, got {self.window}")
        if self.limit < 0:
            raise ConfigError(f"limit must not be negative (0 for all rows), got {self.limit}")


def run(config: EncodeConfig) -> int:
    """Encode the rows as a run with this model and window would, write them, and say what was left out."""
    from dlm.checkpoint import load_tokenizer
    from dlm.data.encode import encode_rows
    from dlm.data.encoded import ENCODED_SUFFIX, EncodedRows
    from dlm.data.rows import load_rows
    from dlm.data.rules import rule_rows
    from dlm.lock import check_writable

    if not config.output.endswith(ENCODED_SUFFIX):
        raise ConfigError(f"output must end in {ENCODED_SUFFIX}, got {config.output!r}")
    if Path(config.output).is_dir():
        raise ConfigError(f"{config.output} is a folder; give the name of a file")
    check_writable(Path(config.output).parent)
    tokenizer = load_tokenizer(config.model, config.template or "")
    rows = rule_rows(20_000) if config.source == "rules" else load_rows(config.source)
    rows = rows.select(range(min(config.limit, len(rows)))) if config.limit else rows
    encoded, report = encode_rows(rows, tokenizer, config.window)
    EncodedRows.of(encoded, tokenizer, config.window).save(config.output)
    print(f"{config.output}: {report}")
    return 0


COMMAND = Command("write rows as token ids, for machines without a network", EncodeConfig, run)
