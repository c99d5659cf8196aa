"""Write docs/flags.md, the reference of all flags, from the argument classes, the parsers and the trials of the tests.

python scripts/flag_table.py            # write it
python scripts/flag_table.py --check    # exit code 1 if it is not what would be written
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))
from flag_effects import TRIALS  # noqa: E402
from pages import add_check_flag, write_or_check  # noqa: E402

from fastchat_qlora.commands.adapter_flags import build_chat_parser, build_merge_parser  # noqa: E402
from fastchat_qlora.commands.inspect.command import InspectArguments  # noqa: E402
from fastchat_qlora.commands.plan.command import PlanArguments  # noqa: E402
from fastchat_qlora.config.arguments import RunArguments  # noqa: E402
from fastchat_qlora.config.flag_parsing import FlagParser  # noqa: E402
from fastchat_qlora.config.legacy_flags import LEGACY_FLAGS  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
NO_FLAG = "no flag; a warning says why"
HEAD = ["| flag | default | meaning |", "|---|---|---|"]
TRIED_HEAD = ["| flag | default | meaning | tried |", "|---|---|---|---|"]

OFTEN_USED = {
    "per_device_train_batch_size": "Conversations (packed sequences) of a device in a step, times the next flag.",
    "gradient_accumulation_steps": "Times so many; `--micro_batch_tokens` cuts the step into passes.",
    "num_train_epochs": "Passes over the training data.",
    "max_steps": "Optimizer steps of the run; -1 for those of the epochs.",
    "learning_rate": "Peak learning rate. The default suits full fine-tuning; LoRA needs 1e-4 to 1e-3.",
    "lr_scheduler_type": "Learning rate schedule: linear, cosine, constant, constant_with_warmup and others.",
    "warmup_steps": "Warmup steps of the learning rate; below 1 a share of all steps.",
    "weight_decay": "Weight decay of the adapter.",
    "max_grad_norm": "Norm to which gradients are clipped; 0 for no clipping.",
    "bf16": "Weights and activations in bfloat16, on CPUs too; slow on one without AVX-512.",
    "fp16": "Weights and activations in float16, for GPUs without bfloat16.",
    "logging_steps": "Steps between two log entries.",
    "eval_strategy": "When to evaluate: no, steps, epoch.",
    "eval_steps": "Steps between two evaluations; the default is that of `--logging_steps`.",
    "save_strategy": "When to save a checkpoint: no, steps, epoch, best.",
    "save_steps": "Steps between two checkpoints.",
    "save_total_limit": "Maximum number of checkpoints to keep.",
    "load_best_model_at_end": "End with the checkpoint of the best evaluation.",
    "resume_from_checkpoint": "Resume from this checkpoint instead of the newest.",
    "deepspeed": "A DeepSpeed configuration, as in `playground/`.",
    "fsdp": "Shard with FSDP2: True, or options such as offload.",
    "push_to_hub": "Push the adapter to the hub at every save.",
    "hub_model_id": "Its repository on the hub.",
    "seed": "Random seed of the adapter's initialization, the order of the data, and dropout.",
    "use_cpu": "Train on the CPU even if there is an accelerator.",
    "disable_tqdm": "No progress bars; log lines stay.",
}
"""transformers' own flags that most runs need -> what they do here."""


