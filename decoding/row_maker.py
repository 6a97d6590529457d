"""Rows of texts: a prompt becomes tokens, and masks for its answer."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from decoding.canvas import Row
from decoding.request import Plan, Request
from dlm.errors import ConfigError
from dlm.spec import ModelSpec
from dlm.tokenizer import Message, encode_prompt, encode_text, longest_token

Prompt = str | list[Message]
"""A text (one user turn) or chat messages."""


class TooLongError(ConfigError):
    """Raised for a text that cannot fit, before it is encoded."""


class RowMaker:
    """Makes rows from texts.

    Args:
        tokenizer: the model's.
        spec: the model's.
        most_tokens: texts that cannot have so few tokens are refused before they are encoded; None for no
            such limit. It has no effect where `longest_token` is not known.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, most_tokens: int | None = None
    ) -> None:
        self.tokenizer, self.spec, self.most_tokens = tokenizer, spec, most_tokens

    @cached_property
    def most_characters(self) -> int | None:
        """Characters that `most_tokens` can hold; None for no limit."""
        longest = None if self.most_tokens is None else longest_token(self.tokenizer)
        return None if longest is None or self.most_tokens is None else longest * self.most_tokens

    def check_length(self, text: str) -> None:
        """Refuse a text of too many characters.

        Raises:
            TooLongError: naming both numbers.
        """
        limit = self.most_characters
        if limit is not None and len(text) > limit:
            place = f"{self.most_tokens} tokens"
            if self.most_tokens == self.spec.positions:
                place = f"the model's {self.most_tokens} positions"
            raise TooLongError(f"the prompt has {len(text)} characters; {place} hold {limit} at most")

    def prompt(self, prompt: Prompt | list[int]) -> list[int]:
        """Token ids of a prompt, template included; token ids are taken as they are.

        Raises:
            ConfigError: for a conversation that is none, and token ids that no prompt can have.
            TooLongError: for a text that cannot fit.
        """
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return self._token_ids(prompt)
        return encode_prompt(self.tokenizer, cast("str | list[Message]", prompt), self.check_length)

    def _token_ids(self, ids: list[Any]) -> list[int]:
        size = len(self.tokenizer)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
                raise ConfigError(
                    f"a prompt of token ids holds whole numbers from 0 to {size - 1}, got {token!r}"
                )
            if token == self.spec.mask_token_id:
                raise ConfigError(
                    f"a prompt must not hold the mask token ({token}): it is what is to be written"
                )
        return list(ids)

    def _room(self, tokens: int, plan: Plan) -> str:
        """Say what a prompt that is too long does not fit into."""
        if plan.positions == self.spec.positions:
            return f"the model {plan.positions} positions; a prompt must be shorter"
        return f"the window {plan.positions}; the window must be at least {tokens + 1}"

    def text(self, text: str) -> list[int]:
        """Token ids of plain text; what looks like a control token is text.

        Raises:
            TooLongError: for a text that cannot fit.
        """
        self.check_length(text)
        return encode_text(self.tokenizer, text)

    def plan_gaps(self, request: Request) -> Plan:
        """The plan for texts with gaps, in which no control token can come out (`Request.resolve_gaps`)."""
        return request.resolve_gaps(self.spec, getattr(self.tokenizer, "all_special_ids", ()))

    def answer_row(self, prompt: Prompt | list[int], plan: Plan, name: str = "the prompt") -> Row:
        """A prompt, and masks for its answer, in which the plan's given texts stand.

        Raises:
            ConfigError: for a prompt that does not fit, and for given tokens that do not fit or overlap.
        """
        try:
            prompt_ids = self.prompt(prompt)
        except ConfigError as error:
            raise type(error)(f"{name}: {error}") from error
        if len(prompt_ids) >= plan.positions:
            raise ConfigError(
                f"{name}: the prompt has {len(prompt_ids)} tokens and {self._room(len(prompt_ids), plan)}"
            )
        answer = [plan.mask_id] * min(plan.tokens, plan.positions - len(prompt_ids))
        if not (plan.begin or plan.forced or plan.ending):
            return Row(prompt_ids + answer, len(prompt_ids), name)
        last = [*self.text(plan.ending), self.spec.eos_token_id] if plan.ending else []
        if plan.begin and 0 in dict(plan.forced):
            raise ConfigError("begin and forced both name place 0")
        begin, *forced = [(place, self.text(text)) for place, text in ((0, plan.begin), *plan.forced)]
        fixed = [("begin", *begin), *(("forced", *forced_text) for forced_text in forced)]
        for field, place, ids in [*fixed, ("ending", len(answer) - len(last), last)]:
            _put(answer, place, ids, plan.mask_id, f"{name}: {field}")
        if plan.mask_id not in answer:
            raise ConfigError(
                f"{name}: the given tokens leave nothing to write in an answer of {len(answer)}"
            )
        given_end = (
            len(answer) if last else max((place + len(ids) for place, ids in forced if ids), default=0)
        )
        start = len(prompt_ids)
        return Row(prompt_ids + answer, start, name, start + given_end if given_end else 0)


def _put(answer: list[int], place: int, ids: list[int], mask_id: int, name: str) -> None:
    """Put given tokens at a place of the answer; errors begin with `name`."""
    if place < 0 or place + len(ids) > len(answer):
        raise ConfigError(
            f"{name}: {len(ids)} given tokens at place {place} do not fit in an answer of {len(answer)}"
        )
    if any(token != mask_id for token in answer[place : place + len(ids)]):
        raise ConfigError(f"{name}: the given tokens at place {place} overlap with others")
    answer[place : place + len(ids)] = ids
