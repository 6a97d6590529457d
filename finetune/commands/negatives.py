"""`dlm inspect negatives`: look at the negatives that R2FT would be given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dlm.cli import Command
from dlm.data.config import DataConfig
from dlm.errors import ConfigError
from finetune.contrast_config import NegativeConfig

CONTEXT, TRUE, WRONG, SAME, END = (
    "dim",
    "#000000 on #56b4e9",
    "#000000 on #e69f00",
    "underline",
    "bold #ffffff on #a3241c",
)


@dataclass(frozen=True)
class NegativesConfig:
    """Settings of `dlm inspect negatives`.

    Args:
        model: checkpoint whose tokenizer, template and token counts are used (the word that is no option).
        data: where the rows come from.
        negatives: how negatives are made.
        rows: how many examples to show.
        seed: seed of the examples.
    """

    model: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    negatives: NegativeConfig = field(default_factory=NegativeConfig)
    rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the model and the number."""
        if not self.model:
            raise ConfigError("name a checkpoint: dlm inspect negatives runs/my-model --data.source …")
        if self.rows < 1:
            raise ConfigError(f"rows must be at least 1, got {self.rows}")


def run(config: NegativesConfig) -> int:
    """Print examples, true and wrong tokens in colour."""
    from rich.console import Console

    from dlm.noise import fold, key_of
    from finetune.negatives import RULES, make_negative

    tokenizer, batch, prior = _material(config)
    frequent = prior.top(config.negatives.frequent)
    contrast = make_negative(
        batch["input_ids"],
        batch["prompt_length"],
        batch["length"],
        fold(key_of(config.seed, "negative", 0), batch["row"]),
        mask_id=int(tokenizer.mask_token_id),
        eos_id=int(tokenizer.eos_token_id),
        frequent=frequent,
        frequent_counts=prior.counts[frequent],
        rules=config.negatives,
        real=batch["attention_mask"],
        blocks=_blocks(config.model),
    )
    console = Console(highlight=False, markup=False, emoji=False)
    for i in range(len(contrast.rule)):
        console.print(f"\n{i + 1}. rule: {list(RULES)[int(contrast.rule[i])]}", style="bold")
        console.print("true     ", _coloured_row(tokenizer, batch, contrast, i, wrong=False))
        console.print("negative ", _coloured_row(tokenizer, batch, contrast, i, wrong=True))
    console.print("\n", _colour_legend())
    return 0


def _blocks(model: str) -> Any:
    """Blocks of the model; None for full visibility."""
    from dlm.checkpoint import stored_spec
    from dlm.noising import Blocks

    spec = stored_spec(model)
    return None if spec is None else Blocks.of(spec)


def _material(config: NegativesConfig) -> tuple[Any, Any, Any]:
    """The checkpoint's tokenizer, a batch of rows in random order, and the token counts of all rows."""
    from dlm.checkpoint import is_causal_lm, load_tokenizer
    from dlm.data.encode import encode_rows
    from dlm.data.encoded import ENCODED_SUFFIX
    from dlm.errors import CheckpointError, DataError
    from dlm.prior import TokenPrior
    from finetune.run import collator, split_rows

    if is_causal_lm(config.model):
        raise CheckpointError(f"{config.model}: its tokenizer has no mask token; train it first (dlm train)")
    tokenizer = load_tokenizer(config.model)
    if config.data.source.endswith(ENCODED_SUFFIX):
        raise ConfigError(f"{config.data.source}: encoded rows; name those that they were made of")
    rows, _ = split_rows(config.data, config.seed)
    prior = TokenPrior.load(config.model)
    if prior is None:  # then all rows have to be counted
        everything, _ = encode_rows(rows, tokenizer, config.data.window)
        prior = TokenPrior.of(everything, len(tokenizer), tuple(tokenizer.all_special_ids))
    shown: list[Any] = []
    shuffled, size = rows.shuffle(seed=config.seed), 4 * config.rows
    for begin in range(0, len(rows), size):  # until there are enough that can be used
        try:
            part = shuffled.select(range(begin, min(begin + size, len(rows))))
            shown += encode_rows(part, tokenizer, config.data.window)[0]
        except DataError:  # none of this part
            continue
        if len(shown) >= config.rows:
            break
    if not shown:
        window = config.data.window
        raise DataError(f"none of the {len(rows)} rows can be used with a window of {window} tokens")
    shown = shown[: config.rows]
    numbered = [{**row, "row": i} for i, row in enumerate(shown)]
    return tokenizer, collator(config.data, tokenizer, config.seed)(numbered), prior


def _coloured_row(tokenizer: Any, batch: Any, contrast: Any, i: int, *, wrong: bool) -> Any:
    """A row as coloured text: the context, then the true or the wrong tokens of its masked cells."""
    from rich.text import Text

    from dlm.model import IGNORE

    text = Text()
    ids = batch["input_ids"][i].tolist()
    noisy, true, rejected = (x[i].tolist() for x in (contrast.noisy_ids, contrast.targets, contrast.rejected))
    eos = tokenizer.eos_token_id
    for place, token in enumerate(ids):
        style = ""
        if noisy[place] == token:
            style = CONTEXT
        elif wrong and rejected[place] != IGNORE:
            token = rejected[place]
            style = END if token == eos else WRONG
        elif true[place] != IGNORE:
            style = SAME if wrong else TRUE
        if style:
            text.append("⏎" if token == eos else tokenizer.decode([token]), style=style)
    return text


def _colour_legend() -> Any:
    from rich.text import Text

    text = Text()
    pairs = (
        ("context", CONTEXT),
        ("true", TRUE),
        ("negative", WRONG),
        ("early end", END),
        ("true, not rejected", SAME),
    )
    for name, style in pairs:
        text.append(f" {name} ", style=style).append("  ")
    return text


COMMAND = Command("show the negatives of R2FT in colour", NegativesConfig, run, positional="model")
