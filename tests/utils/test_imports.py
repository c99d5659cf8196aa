"""Commands import only what they use, and leave garbage collection and torch's compiler as they were."""

import subprocess
import sys

import pytest
from launching import ROOT

UNUSED = {
    *("deepspeed", "matplotlib", "sklearn", "scipy", "tensorboard", "wandb", "triton"),
    *("torch._inductor.compile_fx", "torch._inductor.graph"),
}

RUN = """
import gc, os, sys
from fastchat_qlora import cli
code = cli.main(sys.argv[2:])
print(sorted({*sys.argv[1].split(",")} & {*sys.modules}), file=sys.stderr)

import torch
compiled = []
torch.compile(lambda x: x.sin() + 1, backend=lambda graph, _: compiled.append(graph) or graph)(torch.ones(2))
print(len(compiled), gc.isenabled(), "TORCHDYNAMO_DISABLE" in os.environ, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("command", ["inspect", "plan", "train --dry_run True"])
def test_commands_import_no_library_that_they_do_not_use(command: str, required: list[str]) -> None:
    argv = [sys.executable, "-c", RUN, ",".join(UNUSED), *command.split(), *required]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-2:] == ["[]", "1 True False"]
