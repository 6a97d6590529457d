"""Answer prompts with several models and decoders at the same steps, side by side as Markdown.

python -m examples.answers --models runs/sft runs/r2ft --file prompts.json --limit 20 --out answers.md
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from decoding.answer import Output
from decoding.presets import Decoder
from decoding.row_maker import Prompt
from decoding.sampler import Sampler
from dlm.checkpoint import load_model
from dlm.data.prompts import read_prompts
from dlm.repetition import repetition, stutter


def answer(
    samplers: dict[str, Sampler], prompts: list[Prompt], names: list[str], window: int, steps: int, seed: int
) -> dict[str, tuple[list[Output], float]]:
    """Outputs of each decoder with each model, and the seconds they took."""
    results = {}
    for name, (model, sampler) in itertools.product(names, samplers.items()):
        begun = time.perf_counter()
        outputs = sampler.iter_generate(
            prompts, decoder=Decoder.named(name), window=window, steps=steps, seed=seed, batch_size=4
        )
        label = f"{name}, {model}" if len(samplers) > 1 else name
        results[label] = (list(tqdm(outputs, total=len(prompts), desc=label)), time.perf_counter() - begun)
    return results


def summary(results: dict[str, tuple[list[Output], float]]) -> Iterable[str]:
    """A Markdown table of measures, one line per decoder; stutter is the share of words equal to the last."""
    titles = ("answer tokens", "ended by itself, %", "4-gram repetition, %", "stutter, %")
    yield f"| decoder | {' | '.join(titles)} | model calls | tokens/s |"
    yield "|---|---|---|---|---|---|---|"
    for name, (outputs, seconds) in results.items():
        tokens = [len(output.token_ids) for output in outputs]
        cells = (
            f"{mean(tokens):.1f}",
            f"{100 * mean(output.finish_reason == 'stop' for output in outputs):.0f}",
            f"{100 * mean(repetition(output.text) for output in outputs):.1f}",
            f"{100 * mean(stutter(output.text) for output in outputs):.1f}",
            f"{mean(output.model_calls for output in outputs):.1f}",
            f"{sum(tokens) / seconds:.1f}",
        )
        yield f"| {name} | {' | '.join(cells)} |"


def quoted(text: str) -> str:
    """Text as a Markdown quotation."""
    return "\n".join(f"> {line}" for line in (text or "(empty)").splitlines())


def main() -> None:
    """Decode, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--file", required=True, help="prompts, as `dlm generate --file` reads them")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--decoders", nargs="+", default=["conv", "semi-ar", "top-k", "llada"])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    samplers = {
        Path(m).name: Sampler(*load_model(m, dtype=options.dtype, prepacked=True)) for m in options.models
    }
    first = next(iter(samplers.values()))
    fits = (p for p in read_prompts(options.file) if first.prompt_length(p) < options.window // 2)
    prompts = list(itertools.islice(fits, options.limit))
    results = answer(samplers, prompts, options.decoders, options.window, options.steps, options.seed)
    lines = [
        f"Window {options.window}, {options.steps} steps, seed {options.seed}, {len(prompts)} prompts.",
        "",
    ]
    lines += [*summary(results), ""]
    for i, prompt in enumerate(prompts):
        lines += [f"### {i + 1}. {prompt if isinstance(prompt, str) else prompt[-1]['content']}", ""]
        for name, (outputs, _) in results.items():
            output = outputs[i]
            lines += [
                f"**{name}** ({output.finish_reason}, {output.model_calls} calls)",
                quoted(output.text),
                "",
            ]
    options.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(summary(results)))


if __name__ == "__main__":
    main()
