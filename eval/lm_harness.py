"""A masked diffusion model for lm-evaluation-harness: `generate_until`, and `loglikelihood` by a bound.

    python -m eval.lm_harness run --model dlm --model_args pretrained=DIR,decoder=conv --tasks gsm8k

This is `lm_eval` itself, with the model class registered under the name "dlm".
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from dlm.errors import ConfigError, DLMError, unknown_name
from dlm.progress import progress
from dlm.tokenizer import Message, template_name
from eval.variants import number, parse_decoders

logger = logging.getLogger("lm_eval.dlm")  # below the harness's own, which it makes visible

LIKELIHOODS = ("nelbo", "path")
"""Bounds on log-likelihoods, by name."""

DRAWS = 32
"""Model calls for each log-likelihood."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of tasks for the longest answer, in the harness's order of precedence."""


def _check_arguments(
    pretrained: str, likelihood: str, draws: int | str | None, unknown: Mapping[str, Any]
) -> None:
    """Refuse arguments of the model that are missing, unknown, or do not go together."""
    if not pretrained:
        raise ConfigError("model_args need pretrained=DIR")
    for name in unknown:
        if name not in ("max_batch_size", "trust_remote_code"):  # what the harness adds by itself
            raise unknown_name("model_args", name, list(inspect.signature(DLM.__init__).parameters)[1:-1])
    if str(unknown.get("trust_remote_code", False)).lower() not in ("false", "none", ""):
        logger.warning("trust_remote_code has no effect: code that lies beside a model is never run")
    if likelihood not in LIKELIHOODS:
        raise unknown_name("likelihood", likelihood, LIKELIHOODS)
    if likelihood == "path" and draws is not None:
        raise ConfigError("draws are for likelihood=nelbo; a path takes one call for each token")


def _whole(value: int | str, name: str, least: int = 0) -> int:
    """A whole number of at least `least`, as the harness gives it: a number or a text."""
    read = number(str(value), name)
    if not isinstance(read, int) or read < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value}")
    return read


