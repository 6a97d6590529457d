"""Three requests on one engine: two are streamed as confirmed text, one is cancelled."""

import sys

from decoding import Engine, Request
from dlm import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "default", prepacked=True)
engine = Engine(model, tokenizer, max_rows=8)

tips = Request(max_tokens=40, stop=["\n\n"]).resolve(model)
capital = Request(decoder="llada-conv", max_tokens=60, rate=2.0, stop=["."]).resolve(model)
names = {
    engine.submit("Give three tips for staying healthy.", tips, seed=1): "tips",
    engine.submit(
        [{"role": "user", "content": "What is the capital of France?"}], capital, seed=2
    ): "capital",
}
engine.cancel(engine.submit("Write a very long story.", tips, seed=3))

shown = dict.fromkeys(names, "")
while len(engine):
    for update in engine.step():
        name, text = names[update.ticket], update.confirmed  # text that can no longer change
        print(f"{name}: {text[len(shown[update.ticket]) :]!r}")
        shown[update.ticket] = text
        if update.output:
            print(f"{name}: {update.output.finish_reason} after {update.output.model_calls} calls")
