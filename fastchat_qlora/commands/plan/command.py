"""`fastchat-qlora plan`: the memory, disk space and time of a run, before any weight is loaded."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastchat_qlora.commands.output import check_output, open_output
from fastchat_qlora.commands.plan.build import build_plan, find_devices
from fastchat_qlora.commands.plan.plan import Speed
from fastchat_qlora.commands.plan.views import format_json, print_plan
from fastchat_qlora.config.arguments import flag
from fastchat_qlora.config.parser import parse_command
from fastchat_qlora.config.validation.ranges import TOKENS_PER_SECOND
from fastchat_qlora.errors import UserError
from fastchat_qlora.training.checkpoints.checkpoint_writer import TRAINING_ARGS_FILE
from fastchat_qlora.utils.stdout import open_stdout
from fastchat_qlora.utils.text import one_line

PLAN_PROG = "fastchat-qlora plan"


@dataclass
class PlanArguments:
    """The devices of the run, the speed of one, and the file of the plan."""

    devices: int = flag("Devices of the run, over all machines; fewer are shown too.", 1)
    device_memory_gib: float = flag("Memory of one device in GiB; by default that of this machine's device.", 0.0)
    device_type: Literal["auto", "cuda", "cpu"] = flag(
        "Kind of device; auto is this machine's, or cuda if --device_memory_gib is given.", "auto"
    )
    tokens_per_second: float = flag("Computed tokens/s of one device, padding not counted.", 0.0)
    speed_from: str = flag("Folder of an earlier run; its measured speed is used.", "")
    output: str = flag("Write the plan to this .json file, or as JSON to the terminal if it is -.", "")


def plan(argv: Sequence[str]) -> None:
    """Read the data and the model's configuration, and show what the run will take.

    Raises:
        UserError: the flags, the model, the adapter or the data cannot be used, or nothing is known of the model
            without its weights.
    """
    args, own = parse_command(argv, PLAN_PROG, PlanArguments)
    output = None if own.output in ("", "-") else Path(os.path.expanduser(own.output))
    if output and not own.output.endswith(".json"):
        raise UserError(f"--output {own.output}: must end in .json; give such a name, or - for the terminal")
    if output:
        check_output(output, args, argv)
    devices = find_devices(args, own.devices, own.device_type, own.device_memory_gib)
    result = build_plan(args, devices, _get_known_speed(own))
    if output:
        with open_output(output) as file:
            file.write(format_json(result))
    with open_stdout() as target:
        if own.output == "-":
            target.write(format_json(result))
        else:
            print_plan(result, target)


def _get_known_speed(own: PlanArguments) -> Speed | None:
    """Return the speed that is given, or that an earlier run has measured."""
    if own.tokens_per_second and own.speed_from:
        raise UserError(f"--tokens_per_second and --speed_from {own.speed_from}: two speeds for one run; drop one")
    if own.tokens_per_second:
        return Speed(own.tokens_per_second, "given by --tokens_per_second")
    if not own.speed_from:
        return None
    folder = Path(os.path.expanduser(own.speed_from))
    try:
        results = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
        processes = int(json.loads((folder / TRAINING_ARGS_FILE).read_text(encoding="utf-8"))["processes"])
        measured = float(results.get("computed_tokens_per_second", results["tokens_per_second"]))
        if processes < 1 or not TOKENS_PER_SECOND.accepts(measured) or not 0 < measured < math.inf:
            raise ValueError(f"{measured} tokens/s in {processes} processes")
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no results of a run found ({one_line(repr(error), 120)})"
        remedy = "give the output_dir of a run that has ended, or --tokens_per_second"
        raise UserError(f"--speed_from {own.speed_from}: {reason}; {remedy}") from error
    return Speed(measured / processes, f"measured in {own.speed_from}")
