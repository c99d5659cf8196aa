"""Size of what a run writes, and the check that it fits on the disk."""

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer_utils import IntervalStrategy

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.estimates.optimizer_state import get_saved_state_bytes
from fastchat_qlora.training.schedule import count_steps

FP32_BYTES = 4
BYTES_PER_MIB = 2**20
OTHER_FILES_BYTES = 32 * BYTES_PER_MIB  # random states, logs, and a tokenizer of up to some 20 MiB


class CheckpointSize(NamedTuple):
    """Size of an adapter and of a checkpoint with it."""

    parameters: int  # trained ones
    optimizer: str
    has_masters: bool = False  # fp32 copies of the parameters, and the parameters beside them, are saved: DeepSpeed's
    only_model: bool = False  # a checkpoint is the adapter alone

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter, in fp32."""
        return self.parameters * FP32_BYTES

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: the adapter and the optimizer's state."""
        if self.only_model:
            return self.adapter_bytes
        copies = 3 if self.has_masters else 1
        return round(self.parameters * (FP32_BYTES * copies + get_saved_state_bytes(self.optimizer)))


def count_checkpoints(args: Any, units: int, processes: int) -> int:
    """Return the number of checkpoints that output_dir holds at most when a run ends."""
    if args.save_strategy == "no":
        return 0
    steps_per_epoch, steps, _ = count_steps(args, units, processes)
    evaluates_between = args.load_best_model_at_end and args.eval_strategy == IntervalStrategy.STEPS
    if args.save_strategy == IntervalStrategy.STEPS:
        every = args.eval_steps if evaluates_between else args.save_steps
    elif args.save_strategy == "best" and args.eval_strategy == IntervalStrategy.STEPS:
        every = args.eval_steps
    else:
        every = steps_per_epoch
    if every < 1:  # a share of the run
        every = max(1, math.ceil(steps * every))
    planned = math.ceil(steps / every)
    limit = args.save_total_limit
    return int(min(planned, limit if limit and limit > 0 else planned))


def check_disk_space(output_dir: Path, size: CheckpointSize, checkpoints: int, *, resumes: bool) -> None:
    """Check that the adapter and that many checkpoints of a run fit on the disk.

    If the run resumes, the checkpoints in the folder are its own and count as free.
    """
    # One more of each: a new file lies beside the one that it replaces.
    needed = 2 * size.adapter_bytes + (checkpoints + 1) * size.checkpoint_bytes + OTHER_FILES_BYTES
    files = output_dir.glob("checkpoint-*/**/*") if resumes else ()
    needed -= sum(path.stat().st_size for path in files if path.is_file())
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        adapter, checkpoint, required, available = (
            f"{count / BYTES_PER_MIB:,.0f} MiB" for count in (size.adapter_bytes, size.checkpoint_bytes, needed, free)
        )
        raise UserError(
            f"--output_dir {output_dir}: {available} are free and this run needs {required}: adapters of {adapter} and "
            f"{checkpoints} checkpoints of {checkpoint}; make room, or give another folder, or a lower "
            "--save_total_limit"
        )
