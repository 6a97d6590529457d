"""Measuring decoding: ways to write the same answers, timed in turn, against named baselines.

Two baselines. `published_loop` does what the published decoders do, as far as speed goes: logits of the whole
window, a softmax over the whole vocabulary, and a model call in each of the S steps. `Autoregressive` is
`generate` of transformers with its key/value cache, on the same backbone made causal again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from decoding.canvas import Row, make_canvas
from decoding.presets import Decoder
from decoding.request import Request
from decoding.step import denoise
from decoding.window import Convolution


def now(device: torch.device | str = "cpu") -> float:
    """Seconds of a clock, after a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Timed:
    """A model whose forward passes and LM head are timed and counted."""

    model: Any
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "head": 0.0})
    calls: int = 0
    positions: int = 0
    """Positions that went through the forward pass."""

    def __post_init__(self) -> None:
        """Stand in for the model."""
        self.spec, self.device = self.model.spec, self.model.device
        self.capabilities: frozenset[str] = self.model.capabilities

    def _time(self, name: str, call: Callable[[], torch.Tensor], positions: int = 0) -> torch.Tensor:
        begun = now(self.device)
        out = call()
        self.seconds[name] += now(self.device) - begun
        self.calls += name == "forward"
        self.positions += positions
        return out

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **records: Any
    ) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        return self._time(
            "forward", lambda: self.model.hidden(input_ids, attention_mask, **records), input_ids.numel()
        )

    def packed_hidden(self, input_ids: torch.Tensor, lengths: Sequence[int], **records: Any) -> torch.Tensor:
        """[N] -> [N, D]; shadows count as positions."""
        shadows = sum(len(shadow.rows) for shadow in records.get("shadows", ()))
        count = len(input_ids) + shadows * (1 + self.spec.shift)
        return self._time("forward", lambda: self.model.packed_hidden(input_ids, lengths, **records), count)

    def new_memory(self) -> Any:
        """See `MaskedDiffusionModel`."""
        return self.model.new_memory()

    def partial_hidden(
        self, input_ids: torch.Tensor, active: torch.Tensor, *rest: Any, **records: Any
    ) -> torch.Tensor:
        """[B, L] -> [N, D]."""
        count = int(active.sum())
        return self._time(
            "forward", lambda: self.model.partial_hidden(input_ids, active, *rest, **records), count
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V]."""
        return self._time("head", lambda: self.model.logits(hidden))


@torch.inference_mode()
def published_loop(
    model: Any, ids: torch.Tensor, mask_id: int, steps: int, kernel_size: int, top_k: int, seed: int = 0
) -> torch.Tensor:
    """Convolutional ancestral sampling without any saving; the baseline, and not a part of the product.

    Args:
        model: with `hidden` and `logits`.
        ids: [B, L] int64, the mask token where something is to be written.
        mask_id: id of the mask token.
        steps: S.
        kernel_size: K.
        top_k: k.
        seed: of torch's own generator.

    Returns:
        [B, L] int64.
    """
    generator = torch.Generator(ids.device).manual_seed(seed)
    window, ids = Convolution(kernel_size), ids.clone()
    for step in range(steps + 1):
        t, s = 1 - step / steps, max(0.0, 1 - (step + 1) / steps)
        masked = ids == mask_id
        probability = model.logits(model.hidden(ids)).float().softmax(-1)  # [B, L, V]
        best = probability.topk(top_k, dim=-1)
        mass = best.values.sum(-1)
        share = torch.where(masked, window.weights(~masked) * mass, 0.0)
        a = (t - s) * share * masked.sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp(min=1e-30)
        chance = torch.where(a > 0, a / (a + s), 0.0) if step < steps else masked.float()
        reveal = masked & (torch.rand(ids.shape, generator=generator, device=ids.device) < chance)
        index = torch.multinomial(best.values.flatten(0, 1), 1, generator=generator).view(ids.shape)
        token = best.indices.gather(-1, index[..., None])[..., 0]
        ids = torch.where(reveal, token, ids)
    return ids


@dataclass(frozen=True)
class Run:
    """Measurements of one way of writing."""

    seconds: float
    tokens: int
    """Tokens of the answers, without their ends and what stands behind."""
    calls: float
    """Model calls, the mean of the rows."""


@dataclass(frozen=True)
class Way:
    """A way to write answers to given prompts."""

    name: str
    write: Callable[[int], tuple[int, float]]
    """Seed -> tokens and calls."""


@dataclass(frozen=True)
class Problem:
    """A problem: answers to prompts of one length.

    Attributes:
        model: a masked diffusion model.
        prompts: [B, n] int64.
        mask_id: id of the mask token.
        eos_id: id of the end token.
        window: L, for ways that have a window.
        steps: S, for ways that have steps.
        limit: longest answer, for ways that have a limit.
    """

    model: Any
    prompts: torch.Tensor
    mask_id: int
    eos_id: int
    window: int = 512
    steps: int = 64
    limit: int = 256

    def rows(self, room: int) -> torch.Tensor:
        """[B, n + room] the prompts and masks."""
        masks = torch.full((len(self.prompts), room), self.mask_id, device=self.prompts.device)
        return torch.cat([self.prompts, masks], dim=1)

    def length(self, ids: torch.Tensor) -> int:
        """Tokens of the answers [B, L], up to their ends."""
        answers = ids[:, self.prompts.shape[1] :]
        ended = (answers == self.eos_id).int()
        first = torch.where(ended.any(1), ended.argmax(1), answers.shape[1])
        return int(first.sum())

    def plain(self, kernel_size: int, top_k: int = 20) -> Way:
        """The published loop, see `published_loop`."""

        def write(seed: int) -> tuple[int, float]:
            ids = self.rows(self.window - self.prompts.shape[1])
            out = published_loop(self.model, ids, self.mask_id, self.steps, kernel_size, top_k, seed)
            return self.length(out), self.steps + 1

        return Way(f"plain, L={self.window}, S={self.steps}", write)

    def ours(self, name: str, request: Request) -> Way:
        """The denoising loop of `decoding.step`, by a request."""
        plan = request.resolve(self.model)

        @torch.inference_mode()
        def write(seed: int) -> tuple[int, float]:
            n = self.prompts.shape[1]
            room = min(plan.tokens, plan.positions - n)
            rows = [Row(prompt + [plan.mask_id] * room, n) for prompt in self.prompts.cpu().tolist()]
            canvas = make_canvas(rows, [1000 * seed + i for i in range(len(rows))], plan)
            for _ in denoise(self.model, canvas, plan):
                pass
            return self.length(canvas.ids), float(canvas.model_calls.float().mean())

        return Way(name, write)

    def autoregressive(self, causal: Any, tokens: int) -> Way:
        """`generate` of transformers: so many tokens, one a call, with a key/value cache."""

        @torch.inference_mode()
        def write(seed: int) -> tuple[int, float]:
            del seed
            causal.generate(
                self.prompts, attention_mask=torch.ones_like(self.prompts), do_sample=False,
                max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=self.eos_id,
            )  # fmt: skip
            return tokens * len(self.prompts), tokens

        return Way("autoregressive, cache", write)


def standard_ways(problem: Problem, causal: Any, tokens: int) -> list[Way]:
    """The baselines, and ours from exact to fast.

    With steps, `conv` has the paper's kernel, a quarter of the window; length-free, one of 33.

    Args:
        problem: what is written.
        causal: the autoregressive model.
        tokens: that it writes in each answer.
    """
    quarter = problem.window // 4 // 2 * 2 + 1
    fixed = Request(
        decoder=Decoder.named("conv", kernel_size=quarter), window=problem.window, steps=problem.steps
    )
    free = Request(decoder=Decoder.named("conv", kernel_size=33), max_tokens=problem.limit)
    return [
        problem.plain(quarter),
        problem.autoregressive(causal, tokens),
        problem.ours("steps, exact", fixed),
        problem.ours("steps, canvas growing", replace(fixed, canvas="growing")),
        problem.ours("steps, canvas growing, reuse", replace(fixed, canvas="growing", reuse="dual")),
        *(
            problem.ours(f"length-free, rate {rate:g}{suffix}", replace(free, rate=rate, reuse=reuse))
            for rate in (1.0, 2.0, 4.0)
            for suffix, reuse in (("", None), (", reuse", "dual"))
        ),
    ]


def as_causal(model: Any) -> Any:
    """The model's backbone as a causal language model of transformers, with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {k: v for k, v in model.config.backbone.items() if k not in ("is_causal", "vocab_size")}
    config = AutoConfig.for_model(**shape, vocab_size=model.config.vocab_size)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
    causal = causal.to_empty(device=model.device).to(model.dtype)
    causal.model.load_state_dict(model.backbone.state_dict())
    causal.lm_head.weight = torch.nn.Parameter(copy.deepcopy(model.lm_head.weight.detach()))
    causal.model.rotary_emb = copy.deepcopy(model.backbone.rotary_emb)  # its buffers are not in the state
    return causal.eval()


