"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Several pytest workers with as many threads each as there are cores wait for one another, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct GGUF (Q4_1), fetched once into the user cache."""
    from ollatune.base.errors import OllatuneError
    from ollatune.modeling.embedded import fetch_embedded

    try:
        return fetch_embedded("smollm2-135m")
    except OllatuneError as error:
        pytest.skip(str(error))
