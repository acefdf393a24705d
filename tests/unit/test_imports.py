"""Importing large packages: no collection meanwhile, nothing lost of the collector's settings after."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from ollatune.base.imports import first_import_of


def test_no_collection_in_the_block_and_what_is_alive_is_frozen() -> None:
    before = gc.get_freeze_count()
    try:
        with first_import_of("a_module_that_is_not_there"):
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_a_failed_import_leaves_the_collector_on() -> None:
    try:
        with (
            pytest.raises(ModuleNotFoundError),
            first_import_of("a_module_that_is_not_there"),
        ):
            import a_module_that_is_not_there  # noqa: F401
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_later_imports_change_nothing() -> None:
    before = gc.get_freeze_count()
    with first_import_of("gc"):
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with first_import_of("a_module_that_is_not_there"):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_training_imports_no_tables_plots_or_compiler_of_its_own() -> None:
    """What a run on JSON lines does not use is not imported before its model is."""
    script = (
        "import sys, ollatune.training.session, ollatune.modeling.fast.forward; "
        "print([m for m in ('pyarrow', 'matplotlib', 'transformers', 'accelerate', 'peft', 'torch._dynamo') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
