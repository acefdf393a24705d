"""An Ollama server for tests: HTTP over loopback, a store on disk, and the behaviour of a chosen version.

What it answers is held to recordings of real servers (`tests/parity/test_ollama_recordings.py`).
"""

from tests.fake_ollama.faults import Fault
from tests.fake_ollama.generation import (
    GeneratedToken,
    GenerateFunction,
    GenerationAnswer,
    GenerationRequest,
    scripted_answer,
)
from tests.fake_ollama.server import FakeOllama

__all__ = [
    "FakeOllama",
    "Fault",
    "GenerateFunction",
    "GeneratedToken",
    "GenerationAnswer",
    "GenerationRequest",
    "scripted_answer",
]
