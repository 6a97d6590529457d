"""Diagnosis of the long decoding-window problem (arXiv 2509.15188, figures 3 and 11).

Far from the context a masked diffusion model does not know what to write, and puts its probability on
tokens that are frequent everywhere and on tokens that it has just seen. Both are measured here on a fresh
canvas, the prompt followed by masks, as functions of the distance from the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch.distributions import Categorical
from transformers import PreTrainedTokenizerBase

from decoding.row_maker import Prompt
from dlm.curves import BLUE, GREEN, ORANGE, PINK, RED, without_frame
from dlm.errors import ConfigError
from dlm.prior import TokenPrior
from dlm.spec import ModelSpec
from dlm.tokenizer import as_messages, encode_prompt, encode_text

TokenKind = Literal["prompt", "frequent", "end", "other"]
"""Kinds of candidate: a token of the prompt, one of the frequent ones, the end token, or neither."""


@dataclass(frozen=True)
class DecodingWindow:
    """A model's probability on a fresh canvas, by distance from the prompt; all [L]."""

    frequent: torch.Tensor
    """Mean probability mass on the most frequent tokens of the training answers."""
    prompt: torch.Tensor
    """Mean mass on the tokens of the prompt's messages (some of them may be frequent ones too)."""
    end: torch.Tensor
    """Mean probability of the tokens that end an answer."""
    entropy: torch.Tensor
    """Mean entropy of the token, in nats: how far a draw strays from the likeliest tokens."""
    rows: torch.Tensor
    """int64, prompts that have a position at this distance."""

    @property
    def shared(self) -> int:
        """Distances that every prompt has: beyond them the means are over other prompts at each."""
        return int((self.rows == self.rows[0]).sum())

    def as_dict(self) -> dict[str, list[float]]:
        """Plain lists, for JSON."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}


@dataclass(frozen=True)
class Candidate:
    """One of the likeliest tokens at a position."""

    text: str
    probability: float
    kind: TokenKind


def decoding_window(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    prior: TokenPrior,
    *,
    window: int,
    top: int = 100,
) -> DecodingWindow:
    """Mean mass on frequent tokens and on prompt tokens, and entropy, at each distance from the prompt.

    Args:
        model: a masked diffusion model.
        tokenizer: its tokenizer.
        prompts: texts or conversations; those that fill the window are an error.
        prior: token counts of the training answers.
        window: L, prompt and answer together.
        top: how many tokens count as frequent.
    """
    frequent, end = prior.top(top), sorted(ModelSpec.of(model).end_token_ids)
    sums, rows = torch.zeros(4, window, dtype=torch.float64), torch.zeros(window, dtype=torch.int64)
    for prompt in prompts:
        logits = _fresh(model, tokenizer, prompt, window)  # [n, V]
        total = logits.logsumexp(1)
        prompt_tokens = list(_said(tokenizer, prompt))
        for i, group in enumerate((frequent.tolist(), prompt_tokens, end)):
            mass = (logits[:, group].logsumexp(1) - total).exp() if group else torch.zeros_like(total)
            sums[i, : len(mass)] += mass.double().cpu()
        sums[3, : len(total)] += Categorical(logits=logits).entropy().double().cpu()
        rows[: len(total)] += 1
    reached = int((rows > 0).sum())
    if reached == 0:
        raise ConfigError("no prompt was given")
    mean = (sums[:, :reached] / rows[:reached]).float()
    frequent_mass, prompt_mass, end_mass, entropy = mean
    return DecodingWindow(frequent_mass, prompt_mass, end_mass, entropy, rows[:reached])


def candidates(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    prior: TokenPrior,
    *,
    window: int,
    top: int = 100,
    positions: int = 24,
    k: int = 5,
) -> list[list[Candidate]]:
    """The k likeliest tokens at the first positions behind the prompt: the candidate zone.

    Returns:
        One list of k candidates, the likeliest first, for each of at most `positions` distances.
    """
    frequent, prompt_tokens = set(prior.top(top).tolist()), _said(tokenizer, prompt)
    ends = ModelSpec.of(model).end_token_ids
    chance = _fresh(model, tokenizer, prompt, window)[:positions].softmax(1)
    probability, ids = chance.topk(min(k, chance.shape[1]), dim=1)

    def kind(token: int) -> TokenKind:
        if token in ends:
            return "end"
        return "prompt" if token in prompt_tokens else "frequent" if token in frequent else "other"

    return [
        [Candidate(tokenizer.decode([token]), p, kind(token)) for token, p in zip(row, chances, strict=True)]
        for row, chances in zip(ids.tolist(), probability.tolist(), strict=True)
    ]


def _fresh(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, window: int) -> torch.Tensor:
    """[n, V] float32 logits at the n masked positions of a canvas that holds the prompt only."""
    ids = encode_prompt(tokenizer, as_messages(prompt))
    spec = ModelSpec.of(model)
    if window > spec.positions:
        raise ConfigError(f"window {window} is longer than the model's {spec.positions} positions")
    if len(ids) >= window:
        raise ConfigError(f"a prompt has {len(ids)} tokens; the window must be at least {len(ids) + 1}")
    row = ids + [spec.mask_token_id] * (window - len(ids))
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([row], device=getattr(model, "device", "cpu")))
        return model.logits(hidden[0, len(ids) :]).float()  # type: ignore[no-any-return]


def _said(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> set[int]:
    """Ids of the tokens in the messages of a prompt; the template's own are not counted."""
    messages = as_messages(prompt)
    return {token for message in messages for token in encode_text(tokenizer, message["content"])}


_LINES: Sequence[tuple[str, Any]] = (
    (BLUE, "-"),
    (RED, "--"),
    (GREEN, "-."),
    (PINK, ":"),
    (ORANGE, (0, (5, 1))),
)
"""A colour and a line shape for each model, so that print and the colour-blind can tell them apart."""


def draw_decoding_windows(measured: dict[str, DecodingWindow], top: int = 100) -> Any:
    """Masses and entropy over distance, one line per model, as a matplotlib figure.

    A line ends where the first prompt has no position any more: prompts of different length leave different
    room, and a mean over others would jump.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.8), layout="constrained")
    panels = figure.subplots(1, 4, sharex=True)
    titles = {
        "frequent": f"mass on the {top} most frequent tokens",
        "prompt": "mass on tokens of the prompt",
        "end": "end token",
        "entropy": "entropy, nats",
    }
    for axes, (field, title) in zip(panels, titles.items(), strict=True):
        for i, (name, figures) in enumerate(measured.items()):
            colour, line = _LINES[i % len(_LINES)]
            masses = getattr(figures, field)[: figures.shared].tolist()
            label = f"{name} (n = {int(figures.rows[0])})"
            axes.plot(masses, linestyle=line, color=colour, linewidth=1.6, label=label)
        axes.set(xlabel="distance from the prompt, tokens", title=title)
        axes.set_ylim(bottom=0)
        without_frame(axes)
        axes.get_legend().remove()
    panels[0].set(ylabel="mean probability")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=len(measured), loc="outside upper center")
    return figure
