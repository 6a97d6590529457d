"""Every option of `dlm train` and `dlm r2ft` changes what a run leaves, or is refused.

`tests/test_options.py` holds that each is read; here each has a row: what else is given, and a value that
must leave other files, other logged numbers or other words.
"""

import hashlib
import json
import re
import shutil

import pytest

from dlm.cli import commands, main
from dlm.curves import CurveCallback
from tests.test_options import TINY, leaves, place  # noqa: F401 (a fixture)

RUN = (
    "--data.source rules --data.limit 20 --data.validation_rows 3 --data.window 64 --warmup_steps 1 "
    "--sample_steps 2 --report_to none --per_device_train_batch_size 2 --logging_steps 1 "
    "--max_steps 4 --eval_steps 2 --save_steps 2 --learning_rate 0.01 --precision fp32"
)
INSTEAD = {
    "epochs": "--max_steps 0 --num_train_epochs 1",
    "minutes": "--max_minutes 100",
    "grouped": "--data.windows grouped",
    "file": "--data.source rows.json --data.limit 0",
    "text": "--data.source text.jsonl --data.limit 0",
    "lora": "--model.lora.r 2 --model.lora.alpha 4",
    "lora-bf16": "--model.lora.r 2 --precision bf16",
    "causal": "--model.init causal",
    "blocks": "--model.init causal --model.visibility block --model.block_size 8",
    "path": "--masks.path 1",
    "reference": "--objective.reference true",
    "ddro": "--objective.name ddro",
    "dpo": "--objective.name dpo",
    "watched": "--watch 2",
    "bad": "--nelbo_tolerance 0.000001 --learning_rate 1",
}
"""By name, what is given beside the options of every run."""

COMMON = {
    "output_dir": ("", "elsewhere"),
    "data.source": ("", "rows.json"),
    "data.split": ("file", "test"),
    "data.limit": ("", 12),
    "data.validation_rows": ("", 2),
    "data.window": ("", 56),
    "data.windows": ("", "grouped"),
    "data.eos_tail": ("grouped", 2),
    "data.cut_share": ("grouped", 1.0),
    "data.eos_loss": ("", "all"),
    "max_steps": ("", 3),
    "num_train_epochs": ("epochs", 0.4),
    "max_minutes": ("", 0.0001),
    "per_device_train_batch_size": ("", 3),
    "gradient_accumulation_steps": ("", 2),
    "learning_rate": ("", 0.02),
    "lr_scheduler_type": ("", "constant"),
    "warmup_steps": ("", 3),
    "weight_decay": ("", 0.9),
    "max_grad_norm": ("", 1e-4),
    "precision": ("", "bf16"),
    "ema_decay": ("", 0.5),
    "seed": ("", 5),
    "logging_steps": ("", 3),
    "eval_steps": ("", 1),
    "eval_rows": ("", 1),
    "eval_draws": ("", 2),
    "save_steps": ("", 1),
    "save_minutes": ("minutes", 0.00001),
    "keep_checkpoints": ("", 1),
    "samples": ("", '["Say it."]'),
    "sample_steps": ("", 3),
    "report_to": ("", "tensorboard"),
    "trainer": ("", '{"adam_beta1": 0.1}'),
    "model.init": ("", "other"),
    "model.lora.r": ("lora", 3),
    "model.lora.alpha": ("lora", 9),
    "model.lora.dropout": ("lora", 0.5),
    "model.lora.targets": ("lora", "attention"),
    "model.lora.merge": ("lora", "true"),
    "model.lora.base_dtype": ("lora-bf16", "bfloat16"),
}
TRAIN = COMMON | {
    "model.template": ("", "plain"),
    "model.shift": ("causal", "false"),
    "model.schedule": ("", "cosine"),
    "model.visibility": ("causal", "block"),
    "model.block_size": ("blocks", 4),
    "model.block_lead": ("blocks", "false"),
    "model.causal_context": ("blocks", "true"),
    "model.hidden_size": ("", 8),
    "model.num_hidden_layers": ("", 2),
    "model.num_attention_heads": ("", 2),
    "model.intermediate_size": ("", 8),
    "model.vocab_size": ("", 290),
    "masks.complementary": ("", "true"),
    "masks.path": ("", 1.0),
    "masks.kernel_size": ("path", 21),
    "masks.autoregressive": ("", 0.5),
}
R2FT = COMMON | {
    "eval_steps": ("", 3),  # refused: every validated state is saved
    "model.lora.r": ("", 2),
    "model.lora.alpha": ("lora", 9),
    "objective.name": ("", "dpo"),
    "objective.beta_w": ("", 5.0),
    "objective.beta_l": ("", 5.0),
    "objective.gamma": ("", 2.0),
    "objective.beta_a": ("", 0.9),
    "objective.reference": ("", "true"),
    "objective.weighting": ("", "confidence"),
    "objective.theta": ("ddro", 0.4),
    "objective.alpha": ("ddro", 0.5),
    "objective.kl": ("ddro", 0.5),
    "objective.floor": ("ddro", 0.9),
    "objective.beta": ("dpo", 0.5),
    "objective.draws": ("dpo", 2),
    "rejected": ("ddro", "data"),  # refused: rows by rule have no bad answers
    "negatives.left": ("", 0.0),
    "negatives.right": ("text", 9.0),
    "negatives.prior": ("", 9.0),
    "negatives.mixed": ("", 9.0),
    "negatives.run": ("", 9.0),
    "negatives.unit_max": ("", 1),
    "negatives.span_min": ("", 50),
    "negatives.span_max": ("", 31),
    "negatives.eos_p": ("", 1.0),
    "negatives.frequent": ("", 1),
    "negatives.in_span": ("text", 1.0),
    "nelbo_tolerance": ("bad", 9.0),
    "watch": ("", 2),
}
SAME_FUNCTION = {
    "model.gradient_checkpointing",
    "model.attn_implementation",
    "model.compile",
    "model.lora.fold",
}
"""Other arithmetic for the same function: equal up to rounding, see the tests of `finetune.start`."""

