"""The bound on likelihood that a masked diffusion model gives: Monte-Carlo NELBO of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dlm.model import IGNORE
from dlm.trainer import add_eval_noise


@torch.inference_mode()
def nelbo(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], draws: int = 32, batch_size: int = 16
) -> list[float]:
    """-log p(answer | prompt), bounded from above (MDLM, arXiv 2406.07524).

    The mean over t of Σ_{i masked} -log p(x_i | x_t) / t.
    Noise levels of a row are evenly spaced over its draws; the noise depends on the row's number and the draw
    alone, as in the validation of training.

    Args:
        model: a masked diffusion model.
        rows: prompt and answer as ids; answers that end hold their end token.
        draws: noise levels for each row.
        batch_size: forward passes at a time.

    Returns:
        Nats of each answer, all its tokens together.
    """
    jobs = [(row, draw) for row in range(len(rows)) for draw in range(draws)]
    jobs.sort(key=lambda job: sum(map(len, rows[job[0]])))  # little padding
    total = torch.zeros(len(rows), dtype=torch.float64)
    for i in range(0, len(jobs), batch_size):
        some = jobs[i : i + batch_size]
        total.index_add_(0, torch.tensor([row for row, _ in some]), _nats(model, rows, some, draws))
    return (total / draws).tolist()


def _nats(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], jobs: Sequence[tuple[int, int]], draws: int
) -> torch.Tensor:
    """[n] float64, weighted negative log-likelihood of rows, each at one of its noise levels."""
    width = max(sum(map(len, rows[row])) for row, _ in jobs)
    mask_id = int(model.config.mask_token_id)
    noised: dict[str, list[torch.Tensor]] = {"noisy_ids": [], "targets": [], "t": [], "valid": []}
    for row, draw in jobs:
        prompt, answer = rows[row]
        n = len(prompt) + len(answer)
        ids = torch.tensor([prompt + answer + [0] * (width - n)])
        place = torch.arange(width)[None]
        maskable = (place >= len(prompt)) & (place < n)
        batch = {"input_ids": ids, "maskable": maskable, "loss_mask": maskable, "row": torch.tensor([row])}
        for name, value in add_eval_noise(batch, draw, draws, mask_id).items():
            if name in noised:
                noised[name].append(value)
        noised["valid"].append(place < n)
    one = {name: torch.cat(parts) for name, parts in noised.items()}
    cells = one["targets"] != IGNORE
    hidden = model.hidden(one["noisy_ids"], one["valid"])
    logp = torch.zeros(cells.shape, dtype=torch.float64)
    where = cells.nonzero().unbind(1)
    logits = model.logits(hidden[where]).float().log_softmax(-1).cpu()
    logp[where] = logits.gather(1, one["targets"][where][:, None])[:, 0].double()
    return -(logp / one["t"].double()[:, None]).sum(1)
