"""The interface of a family of public checkpoints: where its tensors go, and what its configuration means."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from dlm.config import MaskedDiffusionConfig
from dlm.errors import CheckpointError, first_line
from dlm.families.fields import Public, check_numbers, whole
from dlm.tokenizer import MASK_TOKEN, TEMPLATES


class Family:
    """Models of one layout; a new one overrides the attributes and `backbone`.

    Stems in `tensors` are names of tensors or modules; `{i}` stands for the number of a layer. The longest
    stem counts. Tensors that no stem names keep their name.

    Attributes:
        name: name in records and on pages.
        ids: published checkpoints, on the hub.
        model_types: `model_type` of config.json.
        tensors: stem of a public name -> stem of ours.
        shift: True when the state at i-1 predicts token i.
        ends: tokens that end an answer beside the end token, where the tokenizer has them.
        mask: the mask token, where config.json does not say its id.
        tokenizer_class: transformers' class, for a tokenizer that is not stored as tokenizer.json.
        derived: pattern of public tensors that follow from the configuration; they are not read.
        generation: the authors' settings of decoding, as fields of a `Request`.
    """

    name: ClassVar[str]
    ids: ClassVar[tuple[str, ...]] = ()
    model_types: ClassVar[tuple[str, ...]] = ()
    tensors: ClassVar[Mapping[str, str]] = {"model": "backbone"}
    shift: ClassVar[bool] = False
    ends: ClassVar[tuple[str, ...]] = ()
    mask: ClassVar[str | None] = None
    tokenizer_class: ClassVar[str | None] = None
    derived: ClassVar[str | None] = None
    generation: ClassVar[Mapping[str, Any]] = {}

    def detect(self, public: Public, path: str, names: Callable[[], Collection[str]]) -> bool:
        """True for a model of this family.

        Args:
            public: its configuration.
            path: where it lies, folder or hub id.
            names: gives the names of its tensors; none for what is not on this machine.
        """
        del path, names
        return public.get("model_type") in self.model_types

    def backbone(self, public: Public) -> dict[str, Any]:
        """Settings of the backbone, with `model_type`.

        Raises:
            CheckpointError: when the configuration asks for what the backbone cannot do.
        """
        raise NotImplementedError

    def extra(self, public: Public, path: str) -> dict[str, Any]:
        """Further fields of `MaskedDiffusionConfig`, such as `block_size`; by default none."""
        del public, path
        return {}

    def mask_id(self, public: Public, tokenizer: PreTrainedTokenizerBase) -> int:
        """Id of the mask token, from the configuration, the tokenizer, or the name of the family's mask."""
        if public.get("mask_token_id") is not None:
            return whole(public, "mask_token_id", least=0)
        if tokenizer.mask_token_id is not None:
            return int(tokenizer.mask_token_id)
        if self.mask in tokenizer.get_vocab():
            return int(tokenizer.convert_tokens_to_ids(self.mask))
        raise CheckpointError(
            f"the tokenizer has no mask token; add {self.mask or MASK_TOKEN!r} to it, or its id to "
            'config.json as "mask_token_id"'
        )

    def end_id(self, public: Public, tokenizer: PreTrainedTokenizerBase) -> int:
        """Id of the end token: the tokenizer's, or the configuration's."""
        token = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else public.get("eos_token_id")
        if isinstance(token, list):
            token = next(iter(token), None)
        if token is None:
            raise CheckpointError("neither the tokenizer nor config.json names an end token (eos_token)")
        end_id = whole({"eos_token_id": token}, "eos_token_id", least=0)
        if end_id >= len(tokenizer):
            raise CheckpointError(
                f"the end token is number {end_id}, and the tokenizer has {len(tokenizer)} tokens"
            )
        return end_id

    def load_tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """The tokenizer as it lies in a folder or hub repository; never by code of the repository."""
        if has_file(path, "tokenizer.json"):
            return PreTrainedTokenizerFast.from_pretrained(path)
        if self.tokenizer_class:
            import transformers

            return getattr(transformers, self.tokenizer_class).from_pretrained(path)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)

    # ---- what follows from these --------------------------------------------------------------------

    def tokenizer(self, path: str, public: Public) -> PreTrainedTokenizerBase:
        """The tokenizer, fit for diffusion: a mask token, an end token, padding on the right, a template.

        Raises:
            CheckpointError: when it cannot be read, or has no mask and no end token.
        """
        try:
            tokenizer = self.load_tokenizer(path)
        except Exception as error:
            raise CheckpointError(
                f"{path}: the tokenizer is missing or damaged ({first_line(error)})"
            ) from error
        try:
            self._prepare(tokenizer, public)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return tokenizer

    def _prepare(self, tokenizer: PreTrainedTokenizerBase, public: Public) -> None:
        mask_id = self.mask_id(public, tokenizer)
        if tokenizer.mask_token_id != mask_id:
            if mask_id == len(tokenizer):
                tokenizer.add_special_tokens({"mask_token": self.mask or MASK_TOKEN})
            elif mask_id < len(tokenizer):
                tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_id)
            else:
                raise CheckpointError(
                    f"the mask token is number {mask_id}, and the tokenizer has {len(tokenizer)} tokens; "
                    f"add {mask_id - len(tokenizer)} tokens and the mask behind them"
                )
        end_id = self.end_id(public, tokenizer)
        if tokenizer.eos_token_id != end_id:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_id)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        tokenizer.published_template = tokenizer.chat_template
        tokenizer.chat_template = self.template(tokenizer)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The chat template; for a model without one, the text alone."""
        return str(tokenizer.chat_template or TEMPLATES["plain"])

    def config(self, public: Public, tokenizer: PreTrainedTokenizerBase) -> MaskedDiffusionConfig:
        """The configuration for our config.json; the public one is kept in it.

        Raises:
            CheckpointError: for a configuration that lacks or misstates something, or asks for what is not
                done here.
        """
        check_numbers(public)
        _refuse_quantized(public)
        backbone = self.backbone(public)
        _check_sizes(backbone, tokenizer.mask_token_id)
        vocab = tokenizer.get_vocab()
        ends = [int(tokenizer.convert_tokens_to_ids(token)) for token in self.ends if token in vocab]
        settings: dict[str, Any] = {
            "backbone": backbone,
            "vocab_size": int(backbone["vocab_size"]),
            "num_tokens": min(len(tokenizer), int(backbone["vocab_size"])),
            "mask_token_id": tokenizer.mask_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "end_token_ids": sorted({*ends, int(tokenizer.eos_token_id)}),
            "shift": self.shift,
            "tie_word_embeddings": bool(backbone.get("tie_word_embeddings", False)),
            "generation": {**self.generation},
            "public": {"family": self.name, "config": dict(public)},
        }
        settings |= self.extra(public, str(tokenizer.name_or_path))
        settings["public"]["template"] = getattr(tokenizer, "published_template", tokenizer.chat_template)
        return MaskedDiffusionConfig(**settings)

    def key_mapping(self) -> dict[str, str]:
        """Public names to ours as patterns with replacements, for transformers' `from_pretrained`."""
        return {_pattern(stem): ours.replace("{i}", r"\1") for stem, ours in self.tensors.items()}

    def is_derived(self, name: str) -> bool:
        """True for a tensor that follows from the configuration, by its public name or ours."""
        return self.derived is not None and re.search(self.derived, name) is not None

    def our_name(self, public_name: str) -> str:
        """Our name of a public tensor."""
        return _renamed(public_name, self.tensors.items())

    def public_name(self, our_name: str) -> str:
        """The public name of a tensor of ours."""
        return _renamed(our_name, ((ours, stem) for stem, ours in self.tensors.items()))


