"""What is written to disk, and what of it can be gone on from."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from fastchat_qlora.arguments import TrainingArguments
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter import ADAPTER_FILE, trainable_parameters

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"

# What every strategy writes. `--save_only_model` leaves out the scheduler, and the optimizer with it.
COMPLETE = (STATE_FILE, "scheduler.pt", ADAPTER_FILE)


SAVED_DTYPE = torch.float32
"""Of every tensor in an adapter's file, whatever the strategy."""


def gather_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """Collect what was trained, on the CPU in `SAVED_DTYPE`, whole even where each process holds only a part.

    One parameter is gathered at a time and the base never is. Every process must call this.

    Returns:
        Name -> tensor of the parameter's full shape.
    """
    return {name: _whole(parameter).to(SAVED_DTYPE) for name, parameter in trainable_parameters(model).items()}


def _whole(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):  # DeepSpeed has taken it over
        import deepspeed

        # What is live is rounded to the compute dtype; the optimizer holds the fp32 value behind it.
        master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().cpu().clone()  # type: ignore[no-any-return]
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().cpu().clone()  # type: ignore[no-any-return]
    if hasattr(parameter, "full_tensor"):  # a DTensor of FSDP2
        parameter = parameter.full_tensor()
    return parameter.detach().cpu().clone()  # type: ignore[no-any-return]


def save_adapter(model: PeftModel, tensors: dict[str, torch.Tensor], folder: str) -> None:
    """Write an adapter as PEFT does. Embeddings are saved if they were trained; the hub is not asked about them."""
    model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)


def check_saved_adapter(
    folder: Path, model: PeftModel, trained: dict[str, torch.Tensor], *, must_have_learnt: bool = True
) -> None:
    """Open a saved adapter again and compare it with what was trained.

    Args:
        folder: where the adapter was saved.
        model: the model it was saved from, which knows PEFT's names for the tensors in the file.
        trained: the tensors that were to be saved, from `gather_adapter`.
        must_have_learnt: refuse an adapter whose every lora_B is zero; a checkpoint within the warm-up may be one.

    Raises:
        RunError: the file is missing or torn, a tensor in it is missing, misshapen, not finite or another one, or no
            lora_B has moved from zero.
    """
    path = folder / ADAPTER_FILE
    try:
        with safe_open(path, framework="pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: the saved adapter cannot be opened: {error}") from error
    expected = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    if saved.keys() != expected.keys() or len(saved) != len(trained):
        raise RunError(f"{path}: holds {len(saved)} tensors, {len(trained)} were trained; some are missing or too many")
    for name, tensor in saved.items():
        if tensor.shape != expected[name].shape or not torch.equal(tensor, expected[name]):
            raise RunError(f"{path}: {name} differs from the trained tensor, or is not finite")
    moved = [bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name]
    if must_have_learnt and moved and not any(moved):
        raise RunError(f"{path}: every lora_B is zero: the adapter has learnt nothing")


def find_last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that is complete enough to go on from; others are named with the reason."""
    for folder in _newest_first(Path(output_dir)):
        missing = [name for name in COMPLETE if not _has_content(folder / name)]
        if not missing:
            logger.info(f"Going on from {folder}.")
            return str(folder)
        logger.warning(f"{folder}: skipped, it has no {' and no '.join(missing)}.")
    return None


def _newest_first(output_dir: Path) -> Iterator[Path]:
    steps = {}
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and folder.is_dir():
            steps[int(match.group(1))] = folder
    yield from (steps[step] for step in sorted(steps, reverse=True))


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


ANEW = "start anew in another --output_dir, where --lora_weight_path goes on from what was learnt"


class SetUp(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is untyped
    """How a run is set up, written into the trainer state of its checkpoints.

    The optimizer's state is laid out by the strategy: read under another one it fails in the middle of loading, or is
    passed over in silence and the optimizer starts anew.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self.settings = dict(settings)

    def state(self) -> dict[str, Any]:
        """What transformers keeps of a callback in the trainer state."""
        return {"args": {"settings": self.settings}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have a place in a trainer state that was loaded from a checkpoint of earlier versions."""
        state.stateful_callbacks[type(self).__name__] = self.state()

    def check(self, checkpoint: str) -> None:
        """Require that a checkpoint was made by a run that was set up like this one.

        Raises:
            UserError: naming what differs, or that the checkpoint's trainer state cannot be read.
        """
        path = Path(checkpoint) / STATE_FILE
        try:
            callbacks = json.loads(path.read_text("utf-8")).get("stateful_callbacks", {})
            theirs = dict(callbacks.get(type(self).__name__, {}).get("args", {}).get("settings", {}))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: no trainer state can be read from it ({error!r}); {ANEW}") from error
        if not theirs:
            logger.warning(f"{checkpoint}: does not say how its run was set up; it is taken to be as this one.")
        changed = [
            f"{name}: {theirs[name]} then, {ours} now"
            for name, ours in self.settings.items()
            if theirs.get(name, ours) != ours
        ]
        if changed:
            raise UserError(
                f"{checkpoint}: this run is set up otherwise ({'; '.join(changed)}); set it up as before, or {ANEW}"
            )
