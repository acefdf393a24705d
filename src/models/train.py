"""Fine-tune a model: the same as `ollatune train`. The code is in src/ollatune/commands/."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this checkout's package, not this folder

from ollatune.base.leaving import leave
from ollatune.cli import main

if __name__ == "__main__":
    leave(main(["train", *sys.argv[1:]]))
