"""`dlm export`: a trained model made ready to be given away."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dlm.cli import Command, commands
from dlm.errors import ConfigError


@dataclass(frozen=True)
class ExportConfig:
    """Settings of `dlm export`.

    Args:
        model: folder of a checkpoint, or "default".
        output: folder to write.
        dtype: type of the weights.
        base: name that an adapter gives its base from now on, such as a hub id in place of a folder.
        merge: write an adapter merged into its base, as a model that stands alone.
        block_size: positions per block of a model in blocks from now on, at most its own.
        generation: new defaults of decoding, such as --generation.decoder entropy-bound
            --generation.options '{"kernel_size": 9}'; the others stay.
    """

    model: str = "default"
    output: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    base: str = ""
    merge: bool = False
    block_size: int | None = None
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that there is somewhere to write."""
        if not self.output:
            raise ConfigError("output must name the folder to write")
        self._check_generation()

    def _check_generation(self) -> None:
        """Refuse defaults that `dlm generate`, which is to follow them, would refuse."""
        from dlm.spec import DecodingDefaults

        wish = commands()["generate"].load().config  # decoding is not for this package to import
        DecodingDefaults.of(self.generation)
        settings = dict(self.generation)
        pair = ("decoder", "options")
        together: dict[str, Any] = {name: settings.pop(name) for name in pair if name in settings}
        parts = [together, *({name: value} for name, value in settings.items())]
        for part in parts:
            wish(**part).check_decoder()


def check_defaults(config: ExportConfig) -> None:
    """Refuse new defaults with which the model, keeping the others, would answer nothing.

    Also a canvas and a window that decoding would pass over, and blocks that are not for it.

    Raises:
        ConfigError: see `Request.resolve` and `ModelSpec.in_blocks_of`.
    """
    from dlm.checkpoint import stored_spec
    from dlm.export import merged_defaults
    from dlm.spec import DecodingDefaults

    spec = stored_spec(config.model)
    if spec is None:
        return
    spec = spec.in_blocks_of(config.block_size)
    if not config.generation:
        return
    stored = {name: value for name, value in vars(spec.defaults).items() if value is not None}
    merged = DecodingDefaults.of(merged_defaults(stored, config.generation))
    if config.generation.get("canvas") == "growing":
        raise ConfigError('canvas "growing" is no default: leave canvas out, or give "full"')
    window = config.generation.get("window")
    if window is not None and window > spec.positions:
        raise ConfigError(f"window must be at most the model's {spec.positions} positions, got {window}")
    commands()["generate"].load().config().resolve(replace(spec, defaults=merged))


def run(config: ExportConfig) -> int:
    """Write it, and say how large it is."""
    from dlm.export import export

    check_defaults(config)
    folder = export(
        config.model,
        config.output,
        dtype=config.dtype,
        base=config.base,
        merge=config.merge,
        block_size=config.block_size,
        generation=config.generation,
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    return 0


COMMAND = Command(
    "write a trained model smaller, for others: bfloat16, merged, no local paths", ExportConfig, run
)
