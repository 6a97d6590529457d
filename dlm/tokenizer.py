"""Tokenizers: one trained on the user's own data, or an existing one given a mask token and a template."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dlm.characters import whole_characters
from dlm.errors import CheckpointError, ConfigError, unknown_name

MASK_TOKEN = "<|mask|>"
START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "instruct": (
        "{% for message in messages %}### {{ 'Response' if message['role'] == 'assistant' else "
        "'System' if message['role'] == 'system' else 'Instruction' }}:\n{{ message['content'] }}\n\n"
        "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "plain": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}
"""Chat templates by name (Jinja, as transformers writes them).

`chatml` is the default; `plain` is the bare text, for models that were trained on text without prompts.
"""


def train_tokenizer(texts: Iterable[str] | Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ChatML marks, an end token (also the padding) and a mask token.

    Args:
        texts: the training texts.
        vocab_size: upper limit of tokens, the special ones included; at least 260 (bytes and specials).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = [END_TOKEN, START_TOKEN, MASK_TOKEN]
    if vocab_size < 256 + len(specials):
        raise ConfigError(
            f"vocab_size must be at least {256 + len(specials)} for byte-level BPE, got {vocab_size}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        mask_token=MASK_TOKEN,
        additional_special_tokens=[START_TOKEN],
        clean_up_tokenization_spaces=False,
    )
    set_template(tokenizer, "chatml")
    return tokenizer


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give `tokenizer` the template called `name`; `"model"` keeps the one it came with.

    Raises:
        ConfigError: for an unknown name, or `"model"` on a tokenizer without a template.
    """
    if name == "model":
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer has no chat template of its own; choose one of {', '.join(TEMPLATES)}"
            )
    elif name in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[name]
    else:
        raise unknown_name("template", name, ["model", *TEMPLATES])


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the template that a tokenizer carries; "model" for one that is not among ours."""
    return next((name for name, text in TEMPLATES.items() if text == tokenizer.chat_template), "model")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Make a causal LM's tokenizer fit for diffusion: a mask token, an end token, right padding, a template.

    Returns:
        True where the mask token is new (a tokenizer that had one keeps it, and its trained embedding).

    Raises:
        ConfigError: when the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos_token; a diffusion model needs one to end its answers")
    new = tokenizer.mask_token_id is None
    if new:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    marks = [token for token in (START_TOKEN, END_TOKEN) if token in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    tokenizer.padding_side = "right"
    set_template(tokenizer, template)
    return new


Message = dict[str, str]
"""One turn of a conversation: `role` (one of `ROLES`) and `content`."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of a conversation; templates write them as they stand, so that no other may come."""


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """A prompt as chat messages; a string is one user turn.

    Raises:
        ConfigError: for what is no conversation, and for roles that are none.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | tuple):
        raise ConfigError(f"a prompt must be a text or chat messages, got {prompt!r}")
    if not prompt:
        raise ConfigError("a conversation needs at least one message")
    for turn in prompt:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str) or "role" not in turn:
            raise ConfigError(f"a chat message needs a 'role' and a text 'content', got {turn!r}")
        if turn["role"] not in ROLES:
            raise unknown_name("role", str(turn["role"]), ROLES)
    return list(prompt)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    check: Callable[[str], None] | None = None,
) -> list[int]:
    """Token ids of a prompt up to where the answer begins, rendered by the tokenizer's own template.

    Training and inference both call this and append the answer's own tokens, so the boundary is the same
    in both. Special tokens written inside a message are text, never control tokens.

    Args:
        tokenizer: the model's.
        prompt: a text, which is one user turn, or a conversation.
        check: called with the rendered text before it is encoded; may raise.

    Raises:
        ConfigError: for roles that are none, and when the template refuses the conversation.
    """
    talk = [{"role": turn["role"], "content": turn["content"]} for turn in as_messages(prompt)]
    controls = _control_tokens(tokenizer)
    written = [token for token in controls if any(token in turn["content"] for turn in talk)]
    if not written:
        text = _rendered(tokenizer, talk)
        if check is not None:
            check(text)
        return _encode(tokenizer, text)
    hidden = _Hidden(written, [turn["content"] for turn in talk] + [str(tokenizer.chat_template)])
    text = _rendered(tokenizer, [{**turn, "content": hidden.hide(turn["content"])} for turn in talk])
    if check is not None:
        check(hidden.show(text))
    ids: list[int] = []
    parts = _either(controls).split(text)  # what the template wrote, texts and control tokens in turn
    for is_text, run in itertools.groupby(parts, hidden.holds):
        plain = "".join(run)
        ids += encode_text(tokenizer, hidden.show(plain)) if is_text else _encode(tokenizer, plain)
    return ids


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text that the template makes of a conversation."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        folder = tokenizer.name_or_path or "the model"
        raise CheckpointError(
            f"{folder}: its tokenizer has no chat template, which says how the model was shown prompts "
            "(is chat_template.jinja missing?)"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ConfigError(f"the chat template refuses the conversation: {error}") from error


class _Hidden:
    """Control tokens in messages, hidden from the template behind numbers that occur nowhere in the texts.

    Args:
        tokens: the control tokens that the messages hold.
        texts: where the numbers must not occur.
    """

    def __init__(self, tokens: list[str], texts: list[str]) -> None:
        digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
        mark = int.from_bytes(digest[:10], "big") | 1 << 80
        while any(str(mark) in text for text in texts):
            mark += 1
        self.tokens = {token: f"{mark}{i:03d}" for i, token in enumerate(tokens)}
        self.mark = str(mark)

    def hide(self, text: str) -> str:
        """The text, numbers in the place of its control tokens."""
        return _either(self.tokens).sub(lambda found: self.tokens[found[0]], text)

    def holds(self, text: str) -> bool:
        """True when a text holds numbers."""
        return self.mark in text

    def show(self, text: str) -> str:
        """The text with its control tokens again."""
        for token, number in self.tokens.items():
            text = text.replace(number, token)
        return text


def _either(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the tokens, the longest first; splitting by it keeps them."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Every string that the tokenizer would turn into a control token."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text in which control tokens are control tokens."""
    return _ids(tokenizer, text, split_special_tokens=False)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text; special tokens written in it are split into ordinary ones."""
    return _ids(tokenizer, text, split_special_tokens=True)


_LOCKS: WeakKeyDictionary[Any, Lock] = WeakKeyDictionary()
"""A lock for each tokenizer: transformers sets a switch of the tokenizer before it encodes, so that a thread
could encode with the other's switch."""

