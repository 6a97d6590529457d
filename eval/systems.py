"""Systems that answer: a local diffusion model or autoregressive model, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from decoding.request import Plan, Request
from dlm.errors import CheckpointError, ConfigError, DLMError, how_to_install
from dlm.tokenizer import Message
from eval.config import NUCLEUS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """An answer as a system gives it; see `eval.answers.Answer`."""

    text: str
    tokens: int = 0
    finish_reason: str = "stop"
    model_calls: int = 0
    steps: int = 0
    reveal_step: tuple[int, ...] = ()
    trace: dict[str, list[float]] | None = None


TOO_LONG = Reply("", finish_reason="length")
"""In place of an answer, where the conversation leaves no room for one in the model."""

REFUSED_REPLY = Reply("", finish_reason="refused")
"""In place of an answer that an endpoint refuses for good, as its filter or its length do."""


class System(Protocol):
    """Answers conversations."""

    def replies(self, conversations: Sequence[list[Message]]) -> Iterator[tuple[int, Reply]]:
        """One reply to each conversation, behind its number, as they are finished."""
        ...


def check_traced(plan: Plan) -> None:
    """Refuse traces of decoders that write tokens again.

    Raises:
        ConfigError: for a plan whose tokens do not stay.
    """
    if not plan.keeps_tokens:
        raise ConfigError(f"a trace is of tokens that stay; decoder {plan.decoder.name!r} writes some again")


class Local:
    """A masked diffusion model.

    Args:
        sampler: a `decoding.Sampler`.
        batch_size: rows per model call.
        request: how answers are decoded.
        seed: of the noise.
        trace: whether replies have the traces of how they were written.
    """

    def __init__(
        self, sampler: Any, batch_size: int, request: Request, seed: int = 0, trace: bool = False
    ) -> None:
        self.sampler, self.batch_size, self.request, self.seed = sampler, batch_size, request, seed
        self.trace = trace
        if trace:
            check_traced(sampler.plan(request))

    def replies(self, conversations: Sequence[list[Message]]) -> Iterator[tuple[int, Reply]]:
        """See `System`; a conversation's noise depends on the seed and its own text alone."""
        settings = {"request": self.request, "seed": self.seed, "batch_size": self.batch_size}
        positions = self.sampler.plan(self.request).positions
        fits = [self.sampler.fits(talk, positions) for talk in conversations]
        fitting = [talk for talk, fit in zip(conversations, fits, strict=True) if fit]
        if self.trace:
            outs = self.sampler.iter_traced(fitting, **settings)
        else:
            outs = ((out, None) for out in self.sampler.iter_generate(fitting, **settings))
        for number, fit in enumerate(fits):
            if not fit:
                yield number, TOO_LONG
                continue
            out, trace = next(outs)
            yield (
                number,
                Reply(
                    out.text,
                    len(out.token_ids),
                    out.finish_reason,
                    out.model_calls,
                    out.steps,
                    tuple(out.reveal_step),
                    None if trace is None else asdict(trace),
                ),
            )


