"""Two requests with different decoders, limits and stop texts on one engine, streamed; a third is cancelled.

python -m examples.many_requests [MODEL]
"""

import sys

from decoding import Engine, Request
from dlm import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "default")
engine = Engine(model, tokenizer, max_rows=8)

short = Request(max_tokens=40, stop=["\n\n"]).resolve(model)
paced = Request(decoder="llada-conv", max_tokens=60, rate=2.0, stop=["."]).resolve(model)
names = {
    engine.submit("Give three tips for staying healthy.", short, seed=1): "tips",
    engine.submit([{"role": "user", "content": "What is the capital of France?"}], paced, seed=2): "capital",
}
unwanted = engine.submit("Write a very long story.", short, seed=3)

shown = dict.fromkeys(names, "")
while len(engine):
    for update in engine.step():
        if update.ticket == unwanted:
            engine.cancel(unwanted)
            continue
        delta = update.confirmed[len(shown[update.ticket]) :]  # text that can no longer change
        shown[update.ticket] += delta
        if delta:
            print(f"{names[update.ticket]}: {delta!r}")
        if update.output:
            print(
                f"{names[update.ticket]}: ({update.output.finish_reason}, {update.output.model_calls} calls)"
            )
