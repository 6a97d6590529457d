"""Types that users see: mypy finds the mistakes in a script, and nothing wrong in the rest of it."""

import subprocess
import sys

SCRIPT = """
from decoding import Decoder, Engine, Request, Sampler
from dlm import load_model

model, tokenizer = load_model("default", device=3)
sampler = Sampler(model, tokenizer)
outs = sampler.generate(["a"], request=Request(decoder="conv", max_tokens=9), seed=1)
print(outs[0].text.upper(), outs[0].txt)
plan = Request(steps="many").resolve(model)
engine = Engine(model, tokenizer, max_rows=2)
ticket: int = engine.submit("a", plan, seed=3)
for update in engine.step():
    print(update.confirmed.upper(), update.output.text if update.output else "")
print(Decoder.named("conv").name.upper())
"""


def test_a_type_checker_finds_the_mistakes_of_a_users_script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            "--no-error-summary",
            str(file),
        ],
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if "script.py" in line and ": error:" in line]
    assert [line.split(":")[1] for line in lines] == ["5", "8", "9"], done.stdout + done.stderr
    assert "device" in lines[0] or "int" in lines[0]
    assert '"Output" has no attribute "txt"' in lines[1]
    assert "steps" in lines[2]