CONTINUES = {"resume"}
"""Of a run that is there already, see `tests/finetune/test_resume.py`."""

SPEEDS = re.compile(rb'"[a-z_]*(_runtime|_per_second|total_flos)": [^,\n]*')


@pytest.fixture
def starts(place, capsys, monkeypatch):  # noqa: F811
    """The folder with checkpoints to start from and rows of each kind; curves, half of the time, are off."""
    begin = CurveCallback.__init__
    monkeypatch.setattr(CurveCallback, "__init__", lambda self, folder, drawings: begin(self, folder, {}))
    monkeypatch.setattr("gc.collect", lambda *args: 0)
    for seed, name in enumerate(("other", "start")):
        words = ["train", "--output_dir", name, *RUN.split(), *TINY.split(), "--max_steps", "2"]
        assert main([*words, "--seed", str(seed)]) == 0
    rows = [{"instruction": f"Count to {i}.", "output": "One, two, three, four."} for i in range(16)]
    (place / "rows.json").write_text(json.dumps(rows))
    text = [{"text": f"{i} birds sing in a tree, and {i} more on the roof of a house."} for i in range(16)]
    (place / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    return place


def left_by(folder, root, words, capsys):
    """What a run leaves: its status, its files by digest, and its logged numbers without speeds."""
    status = main([str(word) for word in words])
    problem = capsys.readouterr().err if status else ""
    files = {}
    for file in sorted(root.rglob("*")):
        name = str(file.relative_to(root))
        if file.is_file() and file.name not in ("training_args.bin", ".lock", "run.json", "curve.png"):
            content = file.read_bytes()
            if file.name in ("history.json", "trainer_state.json"):
                content = SPEEDS.sub(b"", content)
            files[name] = hashlib.sha256(content).hexdigest() if "events.out" not in name else ""
    for path in [path for path in root.iterdir() if path.name in (folder, "elsewhere")]:
        shutil.rmtree(path)
    return status, files, problem


def unnoticed(name, table, starts, capsys, start):
    """Options whose other value left the same."""
    before, same = {}, []
    for option, (context, value) in table.items():
        words = [
            name,
            "--output_dir",
            "run",
            *RUN.split(),
            *start(context),
            *INSTEAD.get(context, "").split(),
        ]
        if context not in before:
            before[context] = left_by("run", starts, words, capsys)
            assert before[context][0] == (context == "bad"), (name, context, before[context][2])
        if left_by("run", starts, [*words, f"--{option}", value], capsys) == before[context]:
            same.append(option)
    return same


def random_weights(context):
    if context in ("causal", "blocks"):
        return []
    return ["--model.init", "causal"] if context.startswith("lora") else TINY.split()


def checkpoint(context):
    return ["--model.init", "start", "--watch", 0, "--nelbo_tolerance", 9]


@pytest.mark.parametrize(("name", "table"), [("train", TRAIN), ("r2ft", R2FT)])
def test_every_option_has_a_row(name, table):
    assert set(leaves(commands()[name].load().config)) == set(table) | SAME_FUNCTION | CONTINUES


def test_an_option_of_train_changes_what_a_run_leaves_or_is_refused(starts, capsys):
    assert unnoticed("train", TRAIN, starts, capsys, random_weights) == []


def test_an_option_of_r2ft_changes_what_a_run_leaves_or_is_refused(starts, capsys):
    assert unnoticed("r2ft", R2FT, starts, capsys, checkpoint) == []
