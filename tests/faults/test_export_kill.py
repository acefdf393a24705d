"""Kill an export at every kind of moment: the file under the final name is the old one or the new one, never a half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ollatune.base.files import clean_staging, sha256_file
from ollatune.gguf.reader import GGUFFile
from tests.export_cases import write_small_base

ROOT = Path(__file__).parents[2]

# One warm process forks a child for each moment; the child is killed at its n-th write, fsync or rename.
KILLER = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ollatune.export.apply import apply_export
from ollatune.export.plan import plan_export
from ollatune.gguf import writer
from ollatune.gguf.reader import GGUFFile
from tests.export_cases import random_update, shapes

base_path, folder, num_moments = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
name = "blk.0.attn_q.weight"

def export(output, moment):
    calls = 0
    def counted(function):
        def wrapper(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)
        return wrapper
    writer._HashingStream.write = counted(writer._HashingStream.write)
    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)
    with GGUFFile.open(base_path) as base:
        apply_export(plan_export(base, [random_update(name, shapes()[name])]), output)
    return calls

outcomes = []
for moment in range(1, num_moments + 1):
    output = folder / str(moment) / "model.gguf"
    output.parent.mkdir(parents=True)
    output.write_bytes(b"the export before")
    child = os.fork()
    if child == 0:
        export(output, moment)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    outcomes.append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
print(json.dumps({"outcomes": outcomes, "calls": export(folder / "whole" / "model.gguf", 0)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_export_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    num_moments = 48
    base = write_small_base(tmp_path / "base.gguf")
    command = [sys.executable, "-c", KILLER, str(base), str(tmp_path / "runs"), str(num_moments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    finished = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    told = json.loads(finished.stdout)
    # Every write of the model, its rename, and the report's were hit; later children ran to their end.
    assert told["outcomes"] == [9] * told["calls"] + [0] * (num_moments - told["calls"])
    assert 30 < told["calls"] < num_moments
    whole = sha256_file(tmp_path / "runs" / "whole" / "model.gguf")
    kept = {"old": 0, "new": 0}
    for moment in range(1, num_moments + 1):
        output = tmp_path / "runs" / str(moment) / "model.gguf"
        if output.read_bytes() == b"the export before":
            kept["old"] += 1
        else:
            assert sha256_file(output) == whole
            GGUFFile.open(output).close()
            kept["new"] += 1
        report = output.with_name("export.json")
        if output.read_bytes() != b"the export before" or report.exists():
            assert json.loads(report.read_text())["sha256"] == whole
        clean_staging(output.parent)
        assert {entry.name for entry in output.parent.iterdir()} <= {"model.gguf", "export.json"}
    assert kept["old"] >= 30
    assert kept["new"] >= num_moments - told["calls"]
