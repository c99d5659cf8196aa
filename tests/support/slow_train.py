"""train_lora.py with steps that last long enough for a signal; for a launcher."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import planted

from fastchat_qlora.cli import program

planted.slow()
program(["train", *sys.argv[1:]])
