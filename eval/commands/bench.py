"""`dlm bench`: how fast a model answers on this machine, against two baselines measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass

from decoding.config import LoadConfig
from dlm.cli import Command
from dlm.errors import ConfigError


@dataclass(frozen=True)
class BenchConfig(LoadConfig):
    """Settings of `dlm bench`.

    Args:
        prompt: what is answered.
        rows: answers that are written at a time.
        window: L, for ways that have a window.
        steps: S, for ways that have steps.
        max_tokens: longest answer, for ways that have a limit.
        rounds: how often everything is measured, after one round to warm up.
    """

    prompt: str = "Give three tips for staying healthy."
    rows: int = 1
    window: int = 256
    steps: int = 64
    max_tokens: int = 128
    rounds: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("rows", "window", "steps", "max_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def run(config: BenchConfig) -> int:
    """Measure and print."""
    import torch

    from decoding.row_maker import RowMaker
    from dlm.checkpoint import stored_positions
    from dlm.prepacking import prepack
    from eval.bench import Problem, as_causal, bench_table, standard_ways, time_ways

    positions = stored_positions(config.model)
    for name in ("window", "max_tokens"):
        size = getattr(config, name)
        if positions is not None and size > positions:
            raise ConfigError(f"{name} {size} is longer than the model's {positions} positions")
    model, tokenizer = config.load(prepacked=False)
    causal = as_causal(model)  # of weights that are not packed yet
    for each in (model, causal) if not config.accelerate else ():
        prepack(each)
    spec = model.spec
    ids = RowMaker(tokenizer, spec, spec.positions).prompt(config.prompt)
    if len(ids) + config.max_tokens > spec.positions or len(ids) >= config.window:
        raise ConfigError(f"the prompt has {len(ids)} tokens: too long for this window or this model")
    prompts = torch.tensor([ids] * config.rows, device=model.device)
    sizes = config.window, config.steps, config.max_tokens
    problem = Problem(model, prompts, spec.mask_token_id, spec.eos_token_id, *sizes)
    tokens = min(config.max_tokens, 64)
    ways = standard_ways(problem, causal, tokens)
    runs = time_ways(ways, config.rounds, model.device)
    print(
        f"{config.rows} answers behind {len(ids)} tokens, {model.dtype}, {model.device}, "
        f"{torch.get_num_threads()} threads; the autoregressive baseline writes {tokens} tokens, "
        "the others as many as they come to\n"
    )
    print(bench_table(runs, list(runs)[:2]))
    return 0


COMMAND = Command("measure how fast a model answers", BenchConfig, run)