def _refuse_quantized(public: Public) -> None:
    """Refuse weights that were published in fewer bits, whose tensors mean something else."""
    stored = public.get("quantization_config")
    if stored:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else stored
        raise CheckpointError(
            f"config.json says that the weights are quantised ({method}), which is not read; take the model "
            "that they were made from, with --dtype int8 or --dtype nf4"
        )


def _check_sizes(backbone: Mapping[str, Any], mask_id: int) -> None:
    """Refuse a backbone whose sizes do not go together, and a mask without a row of the embedding."""
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    rows, width, _, heads = (whole(backbone, name) for name in sizes)
    shared = backbone.get("num_key_value_heads") or heads
    if backbone.get("head_dim") is None and backbone["model_type"] != "qwen3" and width % heads:
        raise CheckpointError(f"config.json says {heads} heads, which do not divide the width {width}")
    if heads % shared:
        raise CheckpointError(f"config.json says {shared} key/value heads, which do not divide {heads} heads")
    if mask_id >= rows:
        raise CheckpointError(
            f"the mask token is number {mask_id}, and the embedding has {rows} rows (vocab_size); "
            "mask_token_id is less than that"
        )


def _pattern(stem: str) -> str:
    return "^" + re.escape(stem).replace(r"\{i\}", r"(\d+)") + r"(?=\.|$)"


def _renamed(name: str, stems: Iterable[tuple[str, str]]) -> str:
    """The name with the longest stem that it begins with replaced."""
    for old, new in sorted(stems, key=lambda pair: -len(pair[0])):
        match = re.match(_pattern(old), name)
        if match:
            number = match.group(1) if match.groups() else ""
            return new.replace("{i}", number) + name[match.end() :]
    return name


def has_file(path: str, name: str) -> bool:
    """True where a folder or hub repository holds a file."""
    return file_of(path, name) is not None


def file_of(path: str, name: str) -> str | None:
    """The place of a file of a folder or hub repository on this machine, fetched if need be; None if none."""
    return cached_file(  # type: ignore[no-any-return]
        path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
