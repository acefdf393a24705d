"""Export a checkpoint for Ollama: the same as `ollatune create-modelfile`. The code is in src/ollatune/commands/."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this checkout's package, not this folder

from ollatune.cli import main

if __name__ == "__main__":
    sys.exit(main(["create-modelfile", *sys.argv[1:]]))
