"""`fastchat-qlora plan`: what a run will take, before any weight is loaded."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastchat_qlora.commands.output import check_output, written_whole
from fastchat_qlora.commands.plan.build import Devices, Speed, make_plan
from fastchat_qlora.commands.plan.views import as_json, print_plan
from fastchat_qlora.config.parser import parse_command
from fastchat_qlora.config.validation.ranges import TOKENS_PER_SECOND
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.stdout import open_stdout
from fastchat_qlora.utils.text import one_line

PROG = "fastchat-qlora plan"


@dataclass
class PlanArguments:
    """The devices that the run is planned for."""

    devices: int = field(default=1, metadata={"help": "Devices of the run, over all machines; fewer are shown too."})
    device_memory_gib: float = field(
        default=0.0, metadata={"help": "Memory of one device in GiB; by default that of this machine's device."}
    )
    device_type: Literal["auto", "cuda", "cpu"] = field(
        default="auto",
        metadata={"help": "Kind of device; auto is this machine's, or cuda where --device_memory_gib is given."},
    )
    tokens_per_second: float = field(default=0.0, metadata={"help": "Speed of one device in real tokens, if known."})
    speed_from: str = field(
        default="", metadata={"help": "Folder of an earlier run of this kind, whose measured speed is taken."}
    )
    output: str = field(
        default="", metadata={"help": "Write the plan to this .json file, or as JSON to the terminal if it is -."}
    )


def plan(argv: Sequence[str]) -> None:
    """Read the data and the model's configuration, and say what the run will take.

    Args:
        argv: the flags of `train`, and those of PlanArguments.

    Raises:
        UserError: the flags, the model, the adapter or the data cannot be used, or the model is of a kind of which
            nothing can be known without its weights.
    """
    args, own = parse_command(argv, PROG, PlanArguments)
    if own.output not in ("", "-") and not own.output.endswith(".json"):
        raise UserError(f"--output {own.output}: give a name that ends in .json, or - for the terminal")
    output = Path(os.path.expanduser(own.output))
    if own.output not in ("", "-"):
        check_output(output, args, argv)
    made = make_plan(args, Devices(own.devices, own.device_type, own.device_memory_gib), _known_speed(own))
    if own.output not in ("", "-"):
        with written_whole(output) as file:
            file.write(as_json(made))
    with open_stdout() as target:
        if own.output == "-":
            target.write(as_json(made))
        else:
            print_plan(made, target)


def _known_speed(own: PlanArguments) -> Speed | None:
    if own.tokens_per_second and own.speed_from:
        raise UserError(f"--tokens_per_second and --speed_from {own.speed_from}: two speeds for one run; drop one")
    if own.tokens_per_second:
        return Speed(own.tokens_per_second, "given by --tokens_per_second")
    if not own.speed_from:
        return None
    folder = Path(os.path.expanduser(own.speed_from))
    try:
        results = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
        processes = int(json.loads((folder / "training_args.json").read_text(encoding="utf-8"))["processes"])
        measured = float(results["tokens_per_second"])
        if processes < 1 or not TOKENS_PER_SECOND.holds(measured) or not 0 < measured < math.inf:
            raise ValueError(f"{measured} tokens a second in {processes} processes")
        return Speed(measured / processes, f"measured in {own.speed_from}")
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--speed_from {own.speed_from}: no results of a run are there ({one_line(repr(error), 120)}); give the "
            "output_dir of one that has ended, or --tokens_per_second"
        ) from error
