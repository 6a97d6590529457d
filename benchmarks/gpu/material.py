"""Models, rows and questions: the real ones, or in miniature made here."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from benchmarks.gpu.context import Context, MaterialError
from dlm.backbone import ScratchConfig, from_scratch
from dlm.config import MaskedDiffusionConfig
from dlm.data.encoded import EncodedRows
from dlm.data.rules import make_examples
from dlm.model import MaskedDiffusionModel
from dlm.tokenizer import encode_prompt, encode_text, train_tokenizer

T = TypeVar("T")
WINDOW = 256
TINY_WINDOW = 96


def built(kind: type[T], values: dict[str, Any]) -> T:
    """A settings dataclass from nested values, as a recipe's YAML gives them."""
    hints = get_type_hints(kind)
    given = {
        name: built(hints[name], value) if is_dataclass(hints[name]) and isinstance(value, dict) else value
        for name, value in values.items()
    }
    unknown = set(given) - {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(**given)


def recipe(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe, with changes by dotted names."""
    import yaml

    root = Path(__file__).resolve().parents[2]
    values: dict[str, Any] = yaml.safe_load((root / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        inner = values
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return values


def shaped(device: torch.device, dtype: torch.dtype, **shape: Any) -> MaskedDiffusionModel:
    """A model of a shape with random weights, made on the device."""
    vocab = shape["vocab_size"]
    blocks = {name: shape.pop(name) for name in ("block_size", "causal_context") if name in shape}
    config = MaskedDiffusionConfig(
        **blocks, backbone={"model_type": "llama", "max_position_embeddings": 8192, **shape},
        vocab_size=vocab, num_tokens=vocab, mask_token_id=vocab - 1, eos_token_id=2, shift=True,
        tie_word_embeddings=shape.get("tie_word_embeddings", False),
    )  # fmt: skip
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = MaskedDiffusionModel(config)
    finally:
        torch.set_default_dtype(usual)
    model.to(device)
    model.eval()
    return model


SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49_153, "tie_word_embeddings": True,
}  # fmt: skip
BILLION = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 49_153, "tie_word_embeddings": True,
}  # fmt: skip
LLADA_8B = {
    "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 126_464,
}  # fmt: skip
MINIATURE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


def base(context: Context) -> str:
    """The model that training starts from."""
    return str(_tiny(context) / "base") if context.tiny else "smollm2-135m-instruct"


def rows(context: Context) -> Path:
    """Encoded rows."""
    if context.tiny:
        return _tiny(context) / "rows.npz"
    if context.rows is None:
        raise MaterialError("encoded rows are needed: --rows rows.npz (dlm encode makes them)")
    return context.rows


def questions(context: Context) -> Path:
    """Questions in Alpaca's fields."""
    if context.tiny:
        return _tiny(context) / "questions.json"
    if context.questions is None:
        raise MaterialError("questions are needed: --questions alpaca_eval.json")
    return context.questions


def _tiny(context: Context) -> Path:
    """A folder with a random model, rows and questions, made once."""
    folder = context.output / "tiny"
    if not (folder / "questions.json").is_file():
        examples = make_examples(240)
        texts = [text for example in examples for text in (example.instruction, example.answer)]
        tokenizer = train_tokenizer(texts, 400)
        shape = ScratchConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        from_scratch(shape, tokenizer).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        prompts = [encode_prompt(tokenizer, [{"role": "user", "content": e.instruction}]) for e in examples]
        ids = [
            (prompt + encode_text(tokenizer, e.answer) + [tokenizer.eos_token_id])[:TINY_WINDOW]
            for prompt, e in zip(prompts, examples, strict=True)
        ]
        EncodedRows.packed(ids, map(len, prompts), tokenizer, TINY_WINDOW).save(folder / "rows.npz")
        asked = [{"instruction": e.instruction, "output": e.answer} for e in make_examples(3, split="test")]
        (folder / "questions.json").write_text(json.dumps(asked), encoding="utf-8")
    return folder
