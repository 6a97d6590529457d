"""Verified prefix: an adapter drafts, its own base verifies; whether that pays on this machine.

The default models are adapters on a frozen autoregressive model, so that a verifier is at hand. A pair of
calls writes at least one token: the diffusion model (adapter on, bidirectional) scores the next K masks in
one call, a token is drawn for each of them from its own marginal, and the base (adapter off, causal, with its
keys and values) scores them all in a second call. Two rules say how many of the leftmost are taken:

- `speculate`: speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318). A token is
  taken with probability min(1, p/q), p the base's and q the draft's; the first that is not is drawn anew from
  the normalised positive part of p - q; if all are taken, the base adds one. The text has the *base's* law:
  the adapter gives speed alone, and nothing of what it has learnt.
- `adapt`: adaptive parallel decoding (APD, arXiv 2506.00413). The tokens are drawn again from the mixture
  p_draft^R p_base^(1-R) under the same Gumbel noise, and taken as far as both draws agree; the first always,
  since nothing that was drafted stands before it.

It pays where tokens per pair, times the time of one call of the base, exceed the time of a pair. Ways in the
table: the base alone with its cache, both rules, and the default decoder, also with keys and values reused;
one prompt at a time, all ways in turn on each. Relevance is the cosine of answer and reference in a sentence
encoder. Nats per token are those of the base, which favour what the base wrote.

    OMP_NUM_THREADS=1 python -m benchmarks.verified_prefix --model full-sft --data alpaca_eval.json
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from decoding.sampler import Sampler
from dlm.adapter_files import is_adapter
from dlm.backbone import load_causal_lm
from dlm.checkpoint import load_model
from dlm.errors import ConfigError
from dlm.origin import autoregressive_origin
from dlm.pretrained.names import located
from dlm.tokenizer import encode_prompt
from eval.relevance import Encoder
from eval.statistics import estimate
from eval.tasks import load_questions

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Law", torch.Generator], list[int]]
"""Drafted tokens [K], logits of the draft [K, V] and of the base [K + 1, V] -> the tokens to write."""


@dataclass(frozen=True)
class Law:
    """Distribution that tokens are drawn from, given logits.

    Attributes:
        temperature: 0 for the likeliest token.
        top_k: tokens that are left; 0 for all.
    """

    temperature: float = 1.0
    top_k: int = 0

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., V] -> [..., V] float32."""
        logits = logits.float()
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, best, 1.0)
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        return (logits / self.temperature).softmax(-1)


