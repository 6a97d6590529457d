"""Results, on disk as soon as they exist: a line of JSON each, and a page of Markdown made of all of them."""

from __future__ import annotations

import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]
"""`stage`, `name`, `time` (seconds since 1970) and figures."""

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "accelerate", "peft", "safetensors", "numpy")
OPTIONAL = (
    "datasets", "jsonargparse", "gguf", "platformdirs", "matplotlib", "flash-attn", "pytest",
    "fastapi", "uvicorn", "sse-starlette", "prometheus-client", "aiohttp",
)  # fmt: skip
"""Packages that stages do without, or are left out without; the last five are those of `serve`."""


class Report:
    """`report.jsonl` and `report.md` in a folder; what stands there already is done.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.page = folder / "report.jsonl", folder / "report.md"
        text = self.lines.read_text(encoding="utf-8") if self.lines.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
        if whole != text:
            self.lines.write_text(whole, encoding="utf-8")
        self.results: list[Result] = [json.loads(line) for line in whole.splitlines()]

    def find(self, stage: str, name: str) -> Result | None:
        """The newest result of that name."""
        return next((r for r in reversed(self.results) if (r["stage"], r["name"]) == (stage, name)), None)

    def add(self, stage: str, name: str, **figures: Any) -> None:
        """Write a result down, print it, and renew the page."""
        result = {"stage": stage, "name": name, "time": round(time.time(), 1), **figures}
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        self.results.append(result)
        print(f"[{stage}] {name}: " + ", ".join(f"{k} {shown(v)}" for k, v in figures.items()), flush=True)
        beside = self.page.with_suffix(".part")
        beside.write_text(page(self.results), encoding="utf-8")
        beside.replace(self.page)


def page(results: list[Result]) -> str:
    """All results as Markdown: a section for each stage, a table for rows with the same figures."""
    parts = ["# GPU report\n"]
    for stage in dict.fromkeys(result["stage"] for result in results):
        parts.append(f"## {stage}\n")
        newest = {r["name"]: r for r in results if r["stage"] == stage}
        tables: dict[tuple[str, ...], list[Result]] = {}
        for result in newest.values():
            tables.setdefault(_figures(result), []).append(result)
        parts += [_table(names, rows) for names, rows in tables.items()]
    return "\n".join(parts)


def _figures(result: Result) -> tuple[str, ...]:
    return tuple(name for name in result if name not in ("stage", "name", "time"))


def _table(names: tuple[str, ...], rows: list[Result]) -> str:
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += ["| " + " | ".join([row["name"], *(shown(row[name]) for name in names)]) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A figure in a few characters."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def hardware(device: torch.device) -> Result:
    """The machine and the versions of what matters here."""
    facts: Result = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device)
        facts |= {"device": own.name, "memory_gib": own.total_memory / 2**30, "cuda": torch.version.cuda}
        facts |= {"multiprocessors": own.multi_processor_count}
    return {**facts, **{name: version for name in PACKAGES if (version := _version(name))}}


def missing() -> list[str]:
    """Optional packages that this Python does not have."""
    return [name for name in OPTIONAL if _version(name) is None]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
