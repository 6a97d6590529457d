"""`dlm convert`: a public checkpoint in our layout, or one of ours in the public layout."""

from __future__ import annotations

from dataclasses import dataclass

from dlm.cli import Command
from dlm.errors import ConfigError


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of `dlm convert`.

    Args:
        model: folder or hub id, in either layout.
        output: folder to write.
    """

    model: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        """Check that both are named."""
        for name in ("model", "output"):
            if not getattr(self, name):
                raise ConfigError(
                    f"{name} must name a folder{' or hub id' if name == 'model' else ' to write'}"
                )


def run(config: ConvertConfig) -> int:
    """Write it, and say where."""
    from dlm.convert import convert

    print(convert(config.model, config.output))
    return 0


COMMAND = Command("write a public checkpoint in this toolkit's layout, or back", ConvertConfig, run)
