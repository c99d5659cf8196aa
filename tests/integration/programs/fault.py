"""train_lora.py with a fault: FAULT=kill|raise|stop at the beginning of the third step of rank FAULT_RANK."""

import os
import signal
import sys

from fastchat_qlora import cli
from fastchat_qlora.errors import RunError
from fastchat_qlora.training import run
from fastchat_qlora.training.callbacks import gradient_guards as guards


class Fault(guards.LossGuard):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ["RANK"] == os.environ["FAULT_RANK"]:
            if os.environ["FAULT"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"raise": MemoryError, "stop": RunError}[os.environ["FAULT"]]("planted fault")


run.LossGuard = Fault
cli.program(["train", *sys.argv[1:]])
