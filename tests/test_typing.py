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
one = sampler.generate("a", max_tokens=9)
print(one.text.upper(), one[0])
print(sampler.generate([{"role": "user", "content": "a"}]).token_ids[0] + 1)
print(sampler.generate(prompt for prompt in ["a", "b"]).text)
print(sampler.infill("a <mask:2>").gaps[0].upper(), sampler.infill(["a <mask:2>"])[0].text.upper())
print(sampler.infill("a <mask:2>")[0])
print(sampler.edit("a cat", "cat").text.upper(), sampler.edit(["a cat"], (2, 5), seed=[1])[0].text.upper())
print(sampler.edit(["a cat"], "cat").score)
for event in sampler.stream("a"):
    print(event.text.upper())
for events in sampler.stream(["a", "b"]):
    print(events[0].text.upper(), events.text)
"""


SETTINGS = """
[mypy]
strict = True
follow_imports = silent
[mypy-torch.*,transformers.*,datasets.*,numpy.*]
follow_imports = skip
"""
"""What the script cannot show is not read: those packages take mypy most of a minute."""


def test_a_type_checker_finds_the_mistakes_of_a_users_script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # a user's script lies elsewhere: the installed packages are what is found
    )
    lines = [line for line in done.stdout.splitlines() if "script.py" in line and ": error:" in line]
    numbers = [line.split(":")[1] for line in lines]
    assert numbers == ["5", "8", "9", "16", "18", "20", "22", "26"], done.stdout + done.stderr
    assert "device" in lines[0] or "int" in lines[0]
    assert '"Output" has no attribute "txt"' in lines[1]
    assert "steps" in lines[2]
    assert '"Output" is not indexable' in lines[3]
    assert '"list[Output]" has no attribute "text"' in lines[4]
    assert '"Infilled" is not indexable' in lines[5]
    assert '"list[Infilled]" has no attribute "score"' in lines[6]
    assert '"list[Event]" has no attribute "text"' in lines[7]