def time_ways(ways: Sequence[Way], rounds: int, device: torch.device | str = "cpu") -> dict[str, list[Run]]:
    """Let all ways write, in turn, so many rounds, after one round to warm up."""
    runs: dict[str, list[Run]] = {way.name: [] for way in ways}
    for seed in range(rounds + 1):
        for way in ways:
            begun = now(device)
            tokens, calls = way.write(seed)
            runs[way.name].append(Run(now(device) - begun, tokens, calls))
    return {name: runs_of_way[1:] for name, runs_of_way in runs.items()}


def bench_table(runs: dict[str, list[Run]], baselines: Sequence[str]) -> str:
    """Medians and, for each baseline, the median of the ratios of tokens per second, as a Markdown table."""
    heads = ["", "seconds", "tokens", "calls", "tokens/s", *(f"× {name}" for name in baselines)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, runs_of_way in runs.items():
        speed = [run.tokens / run.seconds for run in runs_of_way]
        ratios = [
            median(a / (b.tokens / b.seconds) for a, b in zip(speed, runs[base], strict=True) if b.tokens)
            for base in baselines
        ]
        cells = [
            name,
            f"{median(run.seconds for run in runs_of_way):.2f}",
            f"{median(run.tokens for run in runs_of_way):.0f}",
            f"{median(run.calls for run in runs_of_way):.1f}",
            f"{median(speed):.1f}",
            *(f"{ratio:.2f}" for ratio in ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