def gumbel(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Standard Gumbel noise: argmax(log p + noise) is drawn from p."""
    return -torch.empty(shape).exponential_(generator=generator).log()


def acceptance(base: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """[V] Probability min(1, p/q) that a drafted token is taken; 1 where q is 0, which is never drafted."""
    return torch.where(draft > 0, (base / draft.clamp_min(1e-30)).clamp(max=1.0), 1.0)


def residual(base: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """[V] Normalised positive part of p - q; p itself where that is nothing."""
    rest = (base - draft).clamp_min(0.0)
    return rest / rest.sum() if float(rest.sum()) > 0 else base


def speculate(
    tokens: torch.Tensor, draft: torch.Tensor, base: torch.Tensor, law: Law, generator: torch.Generator
) -> list[int]:
    """Tokens with the base's law: drafted ones, and one more of the base's; see `Rule`."""
    q, p = law.probabilities(draft), law.probabilities(base)
    out: list[int] = []
    for i, token in enumerate(tokens.tolist()):
        chance = float(acceptance(p[i], q[i])[token])
        if float(torch.rand((), generator=generator)) >= chance:
            return [*out, int(drawn(residual(p[i], q[i])[None], generator))]
        out.append(token)
    return [*out, int(drawn(p[-1:], generator))]


def drawn(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[N] a token from each row [N, V]."""
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def mixture(draft: torch.Tensor, base: torch.Tensor, share: float) -> torch.Tensor:
    """[..., V] logits of the normalised p_draft^R p_base^(1-R); R = `share` of the draft."""
    first, second = draft.float().log_softmax(-1), base.float().log_softmax(-1)
    if share in (0.0, 1.0):  # -inf times 0 is no number
        return first if share else second
    return share * first + (1 - share) * second


def adapt(share: float, noise: torch.Tensor | None = None) -> Rule:
    """APD's rule at a mixing weight R, as a `Rule`.

    Args:
        share: R, from 0 (the base decides) to 1 (every draft is taken).
        noise: [K, V] Gumbel noise that the tokens were drawn with; None where the temperature is 0.
    """

    def rule(
        tokens: torch.Tensor, draft: torch.Tensor, base: torch.Tensor, law: Law, generator: torch.Generator
    ) -> list[int]:
        del generator
        score = law.probabilities(mixture(draft, base[:-1], share)).log()
        again = (score if noise is None else score + noise).argmax(-1)
        agree = [True, *(tokens == again).tolist()[1:]]
        return list(itertools.compress(tokens.tolist(), itertools.takewhile(bool, agree)))

    return rule


class Drafter:
    """The diffusion model: logits of the masks behind a text.

    Args:
        model: a `MaskedDiffusionModel` whose adapter is merged.
        vocab: size of the base's vocabulary; what the diffusion model has beyond it is the mask.
        margin: further masks shown behind the drafted ones.
        reuse: keep keys and values of tokens whose surroundings have changed since; the draft is another one
            then, and the law that `speculate` has is not.
    """

    def __init__(self, model: Any, vocab: int, margin: int = 0, reuse: bool = True) -> None:
        self.model, self.vocab, self.margin, self.reuse = model, vocab, margin, reuse
        self.mask_id = int(model.config.mask_token_id)
        self._memory, self._computed = model.new_memory(), 0

    def restart(self) -> None:
        """Forget the last text."""
        self._memory, self._computed = self.model.new_memory(), 0

    def logits(self, text: Sequence[int], count: int) -> torch.Tensor:
        """[count, V] of the next tokens."""
        ids = torch.tensor([[*text, *[self.mask_id] * (count + self.margin)]])
        if not self.reuse:
            states = self.model.hidden(ids)[0, len(text) : len(text) + count]
            return self._scored(states)
        active = torch.arange(ids.shape[1])[None] >= self._computed
        states = self.model.partial_hidden(
            ids, active, torch.ones_like(active), self._memory, torch.tensor([0])
        )
        begin = len(text) - self._computed
        self._computed = len(text)
        return self._scored(states[begin : begin + count])

    def _scored(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.logits(states)
        return logits[:, : self.vocab].float()


class Verifier:
    """The base: a causal language model of transformers with keys and values of the text so far.

    Args:
        model: the causal model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.restart()

    def restart(self) -> None:
        """Forget the last text."""
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def logits(self, text: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens) + 1, V] of the tokens behind the text and of the one behind them.

        The text must begin with what it was before: keys and values of tokens that were not written go.
        """
        stored = self._cache.get_seq_length()
        kept = min(stored, len(text) - 1)
        if kept < stored:
            self._cache.crop(kept - stored)
        ids = torch.tensor([[*text[kept:], *tokens]])
        out = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=len(tokens) + 1)
        logits: torch.Tensor = out.logits[0]
        return logits.float()


@dataclass
class Writing:
    """A text and what it took.

    Attributes:
        ids: tokens of the answer, the end token among them.
        calls: pairs of calls, or calls of the one model.
        seconds: of the processor, which on one thread a busy machine changes little.
    """

    ids: list[int] = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0

    def add(self, tokens: Iterable[int], ends: frozenset[int], limit: int) -> bool:
        """Write tokens up to the end or the limit; returns whether the text is finished."""
        self.calls += 1
        for token in tokens:
            self.ids.append(token)
            if token in ends or len(self.ids) == limit:
                return True
        return False


@torch.inference_mode()
def write_verified(
    prompt: Sequence[int],
    drafter: Drafter,
    verifier: Verifier,
    *,
    share: float | None = None,
    law: Law = Law(),
    count: int = 8,
    ends: frozenset[int] = frozenset(),
    limit: int = 96,
    seed: int = 0,
) -> Writing:
    """One text by pairs of calls.

    Args:
        prompt: ids.
        drafter: of the drafts.
        verifier: of the base.
        share: R of APD's rule; None for speculative sampling.
        law: of the tokens, for both.
        count: K, tokens of a draft.
        ends: ids of end tokens.
        limit: longest text.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    drafter.restart()
    verifier.restart()
    rule: Rule = speculate
    begun, out, finished = time.process_time(), Writing(), False
    while not finished:
        text = [*prompt, *out.ids]
        draft = drafter.logits(text, count)
        chances = law.probabilities(draft)
        if share is None:
            tokens = drawn(chances, generator)
        else:
            noise = gumbel(draft.shape, generator) if law.temperature else None
            rule = adapt(share, noise)
            tokens = (chances.log() if noise is None else chances.log() + noise).argmax(-1)
        base = verifier.logits(text, tokens.tolist())
        finished = out.add(rule(tokens, draft, base, law, generator), ends, limit)
    out.seconds = time.process_time() - begun
    return out


@torch.inference_mode()
def write_alone(
    prompt: Sequence[int],
    verifier: Verifier,
    *,
    law: Law = Law(),
    ends: frozenset[int] = frozenset(),
    limit: int = 96,
    seed: int = 0,
) -> Writing:
    """One text of the base alone, a token a call, with its cache; see `write_verified`."""
    generator = torch.Generator().manual_seed(seed)
    verifier.restart()
    begun, out, finished = time.process_time(), Writing(), False
    while not finished:
        logits = verifier.logits([*prompt, *out.ids], [])
        finished = out.add(drawn(law.probabilities(logits), generator).tolist(), ends, limit)
    out.seconds = time.process_time() - begun
    return out


def base_for(path: str) -> str:
    """The autoregressive base that a model is an adapter on.

    Raises:
        ConfigError: for a model that is no adapter, or on a base that is not autoregressive.
    """
    base = autoregressive_origin(path) if is_adapter(located(path)) else ""
    if not base:
        raise ConfigError(
            f"{path} has no verifier: only an adapter on an autoregressive model has one, such as default"
        )
    return base


@dataclass(frozen=True)
class Bench:
    """Models and prompts of all ways of writing.

    Attributes:
        prompts: ids of each.
        drafter: the diffusion model.
        verifier: its base.
        ends: ids of end tokens.
        limit: longest answer.
    """

    prompts: list[list[int]]
    drafter: Drafter
    verifier: Verifier
    ends: frozenset[int]
    limit: int

    def ways(
        self, law: Law, counts: Sequence[int], shares: Sequence[float]
    ) -> dict[str, Callable[[list[int]], Writing]]:
        """The base alone; for drafts of each length speculative sampling, and APD at each R; by name."""
        common: dict[str, Any] = {"law": law, "ends": self.ends, "limit": self.limit}

        def verified(count: int, share: float | None) -> Callable[[list[int]], Writing]:
            return lambda prompt: write_verified(
                prompt, self.drafter, self.verifier, share=share, count=count, **common
            )

        out = {"base alone, cache": lambda prompt: write_alone(prompt, self.verifier, **common)}
        for count in counts:
            out[f"speculative, K = {count}"] = verified(count, None)
            out |= {f"APD, K = {count}, R = {share:g}": verified(count, share) for share in shares}
        return out

    @torch.inference_mode()
    def nats(self, writings: Sequence[Writing]) -> float:
        """Mean nats per token of the texts under the base."""
        total, tokens = 0.0, 0
        for prompt, writing in zip(self.prompts, writings, strict=True):
            self.verifier.restart()
            logp = self.verifier.logits(prompt, writing.ids)[:-1].log_softmax(-1)
            total -= float(logp.gather(1, torch.tensor(writing.ids)[:, None]).sum())
            tokens += len(writing.ids)
        return total / tokens


@dataclass
class Judged:
    """Lines of the table; the first is the base alone, whose speed the others are divided by."""

    bench: Bench
    tokenizer: Any
    references: list[str]
    encoder: Any
    alone: float = 0.0

    def row(self, name: str, writings: Sequence[Writing]) -> str:
        """A line, of the texts of all prompts."""
        tokens, calls = sum(len(w.ids) for w in writings), sum(w.calls for w in writings)
        speed = tokens / sum(w.seconds for w in writings)
        self.alone = self.alone or speed
        texts = [self.tokenizer.decode(w.ids, skip_special_tokens=True) for w in writings]
        relevance = estimate(self.encoder.relevance(texts, self.references))
        cells = [name, f"{tokens / len(writings):.1f}", f"{tokens / calls:.2f}", f"{speed:.1f}"]
        cells += [f"{speed / self.alone:.2f}", f"{self.bench.nats(writings):.2f}"]
        cells += [f"{relevance.mean:.3f} ± {relevance.high - relevance.mean:.3f}"]
        return "| " + " | ".join(cells) + " |"


HEAD = "| | tokens | per call or pair | tokens/s | × base | nats/token | relevance |\n" + "|---" * 7 + "|"


def decoded(sampler: Any, talk: Any, limit: int, **options: Any) -> Writing:
    """An answer of the default decoder."""
    begun = time.process_time()
    answer = sampler.generate(talk, max_tokens=limit, seed=0, **options)
    end = [sampler.tokenizer.eos_token_id] if answer.finish_reason == "stop" else []
    return Writing([*answer.token_ids, *end], answer.model_calls, time.process_time() - begun)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="full-sft")
    parser.add_argument("--data", default="", help="questions of AlpacaEval; by default the original")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--counts", type=int, nargs="*", default=[4], help="tokens of a draft, K")
    parser.add_argument("--margin", type=int, default=0, help="further masks shown behind a draft")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.3, 0.7])
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--exact-draft", action="store_true", help="no keys and values kept for drafts")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    asked = arguments(argv)
    path = base_for(asked.model)
    model, tokenizer = load_model(asked.model, "cpu")
    base = load_causal_lm(path, model.dtype)[0].eval()
    questions = load_questions("alpaca_eval", asked.data)
    questions = questions[:: max(len(questions) // asked.limit, 1)][: asked.limit]
    talks = [question.opening for question in questions]
    drafter = Drafter(model, base.config.vocab_size, asked.margin, reuse=not asked.exact_draft)
    bench = Bench(
        [encode_prompt(tokenizer, talk) for talk in talks], drafter, Verifier(base),
        frozenset(model.spec.end_token_ids), asked.max_tokens,
    )  # fmt: skip
    judged = Judged(bench, tokenizer, [question.reference[0] for question in questions], Encoder())
    print(f"{asked.model}, {model.dtype}, {len(talks)} prompts\n\n{HEAD}")
    ways = {
        f"T = {temperature:g}: {name}": way
        for temperature in asked.temperatures
        for name, way in bench.ways(Law(temperature, asked.top_k), asked.counts, asked.shares).items()
    }
    sampler, reuses = Sampler(model, tokenizer), {"default decoder": None, "default decoder, reuse": "dual"}
    texts: dict[str, list[Writing]] = {name: [] for name in (*ways, *reuses)}
    for number in (0, *range(len(talks))):  # the first one twice: to warm up
        for name, way in ways.items():
            texts[name].append(way(bench.prompts[number]))
        for name, reuse in reuses.items():
            texts[name].append(decoded(sampler, talks[number], asked.max_tokens, reuse=reuse))
    for name, writings in texts.items():
        print(judged.row(name, writings[1:]))


if __name__ == "__main__":
    main()
