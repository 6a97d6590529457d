"""The model that a run starts from: random weights, a causal LM made bidirectional, or a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dlm.adapter import add_adapter
from dlm.backbone import ScratchConfig, from_causal_lm, from_scratch
from dlm.checkpoint import is_causal_lm, load_model, stored_positions
from dlm.data.encoded import EncodedRows
from dlm.device import QUANTIZED
from dlm.errors import CheckpointError, ConfigError
from dlm.model import MaskedDiffusionModel
from dlm.tokenizer import set_template, template_name, train_tokenizer
from finetune.config import ModelConfig, StartConfig, TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

ModelAndTokenizer = tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]


def first_model(config: TrainConfig, rows: Dataset, resume_from: Path | None = None) -> ModelAndTokenizer:
    """The model that supervised fine-tuning starts from, and its tokenizer.

    Args:
        config: settings of the run.
        rows: what a new tokenizer is trained on.
        resume_from: a checkpoint of this run, whose tokenizer is taken instead of training one again.
    """
    make = _from_checkpoint(config.model) if config.model.init else _from_nothing(config, rows, resume_from)
    model, tokenizer = make
    if config.model.schedule:
        model.config.schedule = {"name": config.model.schedule}
    if config.model.visibility:
        if model.config.block_size != (config.model.block_size or None):
            model.config.generation = None  # was for rows without blocks, or with others
        blocks = model.config.block_size is not None and config.model.visibility == "block"
        for name, usual in (("block_lead", True), ("causal_context", False)):
            given = getattr(config.model, name)
            kept = getattr(model.config, name) if blocks else usual
            setattr(model.config, name, kept if given is None else given)
        model.config.block_size = config.model.block_size or None
    return model, tokenizer


def fine_tuned_model(config: StartConfig, prompted: bool) -> ModelAndTokenizer:
    """A checkpoint that supervised fine-tuning has been through, and its tokenizer.

    Args:
        config: settings of the start.
        prompted: whether the rows of the run have prompts.

    Raises:
        CheckpointError: for a model that was never fine-tuned, saying how to do it.
    """
    refuse_causal_lm(config.init)
    advice = _how(config.init)
    model, tokenizer = load_model(config.init, device="cpu", dtype=_first_dtype(config))
    training = model.config.training
    if not training and model.config.public:  # trained by its authors; on turns, where its template has them
        training = {"template": template_name(tokenizer) if "role" in tokenizer.chat_template else "plain"}
    if not training:
        raise CheckpointError(f"{config.init}: its config.json records no training; {advice}")
    if prompted and training.get("template") == "plain":
        raise CheckpointError(f"{config.init}: trained on plain text, never on instructions; {advice}")
    return model, tokenizer


def refuse_causal_lm(path: str) -> None:
    """Raise a CheckpointError for an autoregressive model, without loading its weights."""
    if is_causal_lm(path):
        raise CheckpointError(f"{path}: an autoregressive model, never trained to fill masks; {_how(path)}")


def any_prompt(rows: Dataset | EncodedRows) -> bool:
    """True when rows have prompts, judged by the first of them."""
    if isinstance(rows, EncodedRows):
        return any(rows["prompt_length"][:100])
    return any(rows[:100]["prompt"])


def _how(path: str) -> str:
    return f"fine-tune it first: dlm train --model.init {path} --output_dir …"


def check_model(path: str, window: int) -> None:
    """Refuse a model that a run cannot start from, by its configuration: before rows and weights are read.

    Args:
        path: name, folder or hub id.
        window: longest window of the run, in tokens.

    Raises:
        CheckpointError: when there is no model, or its family is not known.
        ConfigError: when the window is longer than the model's positions.
    """
    _check_window(window, stored_positions(path))


def _check_window(window: int, positions: int | None) -> None:
    if positions is not None and window > positions:
        raise ConfigError(f"window {window} is longer than the {positions} positions of the model")


def prepare(model: MaskedDiffusionModel, config: StartConfig, window: int, seed: int) -> Any:
    """Fit a model out for training: memory, attention kernel, and an adapter around it if asked for.

    Args:
        model: the model before the run.
        config: settings of the start.
        window: longest window of the run, in tokens.
        seed: seed of the adapter's first weights.

    Raises:
        ConfigError: when the window is longer than the model's positions.
    """
    _check_window(window, model.config.max_positions)
    if config.gradient_checkpointing:  # transformers renamed the method during 5.x
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(model, new if hasattr(model, new) else old)()
    if config.attn_implementation:
        model.set_attn_implementation(config.attn_implementation)
    if config.compile:
        for layer in model.layers:
            layer.compile(dynamic=True)
    lora = config.lora
    if not lora.r:
        return model
    adapted = add_adapter(
        model,
        config.init,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        seed=seed,
        folded=lora.fold,
        quantized=lora.base_dtype if lora.base_dtype in QUANTIZED else "",
    )
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted


def _first_dtype(config: StartConfig) -> str:
    """Type in which the weights are read: those in 8 or 4 bits are rounded after their sketch is taken."""
    return "bfloat16" if config.lora.base_dtype in QUANTIZED else config.lora.base_dtype


def _from_nothing(config: TrainConfig, rows: Dataset, resume_from: Path | None) -> ModelAndTokenizer:
    """Random weights and a tokenizer trained on the rows; the bare template where no row has a prompt."""
    if isinstance(rows, EncodedRows):
        raise ConfigError("encoded rows have a tokenizer: name the model that they are for, --model.init")
    if resume_from:
        tokenizer = AutoTokenizer.from_pretrained(resume_from, trust_remote_code=False)
    else:
        tokenizer = train_tokenizer(_training_texts(rows), config.model.vocab_size)
        prompted = any(prompt for prompt in rows["prompt"])
        if not prompted and config.model.template not in ("plain", ModelConfig.template):
            raise ConfigError(
                f"model.template {config.model.template!r} is for rows with a prompt, and none has one"
            )
        set_template(tokenizer, config.model.template if prompted else "plain")
    return from_scratch(random_shape(config), tokenizer, config.seed), tokenizer


def random_shape(config: TrainConfig) -> ScratchConfig:
    """The shape of a model that starts from random weights.

    Raises:
        ConfigError: for sizes that no model has.
    """
    given = config.model
    shape = {f.name: getattr(given, f.name) for f in fields(ScratchConfig) if hasattr(given, f.name)}
    return ScratchConfig(**shape | {"max_position_embeddings": max(2048, config.data.window)})


def _from_checkpoint(config: ModelConfig) -> ModelAndTokenizer:
    """A causal LM made bidirectional, or a diffusion checkpoint with its own template and shift."""
    if is_causal_lm(config.init):
        dtype = getattr(torch, _first_dtype(config))
        return from_causal_lm(config.init, template=config.template, shift=config.shift, dtype=dtype)
    model, tokenizer = load_model(config.init, device="cpu", dtype=_first_dtype(config))
    options = {"template": config.template, "shift": config.shift}
    recorded = {"template": template_name(tokenizer), "shift": model.config.shift}
    for name, value in options.items():
        if value not in (getattr(ModelConfig, name), recorded[name], "model"):
            raise ConfigError(
                f"model.{name} {value!r} is for other starts; {config.init} keeps {recorded[name]!r}"
            )
    logger.info(
        "%s: keeps its template (%s) and shift=%s", config.init, template_name(tokenizer), model.config.shift
    )
    return model, tokenizer


def _training_texts(rows: Dataset) -> Any:
    """Texts that a new tokenizer is trained on: every message and answer."""
    for row in rows:
        yield from (turn["content"] for turn in row["prompt"])
        yield row["answer"]
