"""The wheel holds every package, and works from outside the checkout."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_installs_and_imports_from_elsewhere(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = tmp_path / "source"
    subprocess.run(["git", "-c", "safe.directory=*", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True
    )
    (wheel,) = tmp_path.glob("dlm-*.whl")
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    code = (
        "import dlm, decoding, finetune, decoding.sampler, finetune.sft, dlm.cli, dlm.commands.inspect\n"
        "import decoding.commands.generate, decoding.commands.chat, finetune.commands.train, dlm.data.rules\n"
        f"assert all(m.__file__.startswith({str(target)!r}) for m in (dlm, decoding, finetune))\n"
        "from dlm.model_names import ADAPTERS\n"
        "from dlm.pretrained.names import located\n"
        "from dlm.commands.inspect import describe\n"
        "assert all('BF16' in describe(name)['parameters'] for name in ADAPTERS)\n"
        f"assert all(located(name).startswith({str(target)!r}) for name in ADAPTERS)\n"
        "assert dlm.cli.main(['--version']) == 0\n"
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)