class Autoregressive:
    """A causal language model, one token a call: the baseline.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer, with a chat template.
        max_tokens: longest answer.
        top_p: nucleus (arXiv 1904.09751); 0 for the likeliest token.
        frequency_penalty: taken from the logit of a token once for each time that the answer has it, as
            `TokenRule` does for a diffusion model.
        seed: of the run; each conversation has a generator of its own.

    Raises:
        CheckpointError: for a tokenizer without a chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_tokens: int,
        top_p: float = NUCLEUS,
        frequency_penalty: float = 0.0,
        seed: int = 0,
    ) -> None:
        from transformers import GenerationConfig

        if not tokenizer.chat_template:
            raise CheckpointError(f"{tokenizer.name_or_path}: has no chat template, so it cannot be asked")
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.frequency_penalty, self.seed = frequency_penalty, seed
        ends = model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        rule = {"do_sample": True, "top_p": top_p, "top_k": 0} if top_p else {"do_sample": False}
        model.generation_config = GenerationConfig(  # the checkpoint's own may cut, heat or penalise
            **rule, pad_token_id=tokenizer.eos_token_id, eos_token_id=sorted(self.ends)
        )

    @property
    def positions(self) -> int:
        """Longest row of the model, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    def replies(self, conversations: Sequence[list[Message]]) -> Iterator[tuple[int, Reply]]:
        """See `System`; one at a time, so that a text does not depend on its batch-mates."""
        import torch

        from dlm.noise import key_of

        for number, talk in enumerate(conversations):
            ids = self.tokenizer.apply_chat_template(
                talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"].to(self.model.device)
            room = self.positions - ids.shape[1]
            if room < 1:
                yield number, TOO_LONG
                continue
            torch.manual_seed(int(key_of(self.seed, json.dumps(talk))) % 2**63)
            with torch.inference_mode():
                generated = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(self.max_tokens, room),
                    logits_processor=self._processors(ids.shape[1]),
                )
            new = generated[0, ids.shape[1] :].tolist()
            ended = bool(new) and new[-1] in self.ends
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            reason = "stop" if ended else "length"
            yield number, Reply(text, len(new) - ended, reason, len(new), len(new))

    def _processors(self, begun: int) -> list[Callable[[Any, Any], Any]]:
        """What changes the logits of an answer that begins behind `begun` tokens."""
        if not self.frequency_penalty:
            return []

        def penalise(ids: Any, logits: Any) -> Any:
            """[B, L] and [B, V] -> [B, V]."""
            answer = ids[:, begun:]
            return logits.scatter_add(1, answer, logits.new_full(answer.shape, -self.frequency_penalty))

        return [penalise]


