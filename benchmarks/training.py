"""Training speed: `DiffusionTrainer` against a bare PyTorch loop over the same backbone, in one run.

The bare loop is the least that trains the same objective: mask, forward, cross entropy at the masked answer
cells, backward, clipping, fused AdamW, on batches that lie ready in memory. The ratio says what the trainer
costs on top (reading and collating rows, counted noise, logging, callbacks). The two are measured in turn,
several times; medians and the ratio are printed.

    python -m benchmarks.training [--rounds 3] [--steps 20]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from dlm.backbone import ScratchConfig, from_scratch
from dlm.data.config import DataConfig
from dlm.data.encode import encode_rows
from dlm.data.rules import rule_rows
from dlm.data.windows import TensorBatch, WindowCollator
from dlm.model import MaskedDiffusionModel
from dlm.tokenizer import train_tokenizer
from finetune.config import TrainConfig
from finetune.run import build_trainer
from finetune.sft import SFT

SHAPE = ScratchConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024)
BATCH, WINDOW, WARMUP, VOCAB = 8, 128, 4, 16_384


class _Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Seconds between the end of the warm-up step and the end of the last."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append(now())

    @property
    def seconds(self) -> float:
        return self.marks[-1] - self.marks[WARMUP - 1]


def ours(model: MaskedDiffusionModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, steps: int) -> float:
    """Tokens per second of the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=folder,
            data=DataConfig(window=WINDOW),
            max_steps=steps + WARMUP,
            per_device_train_batch_size=BATCH,
            logging_steps=10,
            eval_steps=0,
            save_steps=10**9,
            precision="fp32",
            report_to="none",
            trainer={"disable_tqdm": True},
        )
        trainer = build_trainer(SFT(config), model, tokenizer, rows, None)
        watch = _Stopwatch()
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        setattr(trainer, "_save_checkpoint", lambda *_: None)  # noqa: B010 (the disk is not what is measured)
        trainer.train()
    return steps * BATCH * WINDOW / watch.seconds


def bare(model: MaskedDiffusionModel, batches: Iterator[TensorBatch], mask_id: int, steps: int) -> float:
    """Tokens per second of the least loop that trains."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    model.train()
    begun = 0.0
    for step in range(steps + WARMUP):
        if step == WARMUP:
            begun = now()
        batch = next(batches)
        ids, maskable, loss_mask = batch["input_ids"], batch["maskable"], batch["loss_mask"]
        t = torch.rand(len(ids), 1, device=ids.device).clamp(min=1e-3)
        masked = maskable & (torch.rand(ids.shape, device=ids.device) < t)
        hit = masked & loss_mask
        logits = model.logits(model.hidden(ids.masked_fill(masked, mask_id))[hit]).float()
        nats = F.cross_entropy(logits, ids[hit], reduction="none") / t.expand_as(hit)[hit]
        (nats.sum() / loss_mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return steps * BATCH * WINDOW / (now() - begun)


def now() -> float:
    """The clock, after the GPU (if there is one) has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _ready_batches(rows: Dataset, eos: int, device: str) -> Iterator[TensorBatch]:
    """The same rows as fixed windows, already in memory, for ever."""
    collate = WindowCollator(eos_token_id=eos, window=WINDOW)
    batches = [collate([rows[i + j] for j in range(BATCH)]) for i in range(0, 64 * BATCH, BATCH)]
    while True:
        yield from ({name: x.to(device) for name, x in batch.items()} for batch in batches)


def new_model(tokenizer: PreTrainedTokenizerBase) -> MaskedDiffusionModel:
    """The backbone of both loops; a vocabulary of ordinary size, though the rows use little of it."""
    config = from_scratch(SHAPE, tokenizer).config
    config.vocab_size = VOCAB
    return MaskedDiffusionModel(config)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu", help="where the bare loop runs")
    options = parser.parse_args()
    disable_progress_bars()
    source = rule_rows(4000)
    tokenizer = train_tokenizer((row["answer"] for row in source), 4096)
    rows, _ = encode_rows(source, tokenizer, WINDOW)
    speeds: dict[str, list[float]] = {"trainer": [], "bare loop": []}
    for _ in range(options.rounds):
        model = new_model(tokenizer).to(options.device)
        batches = _ready_batches(rows, tokenizer.eos_token_id, options.device)
        speeds["bare loop"].append(bare(model, batches, tokenizer.mask_token_id, options.steps))
        speeds["trainer"].append(ours(new_model(tokenizer), tokenizer, rows, options.steps))
    size = sum(p.numel() for p in new_model(tokenizer).parameters()) / 1e6
    print(
        f"training, {size:.1f}M parameters, batch {BATCH} × {WINDOW} tokens, fp32, "
        f"{torch.get_num_threads()} threads"
    )
    for name, values in speeds.items():
        print(f"  {name:<10} {median(values):8.0f} tokens/s (of {', '.join(f'{v:.0f}' for v in values)})")
    ratios = [a / b for a, b in zip(speeds["trainer"], speeds["bare loop"], strict=True)]
    print(f"  ratio trainer / bare loop: {median(ratios):.3f} (goal ≥ 0.9)")


if __name__ == "__main__":
    main()
