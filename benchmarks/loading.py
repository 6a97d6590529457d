"""Peak memory of reading or converting a checkpoint, over its weights: `python -m benchmarks.loading [GB]`.

Writes a LLaDA-shaped checkpoint of random bfloat16 weights in shards, and reads it in processes of their own.
The figure is the peak of the resident set less what the process held before, over the bytes of the model.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from dlm.checkpoint import load_model
from dlm.convert import convert
from dlm.quantization import weight_bytes
from dlm.tokenizer import train_tokenizer
from dlm.weights import stored_bytes

D, INNER, VOCAB = 2048, 6144, 16000
CONVERT = "convert"


def main() -> None:
    """Print a table, one line for each type."""
    if len(sys.argv) > 2:
        measured, what = Path(sys.argv[1]), sys.argv[2]
        measure_conversion(measured) if what == CONVERT else measure(measured, what)
        return
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 0.6
    with tempfile.TemporaryDirectory() as folder:
        stored = write(Path(folder), size)
        print(f"stored: {stored / 1e9:.2f} GB in bfloat16")
        for what in ("bfloat16", "float32", "int8", "nf4", CONVERT):
            subprocess.run([sys.executable, "-m", "benchmarks.loading", folder, what], check=True)


def measure(folder: Path, dtype: str) -> None:
    """Read the checkpoint, and print the peak."""
    with tempfile.TemporaryDirectory() as small:  # what a first reading imports is no part of the figure
        write(Path(small), 0.0)
        load_model(small, "cpu", dtype)[0].hidden(torch.zeros(1, 4, dtype=torch.int64))
    before = resident()
    model, _ = load_model(folder, "cpu", dtype)
    size = weight_bytes(model)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model.hidden(ids)  # touches every weight
    peak = highest() - before
    print(f"{dtype}: model {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, ratio {peak / size:.3f}")


def measure_conversion(folder: Path) -> None:
    """Convert the checkpoint to our layout, and print the peak."""
    with tempfile.TemporaryDirectory() as small:
        write(Path(small) / "public", 0.0)
        convert(Path(small) / "public", Path(small) / "ours")
        before, size = resident(), stored_bytes(folder) or 0
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # `highest` counts from here
        convert(folder, Path(small) / "large")
    peak = highest() - before
    print(f"{CONVERT}: files {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, ratio {peak / size:.3f}")


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def highest() -> int:
    """Greatest number of bytes of this process that were in memory (`ru_maxrss` counts its parent's too)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def write(folder: Path, gigabytes: float, shards: int = 4) -> int:
    """Write the checkpoint; gives the bytes of its weights."""
    folder.mkdir(exist_ok=True)
    layer = 4 * D * D + 3 * D * INNER + 2 * D
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCAB * D) / layer))
    shapes = {"model.transformer.wte.weight": (VOCAB, D), "model.transformer.ff_out.weight": (VOCAB, D)}
    shapes["model.transformer.ln_f.weight"] = (D,)  # type: ignore[assignment]
    inner = {"ff_proj": (INNER, D), "up_proj": (INNER, D), "ff_out": (D, INNER)}
    inner |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (D, D))
    for i in range(layers):
        stem = f"model.transformer.blocks.{i}."
        shapes |= {f"{stem}{name}.weight": shape for name, shape in inner.items()}
        shapes |= {f"{stem}{name}.weight": (D,) for name in ("attn_norm", "ff_norm")}  # type: ignore[misc]
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file(
            {n: torch.randn(shapes[n], dtype=torch.bfloat16) for n in mine}, folder / file, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    core = train_tokenizer(["some text"], 300).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llada", "d_model": D, "n_heads": 8, "n_layers": layers, "mlp_hidden_size": INNER,
        "vocab_size": VOCAB, "max_sequence_length": 4096, "rms_norm_eps": 1e-5, "weight_tying": False,
        "mask_token_id": tokenizer.convert_tokens_to_ids("<|mask|>"), "rope_theta": 500000.0,
        "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


if __name__ == "__main__":
    main()
