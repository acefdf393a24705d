"""Fixtures of the tests that hold runs to one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run_helpers import write_records


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of records that does not divide evenly: 17 to train on, three to validate with."""
    return write_records(tmp_path_factory.mktemp("data"), train=17, validation=3, test=0)
