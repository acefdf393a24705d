"""`python -m tests.fake_ollama --version 0.34.1 --store FOLDER`: the test server by itself, llama.cpp answering.

To see how something meets a version of Ollama, or to run the tests that OLLATUNE_TEST_OLLAMA points at a server.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path

from tests.fake_ollama.engine import LlamaCppRunner
from tests.fake_ollama.server import FakeOllama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", default="0.34.1")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder)
        runner = LlamaCppRunner()
        with FakeOllama(store, options.version, generate=runner, port=options.port) as server:
            print(
                f"{server.url} answers as Ollama {options.version}; its models are in {store}.",
                flush=True,
            )
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                runner.close()


if __name__ == "__main__":
    main()
