"""Print what the project needs with one of its extras, a line each: the layer of others in an image."""

import sys
import tomllib
from pathlib import Path


def requirements(extra: str) -> list[str]:
    """Requirements of pyproject.toml, those of the extra and of the extras that it names included."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, extras = project["name"], project["optional-dependencies"]
    lines = list(project["dependencies"])
    for line in extras[extra]:
        nested = line.startswith(f"{name}[")
        lines += requirements(line[len(name) + 1 : -1]) if nested else [line]
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