@register_model("dlm")
class DLM(LM):  # type: ignore[misc]
    """A masked diffusion model.

    Args:
        pretrained: folder or hub id.
        decoder: name, or name(option=value;…), of the decoder; the checkpoint's own if empty.
        max_tokens: longest text, where the task does not say; on a canvas that grows. 0 for 256.
        window: tokens of prompt and answer together, for a fixed canvas.
        steps: denoising steps, on a fixed canvas; with a window and 0, the checkpoint's own.
        rate: tokens per model call; 0 for the default.
        likelihood: "nelbo", or "path" for the bound along the decoder's own order, one token a call.
        draws: model calls for each log-likelihood by the NELBO, by default 32. A continuation with no more
            maskings than that is exact; the standard error of the others falls with the root, and is logged.
        seed: of the noise.
        batch_size: rows per model call.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        dtype: type of the weights.
    """

    def __init__(
        self,
        pretrained: str = "",
        decoder: str = "",
        max_tokens: int | str = 0,
        window: int | str = 0,
        steps: int | str = 0,
        rate: float | str = 0,
        likelihood: str = "nelbo",
        draws: int | str | None = None,
        seed: int | str = 0,
        batch_size: int | str = 8,
        device: str | None = "auto",
        dtype: str = "auto",
        **unknown: Any,
    ) -> None:
        super().__init__()
        import torch

        from decoding.row_maker import RowMaker
        from decoding.sampler import Sampler
        from dlm.checkpoint import load_model
        from eval.variants import Variant

        _check_arguments(pretrained, likelihood, draws, unknown)
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # the harness asks for cuda:0 unless it is told otherwise
        self.model, self.tokenizer = load_model(pretrained, device or "auto", dtype, prepacked=True)
        self.sampler = Sampler(self.model, self.tokenizer)
        self.maker = RowMaker(self.tokenizer, self.sampler.spec)  # of texts of any length, which are cut here
        name, options = parse_decoders(str(decoder).replace(";", ","))[0]
        self.limit, self.likelihood = _whole(max_tokens, "max_tokens"), likelihood
        self.draws = DRAWS if draws is None else _whole(draws, "draws", 1)
        self.seed = int(number(str(seed), "seed"))
        self.rows = int(batch_size) if str(batch_size).isdecimal() else 8
        self.steps, self.window = _whole(steps, "steps"), _whole(window, "window")
        tokens_per_call = float(number(str(rate), "rate"))
        pace = {"rate": tokens_per_call} if tokens_per_call else {}
        self.variant = Variant(name, options, pace)
        self.fixed = self._fixed_canvas()
        self.sampler.plan(self.variant.request(**self.fixed))  # before the questions are read
        self._talks: dict[str, list[Message]] = {}
        self._warned: set[str] = set()

    def _fixed_canvas(self) -> dict[str, Any]:
        """Fields of a request for a fixed canvas; none where the canvas grows."""
        if not self.window and not self.steps:
            return {}
        if self.limit:
            raise ConfigError(
                "max_tokens is for a canvas that grows; a window, or steps, make it a fixed one"
            )
        return {"window": self.window or None, "steps": self.steps or None}

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer each context until one of its stop texts; the model's template stands around it.

        Neighbours that ask for the same, as those of a task do, share the model calls.
        """
        out: list[str] = []
        with progress(None, "generate_until", len(requests), unit="request", quiet=disable_tqdm) as bar:
            for (stops, size), group in itertools.groupby(requests, self._asked_for):
                contexts = [self._fitting(request.args[0]) for request in group]
                request = self.variant.request(**dict(size), stop=list(stops) or None)
                settings = {"seed": self.seed, "batch_size": self.rows}
                for answer in self.sampler.iter_generate(contexts, request=request, **settings):
                    out.append(answer.text)
                    bar.update()
        return out

    def _asked_for(self, request: Instance) -> tuple[tuple[str, ...], tuple[tuple[str, int | None], ...]]:
        """The stop texts and the size that a request asks for."""
        options = dict(request.args[1])
        stop = options.pop("until", None) or []
        stops = tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text)
        sizes = [options.pop(name) for name in LENGTHS if options.get(name) is not None]
        for name in (*options, *(LENGTHS[:1] if sizes and self.fixed else ())):
            self._ignored(name)
        if self.fixed:
            return stops, tuple(self.fixed.items())
        return stops, (("max_tokens", int(sizes[0]) if sizes else self.limit or 256),)

    def _ignored(self, name: str) -> None:
        """Say once that a task's option is not followed, and what decides in its place."""
        if name in self._warned:
            return
        self._warned.add(name)
        place = "the decoder's own options (model_args decoder=name(temperature=…)) decide"
        if name in ("max_length", *LENGTHS):
            place = "max_gen_toks, or window and steps among the model_args, decide"
        logger.warning("the task's %s is not followed: %s", name, place)

    def _fitting(self, context: str, room: int | None = None) -> str | list[Message]:
        """The prompt, cut from the left to `room` tokens; by default ¾ of the window or the model."""
        if room is None:
            positions = self.sampler.window if self.steps else self.sampler.spec.positions
            room = (self.window or positions) * 3 // 4
        talk = list(self._talks.get(context, ()))
        while len(talk) > 2 and len(self.maker.prompt(talk)) > room:
            first = 1 if talk[0]["role"] == "system" and len(talk) > 3 else 0
            del talk[first : first + 2]  # an example: a question and its answer
        excess = len(self.maker.prompt(talk or context)) - room
        if excess <= 0:
            return talk or context
        question = str(talk[-1]["content"]) if talk else context
        question = str(self.tokenizer.decode(self.maker.text(question)[excess:]))
        return [*talk[:-1], {**talk[-1], "content": question}] if talk else question

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """A bound on log p of each continuation as an answer, and whether it is what greedy filling writes.

        The model's template stands around the context, as in `generate_until`. The second is asked in one
        pass: all of the continuation masked, the likeliest token everywhere.
        """
        del disable_tqdm
        rows = [self._encoded(*request.args) for request in requests]
        results = self._bounds(rows, [_question_of(request) for request in requests])
        return [(-nats, greedy) for nats, greedy in results]

    def _bounds(
        self, rows: Sequence[tuple[list[int], list[int]]], questions: Sequence[str] | None = None
    ) -> list[tuple[float, bool]]:
        """Nats of each answer given its prompt, bounded from above, and whether greedy filling writes it.

        Rows of one question share their noise; by default, those of one prompt.
        """
        from eval.nelbo import bounds

        path = self.likelihood == "path"
        results = bounds(
            self.model, rows, 1 if path else self.draws, self.rows, self.seed, questions=questions
        )
        greedy = [bound.greedy for bound in results]
        if path:
            return list(zip(self._paths(rows), greedy, strict=True))
        errors = [bound.error for bound in results if bound.error != 0]  # NaN too: of a single draw
        logger.info("%d log-likelihoods, %d of them exact bounds", len(results), len(results) - len(errors))
        if errors:
            finite = [error for error in errors if not math.isnan(error)] or [math.nan]
            logger.info(
                "standard error of the others: %.3f nats in the mean, %.3f at most (draws=%d)",
                sum(finite) / len(finite), max(finite), self.draws,
            )  # fmt: skip
        return [(bound.nats, bound.greedy) for bound in results]

    def _paths(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Nats of each answer along the path of the decoder, on a canvas of its length."""
        from eval.path import path_costs

        order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
        totals = [0.0] * len(rows)
        for size, group in itertools.groupby(order, lambda i: len(rows[i][1])):
            if not size:
                continue
            indices, decoder = list(group), self.variant.request().decoder_for(self.sampler.spec)
            rate = 1.0 if decoder.reveal.paced else None
            plan = self.sampler.plan(decoder=decoder, max_tokens=size, rate=rate)
            subset = [rows[i] for i in indices]
            costs = path_costs(self.model, subset, plan, seed=self.seed, batch_size=self.rows)
            for i, cost in zip(indices, costs, strict=True):
                totals[i] = cost.total
        return totals

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer.

        An answer begins without the space that the harness puts before it. Without a context, or for models
        that were trained on plain text, both are cut apart where the context ends; spaces at its end belong
        to the continuation.
        """
        if context and template_name(self.tokenizer) != "plain":
            continuation_ids = self.maker.text(continuation.removeprefix(" ") or continuation)
            positions = self.sampler.spec.positions
            context_ids = self.maker.prompt(
                self._fitting(context, max(positions - len(continuation_ids), positions // 4))
            )
            return context_ids, self._scored_part(continuation_ids, positions - len(context_ids))
        space = len(context) - len(context.rstrip())
        context, continuation = (
            context[: len(context) - space],
            context[len(context) - space :] + continuation,
        )
        joined = self.maker.text(context + continuation)
        context_ids = self.maker.text(context) if context else [self.sampler.spec.eos_token_id]
        cut = joined[len(context_ids) :] if context and joined[: len(context_ids)] == context_ids else None
        continuation_ids = cut or self.maker.text(continuation)
        room = self.sampler.spec.positions - len(continuation_ids)
        return context_ids[-room:] if room > 0 else [], self._scored_part(
            continuation_ids, self.sampler.spec.positions
        )

    def _scored_part(self, answer: list[int], room: int) -> list[int]:
        """The part of an answer for which the model has room; said once, where that is not all of it.

        Raises:
            ConfigError: when there is no room at all.
        """
        if len(answer) > room:
            if room < 1:
                raise ConfigError(
                    f"a conversation is longer than the model's {self.sampler.spec.positions} positions, and "
                    "cannot be cut: give fewer examples (num_fewshot)"
                )
            if "continuation" not in self._warned:
                self._warned.add("continuation")
                logger.warning("a continuation of %d tokens is scored by its first %d", len(answer), room)
        return answer[:room]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """A bound on log p of whole texts; those longer than the model's positions, in pieces."""
        del disable_tqdm
        eos, room = [self.sampler.spec.eos_token_id], self.sampler.spec.positions - 1
        texts = [self.maker.text(request.args[0]) for request in requests]
        pieces = [
            (i, ids[begin : begin + room])
            for i, ids in enumerate(texts)
            for begin in range(0, len(ids), room)
        ]
        total = [0.0] * len(texts)
        for (i, _), (nats, _) in zip(pieces, self._bounds([(eos, ids) for _, ids in pieces]), strict=True):
            total[i] -= nats
        return total

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation: of one user's turn, system text first; else as the template has it.

        The sampler puts the template around it; conversations of several turns are known again by their text.

        Raises:
            ConfigError: for one that ends with the beginning of the answer.
        """
        del add_generation_prompt
        talk = [{"role": message["role"], "content": message["content"]} for message in chat_history]
        if not talk or talk[-1]["role"] != "user":
            raise ConfigError("the task begins the model's answer (gen_prefix), which is not supported")
        if [message["role"] for message in talk if message["role"] != "system"] == ["user"]:
            return "\n\n".join(message["content"] for message in talk)
        text = str(self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
        self._talks[text] = talk
        return text

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache."""
        return str(self.tokenizer.name_or_path)


def _question_of(request: Instance) -> str:
    """The key that choices of one question share: its document, or without one the context."""
    if not request.doc:
        return str(request.args[0])
    return json.dumps(request.doc, sort_keys=True, default=str)


def main(words: Sequence[str] | None = None) -> None:
    """Run `lm_eval` with the model registered."""
    from lm_eval.__main__ import cli_evaluate

    if words is not None:
        sys.argv = ["lm_eval", *words]
    try:
        cli_evaluate()
    except (DLMError, ValueError, KeyError) as error:
        print(f"lm_eval: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from error


if __name__ == "__main__":
    main()