class Endpoint:
    """An OpenAI-compatible endpoint; what it can do beyond that API goes into `extra`.

    Args:
        url: base URL, such as http://localhost:8000/v1.
        model: name of the model there.
        max_tokens: longest answer.
        seed: sent along.
        concurrency: requests under way at a time.
        extra: further fields of the request body.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_tokens: int,
        seed: int = 0,
        concurrency: int = 8,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.client, self.model, self.concurrency = client(url), model, concurrency
        self.body: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed, "extra_body": extra or None}

    def replies(self, conversations: Sequence[list[Message]]) -> Iterator[tuple[int, Reply]]:
        """See `System`; a conversation that is refused where others are answered has an empty reply.

        Raises:
            RefusedError: when the endpoint refuses all of them.
            DLMError: when it fails; replies that were there come first.
        """
        refused: dict[int, RefusedError] = {}
        failure: DLMError | None = None
        answered = False
        with ThreadPoolExecutor(self.concurrency) as pool:
            numbers = {pool.submit(self._reply, talk): n for n, talk in enumerate(conversations)}
            try:
                for future in as_completed(numbers):
                    if future.cancelled():
                        continue
                    try:
                        reply = future.result()
                    except RefusedError as error:
                        refused[numbers[future]] = error
                    except DLMError as failed:
                        failure = failure or failed
                        for other in numbers:  # those under way go on, and are kept
                            other.cancel()
                    else:
                        answered = True
                        yield numbers[future], reply
            finally:
                pool.shutdown(cancel_futures=True)
        for number, refusal in refused.items() if answered else ():
            logger.warning("conversation %d has an empty answer: %s", number, refusal)
            yield number, REFUSED_REPLY
        if failure is not None:
            raise failure
        if refused and not answered:
            first = next(iter(refused.values()))
            first.numbers = tuple(refused)
            raise first

    def _reply(self, talk: list[Message]) -> Reply:
        done = self.client.ask(model=self.model, messages=talk, **self.body)
        choice, content = done.choices[0], done.choices[0].message.content
        if isinstance(content, list):  # parts, as some endpoints give
            content = "".join(str(dict(part).get("text") or "") for part in content)
        tokens = getattr(done.usage, "completion_tokens", None)
        return Reply(content or "", tokens if isinstance(tokens, int) else 0, choice.finish_reason or "stop")


class UnreachableError(DLMError):
    """An endpoint that nothing can be sent to: no network, no such host, nobody who listens."""


class RefusedError(DLMError):
    """Requests that an endpoint refuses, and would again.

    Attributes:
        numbers: of the conversations, where several were asked.
    """

    numbers: tuple[int, ...] = ()


_PASSING = (408, 409, 429)
"""Refusals that may pass, besides 5xx."""


class Connection:
    """An endpoint, and what it has been found to refuse.

    The first request goes alone: what it is refused for (a name of a setting, a temperature) is known before
    the others are sent, and an endpoint that nothing can be sent to is not tried again.

    Args:
        client: of the `openai` package.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.instead: dict[str, str] = {}
        """For settings that are refused, the name to use in their place; empty to leave them out."""
        self._first, self._tried, self._reached = threading.Lock(), False, False

    def ask(self, **request: Any) -> Any:
        """A chat completion.

        Raises:
            DLMError: when the endpoint still fails after all retries, or sends something else.
        """
        with contextlib.nullcontext() if self._tried else self._first:
            if not self._tried:
                try:
                    return self._asked(request)
                finally:
                    self._tried = self._reached
        return self._asked(request)

    def _asked(self, request: dict[str, Any]) -> Any:
        import openai

        try:
            while True:
                sent = self._accepted(request)
                try:
                    done = self._sent(sent)
                    break
                except openai.BadRequestError as error:
                    if not self._learn(str(error), sent):
                        raise
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise RefusedError(f"{self.client.base_url}: {type(error).__name__}: {error}") from error
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise DLMError(f"{self.client.base_url}: {type(error).__name__}: {error}") from error
        if not getattr(done, "choices", None):
            raise DLMError(f"{self.client.base_url}: the reply holds no choices")
        if getattr(done.choices[0], "message", None) is None:
            raise DLMError(f"{self.client.base_url}: the reply's choice holds no message")
        return done

    def _sent(self, request: dict[str, Any]) -> Any:
        """The reply to a request; a first connection that fails is tried again once only."""
        import openai

        if not self._reached:
            self._reached = True
            try:
                return self.client.with_options(max_retries=1).chat.completions.create(**request)
            except openai.APIConnectionError as error:
                if not isinstance(error, openai.APITimeoutError):
                    self._reached = False
                    reason = error.__cause__ or error
                    raise UnreachableError(f"{self.client.base_url} cannot be reached ({reason})") from error
            except openai.APIStatusError as error:
                if error.status_code < 500 and error.status_code not in _PASSING:
                    raise
        return self.client.chat.completions.create(**request)

    def _accepted(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request with what the endpoint accepts."""
        named = {self.instead.get(name, name): value for name, value in request.items()}
        named.pop("", None)
        return named

    def _learn(self, message: str, request: dict[str, Any]) -> bool:
        """True when a refusal names a setting that was sent and can be had otherwise from now on."""
        for name, replacement in (("max_tokens", "max_completion_tokens"), ("temperature", ""), ("seed", "")):
            refused = re.search(rf"\b{name}\b", message) is not None and (
                not replacement or replacement in message
            )
            if not refused or name not in request:
                continue
            if name not in self.instead:  # else another thread has learnt it while this one was under way
                self.instead[name] = replacement
                change = (
                    f"takes {replacement} in place of {name}"
                    if replacement
                    else f"refuses {name}, which is left out"
                )
                logger.warning("%s %s", self.client.base_url, change)
            return True
        return False


def client(url: str, timeout: float = 120.0, retries: int = 6) -> Connection:
    """A client of the `openai` package, which tries again, ever later, after 429, 5xx and timeouts.

    The key comes from the environment (OPENAI_API_KEY) and is written nowhere; a URL of one's own may do
    without.

    Raises:
        ConfigError: when the package, or a key that is needed, is missing.
    """
    try:
        import openai
    except ImportError as error:
        raise ConfigError(f"endpoints need the package openai: {how_to_install('eval')}") from error
    key = os.environ.get("OPENAI_API_KEY") or ("none" if url else "")
    if not key:
        raise ConfigError("OPENAI_API_KEY is not set, and no URL of another endpoint was given")
    for name in ("httpx", "httpx2", "openai"):  # a line for each request
        logging.getLogger(name).setLevel(logging.WARNING)
    connected = openai.OpenAI(api_key=key, base_url=url or None, timeout=timeout, max_retries=retries)
    return Connection(connected)
