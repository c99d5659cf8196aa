"""Imports of the libraries at the start of a command, without what slows them down."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NO_COMPILER = "TORCHDYNAMO_DISABLE"  # torch's variable: functions decorated by torch.compile stay as they are


@contextmanager
def quick_imports() -> Iterator[None]:
    """Load libraries in the block without collecting garbage, and bitsandbytes without torch's compiler.

    Imports make half a million objects that live as long as the process. Looking through them again and again takes a
    fifth of the time, and nothing is found. Later collections leave them out.
    """
    if "torch" in sys.modules or not gc.isenabled():  # in a test, or in somebody's program
        yield
        return
    gc.disable()
    try:
        _import_bitsandbytes()
        yield
    finally:
        gc.freeze()
        gc.enable()


def _import_bitsandbytes() -> None:
    """Load bitsandbytes, as transformers' Trainer does through PEFT in every run, without torch's compiler.

    bitsandbytes 0.50 decorates four functions that unpack weights and update optimizers on devices without kernels of
    their own, which imports torch._inductor, a tenth of the time of a start. CUDA has kernels. A CPU needs them for
    rows of an odd length and very large blocks only, and computes them as written. torch reads the variable when a
    function is decorated, so that those decorated later are compiled. This can go once bitsandbytes does without.
    """
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if NO_COMPILER in os.environ or (device is not None and device.type != "cuda"):
        return
    os.environ[NO_COMPILER] = "1"
    try:
        import bitsandbytes  # noqa: F401  # for its effect on the imports that follow
    finally:
        del os.environ[NO_COMPILER]
