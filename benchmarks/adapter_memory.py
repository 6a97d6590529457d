"""Memory of training an adapter on an 8B model: `python -m benchmarks.adapter_memory [--rows 4]`.

The memory of a training step is a straight line over the number of layers, all else being equal: each brings
its frozen weights, its part of the adapter with gradients and AdamW's moments, and the states that gradient
checkpointing keeps. So models of LLaDA-8B's width, vocabulary and head with one, two and three layers are
trained for two steps on the CPU, each in a process of its own, and the peak of the resident set is measured.
The line through them gives the figure for 32 layers. Beside it stands the calculation:

    base      2 bytes for each frozen weight in bfloat16, 4 in float32
    adapter   16 bytes for each trained number: weight, gradient and two moments in float32
    states    layers x tokens x width x 2 bytes that checkpointing keeps
    at work   what the backward pass of one layer and of a piece of the head has at a time (measured)
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu.material import LLADA_8B, shaped
from dlm.adapter import add_adapter
from dlm.model import IGNORE
from dlm.objective import masked_diffusion_loss

RANK, ALPHA = 64, 16
GB = 1e9


def main() -> None:
    """Print the measurements, their line, and the calculation."""
    options = parser().parse_args()
    if options.layers:
        measure(options)
        return
    shape: dict[str, Any] = LLADA_8B
    peaks = {layers: peak(layers, options) for layers in (1, 2, 3)}
    slope = (peaks[3] - peaks[1]) / 2
    line = peaks[1] + slope * (shape["num_hidden_layers"] - 1)
    print("| layers | peak, GB | calculated, GB |\n|---|---|---|")
    at_work = peaks[1] - sum(parts(1, options).values())
    for layers, measured in [*peaks.items(), (shape["num_hidden_layers"], line)]:
        calculated = sum(parts(layers, options).values()) + at_work
        print(f"| {layers} | {measured / GB:.2f} | {calculated / GB:.2f} |")
    whole = parts(shape["num_hidden_layers"], options) | {"at work": at_work}
    print("\n" + ", ".join(f"{name} {size / GB:.2f} GB" for name, size in whole.items()))


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    out.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    out.add_argument("--window", type=int, default=256, help="tokens of a row")
    out.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the base")
    out.add_argument("--layers", type=int, default=0, help="measure a model of so many, here")
    return out


def peak(layers: int, options: argparse.Namespace) -> float:
    """Bytes of a process that trains a model of so many layers, at their most."""
    words = [
        sys.executable,
        "-m",
        "benchmarks.adapter_memory",
        "--layers",
        str(layers),
        "--dtype",
        options.dtype,
    ]
    words += ["--rows", str(options.rows), "--window", str(options.window)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def measure(options: argparse.Namespace) -> None:
    """Train for two steps, and print the peak over what the process held before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model, trained = learner(options.layers, getattr(torch, options.dtype))
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, options)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def learner(layers: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, list[torch.nn.Parameter]]:
    """A model with an adapter, fit out as `dlm train` does, and what is trained of it."""
    model = shaped(torch.device(device), dtype, **LLADA_8B | {"num_hidden_layers": layers}).train()
    name = "activation_checkpointing_enable"  # transformers renamed it during 5.x
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    adapted = add_adapter(model, "random", r=RANK, alpha=ALPHA)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.float()
    return adapted, trained


def loss_of(model: Any, options: argparse.Namespace) -> torch.Tensor:
    """The loss of a batch of random rows, half of their tokens masked."""
    ids = torch.randint(5, LLADA_8B["vocab_size"] - 5, (options.rows, options.window))
    masked = torch.rand(ids.shape) < 0.5
    targets = torch.where(masked, ids, IGNORE)
    noisy = ids.masked_fill(masked, model.config.mask_token_id)
    logp = model(input_ids=noisy, attention_mask=torch.ones_like(masked), targets=targets).token_logp
    return masked_diffusion_loss(logp, torch.full_like(logp, 0.5), ids.numel())


def parts(layers: int, options: argparse.Namespace) -> dict[str, float]:
    """Bytes of what grows with the layers, by calculation."""
    shape: dict[str, Any] = LLADA_8B
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    frozen = layers * (4 * width**2 + 3 * width * inner + 2 * width) + 2 * shape["vocab_size"] * width + width
    linear = 4 * (2 * width) + 3 * (width + inner)  # sides of the seven linear layers
    trained = layers * (RANK * linear + 2 * width) + 2 * width
    return {
        "base": frozen * getattr(torch, options.dtype).itemsize,
        "adapter": 16.0 * trained,
        "states": 2.0 * layers * options.rows * options.window * width,
    }


if __name__ == "__main__":
    main()
