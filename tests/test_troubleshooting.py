"""Every message that docs/troubleshooting.md explains is one that the code can give."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r"^\*\*`(.+)`\*\*$", re.MULTILINE)
MESSAGES = ENTRY.findall((ROOT / "docs/troubleshooting.md").read_text("utf-8"))


@pytest.fixture(scope="module")
def texts():
    """All texts in the code, with a break wherever a value is put in."""
    found = []
    for package in ("dlm", "decoding", "finetune", "eval", "serve"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\0".join(found)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_in_the_code(message, texts):
    parts = re.split(r"'[^']*'|\(…\)|[\d.]+(?= |$|\b)|…", message)
    longest = max((part.strip(" ;,.?:") for part in parts), key=len)
    words = longest.split()
    size = 4 if len(words) > 4 else 2
    runs = [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]
    assert any(run in texts for run in runs), f"no text in the code holds a part of {longest!r}"
    assert len(MESSAGES) > 30
