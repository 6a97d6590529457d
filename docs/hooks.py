"""Pages of the site that lie outside of docs/, and links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "dlm/pretrained/README.md": "model-card.md",
}
"""Files of the repository, and the pages that they become."""

LINK = re.compile(r"\]\(((?:\.\./)*)(" + "|".join(map(re.escape, OUTSIDE)) + r")\)")
"""A link to one of them, from wherever."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and the pictures of the default model's card."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text("utf-8").replace("](docs/", "](").replace("](../../docs/", "](")
        files.append(File.generated(config, page, content=text))
    for picture in (ROOT / "dlm" / "pretrained").glob("*.png"):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside of docs/ lead to the pages that they have become."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda link: f"]({up}{OUTSIDE[link[2]]})", markdown)