_LOCKING = Lock()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, split_special_tokens: bool) -> list[int]:
    if not text:
        return []
    with _LOCKING:
        lock = _LOCKS.setdefault(tokenizer, Lock())
    settings: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": split_special_tokens}
    with lock:
        return list(tokenizer(whole_characters(text), **settings)["input_ids"])


PARTING = {"ByteLevel", "Digits", "Split", "Punctuation"}
"""Pre-tokenizers that part a text and, unless their behaviour is "Removed", lose nothing of it."""


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most characters of a text that one token stands for; None where encoding may lose characters.

    It is known for byte-level BPE without a normaliser. A text of C characters then has at least C divided by
    it tokens.
    """
    from tokenizers import decoders, models, pre_tokenizers

    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or core.normalizer is not None or core.pre_tokenizer is None:
        return None
    if not isinstance(core.model, models.BPE) or not isinstance(core.decoder, decoders.ByteLevel):
        return None
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return None
    state = json.loads(core.pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    if any(step["type"] not in PARTING or step.get("behavior") == "Removed" for step in steps):
        return None
    vocabulary = tokenizer.get_vocab()
    byte_level = all(character in vocabulary for character in pre_tokenizers.ByteLevel.alphabet())
    return max(map(len, vocabulary)) if byte_level else None