def flags_page() -> str:
    """Return the page as Markdown."""
    groups = [*RunArguments.__annotations__.values()]
    old = [f"| `{name}` | {f'`{flag.new}`' if flag.new else NO_FLAG} |" for name, flag in LEGACY_FLAGS.items()]
    lines = [
        "# Flags",
        "Written by `python scripts/flag_table.py`; do not edit. `COMMAND --help` prints the same, and all of "
        "transformers'.",
        "Flags are written with underscores or dashes, as `--lora_r 16` or `--lora-r=16`; a bare boolean is True. A "
        "YAML or JSON file of them may come first, as in `train_lora.py run.yaml --learning_rate 1e-4`; flags after it "
        "override it. An unknown flag is an error that names the nearest one.",
        "The column *tried* has the values that `tests/config/test_flag_effects.py` gives each flag on a CPU, and "
        "where their effect is seen. One without an effect is refused before anything is loaded, or ignored with a "
        "warning.",
        "## Training, inspecting and planning",
        "`train_lora.py`, `fastchat-qlora train`, `inspect` and `plan` take all of these; `inspect` and `plan` need no "
        "`--output_dir`.",
    ]
    for group in groups:
        lines += [f"### {_title(group)}", "\n".join([*TRIED_HEAD, *_of_class(group, tried=True)])]
    lines += [
        "### Often used flags of transformers",
        "Most runs need only these.",
        "\n".join([*TRIED_HEAD, *_often_used()]),
        "### The other flags of transformers",
        f"Those of the `TrainingArguments` of transformers {transformers.__version__}, in its words.",
        "\n".join([*TRIED_HEAD, *_others()]),
        "### Old names",
        "Flags of FastChat's commands that transformers has dropped are accepted, with a warning; so is `--fsdp "
        '"full_shard auto_wrap"`.',
        "\n".join(["| flag | today |", "|---|---|", *old]),
        "## fastchat-qlora inspect",
        "\n".join([*HEAD, *_of_class(InspectArguments)]),
        "## fastchat-qlora plan",
        "\n".join([*HEAD, *_of_class(PlanArguments)]),
        "## fastchat-qlora chat",
        "\n".join([*HEAD, *_of_parser(build_chat_parser())]),
        "## fastchat-qlora merge",
        "\n".join([*HEAD, *_of_parser(build_merge_parser())]),
    ]
    return "\n\n".join(lines) + "\n"


def _title(group: type) -> str:
    title = (group.__doc__ or "").partition("\n")[0].rstrip(".")
    return title if not issubclass(group, transformers.TrainingArguments) else "The training"


def _of_class(group: type, *, tried: bool = False) -> Iterator[str]:
    """Yield a row for each flag that an argument class declares itself."""
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        if field.name in group.__annotations__:
            note = " (transformers' flag)" if field.name in inherited else ""
            row = _row(field.name, _default(field), field.metadata["help"] + _choices(hints[field.name]) + note)
            yield f"{row} {_tried(field.name)} |" if tried else row


def _often_used() -> Iterator[str]:
    fields = {field.name: field for field in dataclasses.fields(RunArguments.__annotations__["training"])}
    for name, meaning in OFTEN_USED.items():
        if name not in RunArguments.__annotations__["training"].__annotations__:
            yield f"{_row(name, _default(fields[name]), meaning)} {_tried(name)} |"


def _others() -> Iterator[str]:
    """Yield a row for each flag of transformers that no other table has."""
    training = RunArguments.__annotations__["training"]
    for field in dataclasses.fields(training):
        if field.name not in {*OFTEN_USED, *training.__annotations__} and field.init:
            meaning = " ".join(field.metadata["help"].replace("%%", "%").replace("|", "\\|").split())
            yield f"{_row(field.name, _default(field), meaning)} {_tried(field.name)} |"


def _tried(name: str) -> str:
    """Return the values that a flag was tried with, by where their effect is seen."""
    places: dict[str, list[str]] = {}
    for trial in TRIALS:
        if trial.flag == name:
            processes = f" in {trial.processes} processes" if trial.processes > 1 else ""
            places.setdefault(trial.effect.seen, []).append(f"`{trial.value or 'bare'}`{processes}")
    return "; ".join(f"{', '.join(dict.fromkeys(values))}: {seen}" for seen, values in places.items())


def _of_parser(parser: FlagParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        choices = f" One of {', '.join(action.choices)}." if action.choices else ""
        default = "required" if action.required else _written(action.default)
        name = action.dest if action.option_strings else f"{action.metavar}"
        yield _row(name, default, f"{action.help}{choices}", is_flag=bool(action.option_strings))


def _row(name: str, default: str, meaning: str, *, is_flag: bool = True) -> str:
    return f"| `{f'--{name}' if is_flag else name}` | {default} | {meaning} |"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _written(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else _written(field.default)


def _written(value: Any) -> str:
    if value is None or value == "":
        return "none"
    return f"`{' '.join(value) if isinstance(value, list) else getattr(value, 'value', value)}`"


def _choices(hint: Any) -> str:
    return f" One of {', '.join(get_args(hint))}." if get_origin(hint) is Literal else ""


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_check_flag(parser)
    write_or_check(PAGE, flags_page(), check=parser.parse_args().check)


if __name__ == "__main__":
    main()
