"""The cost of an R2FT step: one forward pass for both sides against two, and the making of negatives.

The baseline computes the same loss with a forward pass for the true tokens and another for the negative's, as
the published code does. Both are measured in turn in one run; medians and the ratio are printed.

    python -m benchmarks.r2ft [--rounds 5]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from statistics import median

import torch
from datasets import disable_progress_bars

from benchmarks.training import BATCH, WINDOW, new_model, now
from dlm.data.config import DataConfig
from dlm.data.encode import encode_rows
from dlm.data.rules import rule_rows
from dlm.data.windows import TensorBatch
from dlm.model import IGNORE
from dlm.tokenizer import train_tokenizer
from finetune.config import R2FTConfig, StartConfig
from finetune.r2ft import R2FT, R2FTTrainer, r2ft_loss
from finetune.run import build_trainer


def one_pass(trainer: R2FTTrainer, batch: TensorBatch) -> torch.Tensor:
    """Ours."""
    return trainer.rows(trainer.model, batch)[0].mean()


def two_passes(trainer: R2FTTrainer, batch: TensorBatch) -> torch.Tensor:
    """The same loss, each side with a forward pass of its own."""
    sums = []
    for targets in batch["candidates"].unbind(-1):
        cells = targets != IGNORE
        out = trainer.model(
            input_ids=batch["noisy_ids"], attention_mask=batch["attention_mask"], targets=targets
        )
        logp = torch.zeros(cells.shape, device=cells.device).masked_scatter(cells, out.token_logp)
        sums += [logp.sum(1), cells.sum(1)]
    return r2ft_loss(*sums)


def step(
    trainer: R2FTTrainer, batch: TensorBatch, loss: Callable[[R2FTTrainer, TensorBatch], torch.Tensor]
) -> float:
    """Seconds of a forward and backward pass."""
    begun = now()
    loss(trainer, batch).backward()
    trainer.model.zero_grad()
    return now() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bars()
    source = rule_rows(4000)
    tokenizer = train_tokenizer((row["answer"] for row in source), 4096)
    rows, _ = encode_rows(source, tokenizer, WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        config = R2FTConfig(
            output_dir=folder,
            model=StartConfig(init="a fresh model"),
            data=DataConfig(window=WINDOW),
            per_device_train_batch_size=BATCH,
            precision="fp32",
            report_to="none",
            trainer={"disable_tqdm": True},
        )
        trainer = build_trainer(R2FT(config), new_model(tokenizer), tokenizer, rows, None)
    assert isinstance(trainer, R2FTTrainer)
    measure(trainer, options.rounds)


def measure(trainer: R2FTTrainer, rounds: int) -> None:
    """Print medians and ratios of both comparisons."""
    assert trainer.train_dataset is not None
    device = trainer.args.device
    rows = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    batch = {name: x.to(device) for name, x in rows.items()}
    slots = torch.arange(BATCH, device=device)
    noised = trainer.with_noise(batch, slots, BATCH, 0)
    same = abs(float(one_pass(trainer, noised)) - float(two_passes(trainer, noised)))
    times: dict[str, list[float]] = {"one pass": [], "two passes": []}
    for _ in range(rounds):
        times["one pass"].append(step(trainer, noised, one_pass))
        times["two passes"].append(step(trainer, noised, two_passes))
    threads = torch.get_num_threads()
    print(f"R2FT, batch {BATCH} × {WINDOW}, fp32, {threads} threads; losses differ by {same:.1e}")
    for name, values in times.items():
        print(f"  {name:<11} {1000 * median(values):7.0f} ms per step, forward and backward")
    ratios = [b / a for a, b in zip(times["one pass"], times["two passes"], strict=True)]
    print(f"  ratio two passes / one pass: {median(ratios):.2f}")
    negatives = []
    for i in range(20 * rounds):
        begun = now()
        trainer.with_noise(batch, slots, BATCH, i)
        negatives.append(now() - begun)
    share = median(negatives) / median(times["one pass"])
    print(
        f"  making the negatives: {1000 * median(negatives):.1f} ms per batch, {100 * share:.1f} % of a step"
    )


if __name__ == "__main__":
    main()
