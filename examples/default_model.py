"""The models that come along answer instructions: by blocks, by convolution, and the default model by itself.

python -m examples.default_model

Its base (SmolLM2-135M-Instruct, 98 MB) is fetched when it is wanted for the first time.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape

from decoding.presets import Decoder
from decoding.sampler import Sampler
from dlm.checkpoint import load_model
from dlm.errors import CheckpointError
from dlm.model_names import BASE_NAME
from dlm.pretrained.base import is_there
from dlm.pretrained.names import located
from examples.coloured import coloured, legend

INSTRUCTIONS = (
    "Give three tips for staying healthy.",
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "Write a short story about a lost dog.",
    "Rewrite this sentence in the passive voice: The cat chased the mouse.",
)
MODELS = {"SFT": "full-sft", "SFT+R2FT": "full"}
"""Models whose positions see the whole row, so that decoders differ most."""
DECODERS = {
    "blocks (semi-AR), llada": Decoder.named("llada", block_size=16),
    "convolution, llada-conv": Decoder.named("llada-conv", kernel_size=9),
}
"""The most confident token first, in blocks of 16 and under a kernel of 9, one token in a call. Blocks go on
to the end of the one in which the answer ends, so they may take a few calls more."""

LEGEND = legend(("first", "", "", "", "", "last"))


def ask(samplers: dict[str, Sampler], own: Sampler, instruction: str, console: Console) -> None:
    """Print one instruction and its five answers, the default model's last."""
    console.print(f"\n[bold]{instruction}[/bold]", highlight=False)
    for name, decoder in DECODERS.items():
        for model, sampler in samplers.items():
            answer(sampler, instruction, f"{name}, {model}", console, decoder=decoder, rate=1.0)
    answer(own, instruction, "the default model as it comes", console)


def answer(sampler: Sampler, instruction: str, name: str, console: Console, **request: Any) -> None:
    """Print one answer, with what it took."""
    begun = time.perf_counter()
    output = sampler.generate(instruction, max_tokens=96, **request)
    size = len(output.token_ids)
    pace = size / (time.perf_counter() - begun)
    facts = f"{name}: {size} tokens, {output.model_calls} model calls, {pace:.0f} tokens/s"
    console.print(f"[dim]{facts}[/dim]", coloured(output, sampler), sep="\n", highlight=False)


def fetch(console: Console) -> int:
    """See to it that the base is there, before anything that takes minutes."""
    try:
        console.print(f"{BASE_NAME}: {located(BASE_NAME)}", highlight=False)
    except CheckpointError as error:
        console.print("[red]The default model will be left out:[/red]", escape(str(error)), highlight=False)
        return 1
    return 0


def main() -> int:
    """Answer the instructions, then say how to go on; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("instructions", nargs="*", default=INSTRUCTIONS)
    parser.add_argument("--fetch", action="store_true", help="only see to it that the base is there")
    parser.add_argument("--if-fetched", action="store_true", help="leave all out if the base is not there")
    options = parser.parse_args()
    console = Console()
    if options.fetch:
        return fetch(console)
    if options.if_fetched and not is_there():
        console.print(
            "\n[red]The default model is left out:[/red] its base could not be fetched (see above). "
            "Once connected: make demo DEMO=quick",
            highlight=False,
        )
        return 0
    title = "\n[bold]The models that come along[/bold]: SmolLM2-135M, trained on Alpaca"
    words = "Blocks of 16 against a kernel of 9, one token in a call for both; then the default model."
    console.print(title, words, LEGEND, sep="\n")
    try:
        samplers = {model: Sampler(*load_model(name, prepacked=True)) for model, name in MODELS.items()}
        own = Sampler(*load_model("default", prepacked=True))
    except CheckpointError as error:
        console.print("[red]The default model cannot answer:[/red]", escape(str(error)), highlight=False)
        return 1
    for instruction in options.instructions:
        ask(samplers, own, instruction, console)
    console.print(
        "\nThe default model was trained in blocks, and writes them one after the other.\n"
        "Talk to it:  .venv/bin/dlm chat\n"
        "Serve it:    .venv/bin/dlm serve   (then open http://127.0.0.1:8000)\n"
        'Ask it:      .venv/bin/dlm generate "Give three tips for staying healthy."',
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
