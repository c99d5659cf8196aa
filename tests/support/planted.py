"""Faults for a forked run: PREPARE=planted:NAME calls one of these before the run begins."""

import errno
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from fastchat_qlora.data.batching import steps
from fastchat_qlora.distributed import waiting
from fastchat_qlora.model.adapter.lora import get_trainable_parameters
from fastchat_qlora.training import run
from fastchat_qlora.training.callbacks import gradient_guards as guards

SLOW_STEP = 0.15  # seconds


def slow() -> None:
    """Make steps last long enough for a signal."""
    _at_step(0, lambda model: None)


def cache_of_the_rank() -> None:
    """Give each process a cache of the hub of its own, as machines have."""
    constants.HF_HUB_CACHE = os.environ[f"CACHE_OF_RANK_{os.environ['RANK']}"]


def endless_third_step() -> None:
    """Make the third step last as long as the process, and write a line when it begins."""

    def stay(model: Any) -> None:
        sys.stderr.write("third step\n")
        _wait_in_c()

    _at_step(2, stay, slow=False)


def _wait_in_c() -> None:
    """Wait as for a device or for another process: outside of Python, without its lock."""
    import ctypes

    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(60)  # a signal ends it, and the handler runs


def late_rank_1() -> None:
    """Let the second process come late to the first step, and log waits of a second."""
    build = run._build_trainer

    def build_late(*args: Any) -> Any:
        if os.environ["RANK"] == "1":
            time.sleep(4)
        return build(*args)

    run._build_trainer = build_late
    short_waits()


def short_waits() -> None:
    """Log waits of a second."""
    report = waiting.reporting_waits
    waiting.reporting_waits = lambda: report(1.0)


def small_files() -> None:
    """Allow no file larger than 4 KiB from the third step on: a real error of the operating system."""
    _at_step(2, lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)), slow=False)


def small_files_on_rank_1() -> None:
    """Do the same in the second process only."""
    if os.environ["RANK"] == "1":
        small_files()


def full_disk() -> None:
    """Fill the disk in the third step, as another program might."""

    def fill(model: Any) -> None:
        ballast = os.open(os.environ["BALLAST"], os.O_WRONLY | os.O_CREAT)
        for size in (1 << 20, 1 << 12):  # to the last page
            with suppress(OSError):
                while True:
                    os.write(ballast, bytes(size))
        os.close(ballast)

    _at_step(2, fill, slow=False)


def counted_passes() -> None:
    """Write the number of passes of each step; prefer those of PASS tokens, if there is such a variable."""
    if preferred := os.environ.get("PASS"):
        steps.PREFERRED_TOKENS["cpu"] = int(preferred)

    class Counted(run.LoraTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
            if self.args.process_index == 0:
                with Path(self.args.output_dir, "passes.txt").open("a") as file:
                    file.write(f"{len(inputs)}\n")
            return super().training_step(model, inputs, *args)

    run.LoraTrainer = Counted


def lost_writes() -> None:
    """Let the disk lose writes from the third step on, and report it on fsync."""

    def lose(model: Any) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        os.fsync = fsync

    _at_step(2, lose, slow=False)


def stop_at_the_best() -> None:
    """Send SIGTERM in the fifth step, the last of the first epoch of 15 sequences in batches of 3."""
    _at_step(4, lambda model: os.kill(os.getpid(), signal.SIGTERM), slow=False)


def signal_in_step() -> None:
    """Send the signal SIGNAL within the step of number STEP."""
    step, signum = int(os.environ["STEP"]), int(os.environ["SIGNAL"])
    _at_step(step - 1, lambda model: os.kill(os.getpid(), signum), slow=False)


def no_results() -> None:
    """Let the disk be full at the end of the run."""

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.LoraTrainer.save_metrics = fail


def detached_adapter() -> None:
    """End gradients at the second layer, so that the first one's adapter gets none."""
    _change_model(lambda model: model.model.layers[0].register_forward_hook(lambda m, given, out: _detached(out)))


def _detached(out: Any) -> Any:
    return out.detach().requires_grad_() if isinstance(out, torch.Tensor) else (out[0].detach(), *out[1:])


def zeroed_lora_b() -> None:
    """Reset the adapter to zero at the end."""

    def forget(model: Any) -> None:
        for name, parameter in get_trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.data.zero_()

    class Forgetful(guards.LossGuard):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            forget(kwargs["model"])

    run.LossGuard = Forgetful


def changed_base() -> None:
    """Write to a base weight in the third step."""

    def change(model: Any) -> None:
        next(parameter for parameter in model.parameters() if not parameter.requires_grad).data.view(-1)[5] += 1

    _at_step(2, change, slow=False)


def corrupt_writer() -> None:
    """Let safetensors write a file in which a tensor differs."""
    save = run.LoraTrainer.save_model

    class CorruptWriter(run.LoraTrainer):
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            from fastchat_qlora.training.checkpoints import adapter_export

            write = adapter_export.save_adapter

            def corrupt(model: Any, tensors: dict[str, torch.Tensor], folder: str) -> None:
                wrong = {name: tensor + 1e-3 * (self.state.global_step > 2) for name, tensor in tensors.items()}
                write(model, wrong, folder)

            adapter_export.save_adapter = corrupt
            save(self, output_dir, _internal_call)

    run.LoraTrainer = CorruptWriter


def no_answers_after_on_rank_1() -> None:
    """Let the second process have no memory for prompts after the first step."""
    from fastchat_qlora.training.callbacks import sample_generations

    ask = sample_generations._compute_last_logits

    def fail(trainer: Any, *args: Any) -> torch.Tensor:
        if os.environ["RANK"] == "1" and trainer.state.global_step:
            raise torch.OutOfMemoryError("out of memory")
        return ask(trainer, *args)

    sample_generations._compute_last_logits = fail


def _change_model(change: Any) -> None:
    attach = run.attach_adapter

    def attached(*args: Any, **kwargs: Any) -> Any:
        model = attach(*args, **kwargs)
        change(model.get_base_model())
        return model

    run.attach_adapter = attached


def _at_step(step: int, fault: Any, *, slow: bool = True) -> None:
    import time

    class Planted(guards.LossGuard):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if slow:
                time.sleep(SLOW_STEP)
            if state.global_step == step:
                fault(kwargs["model"])
                Path(args.output_dir, ".planted").touch()

    run.LossGuard = Planted
