"""Folders that cannot be written, and paths of every kind."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

from benchmarks.faulting.world import World, start, wait
from tests.run_helpers import train_command

from ollatune.modeling.base import _looks_like_path
from ollatune.ollama.names import ModelName

SOURCE = Path(__file__).resolve().parents[2] / "src"
_SECONDS = 3.0
_STORAGE = 5


@dataclass(frozen=True)
class Denied:
    """A command in a place where something cannot be written.

    Attributes:
        what: what cannot be used; how: in which way.
        needed: whether the command needs it: it then ends with 5 before it loads a model, else it goes well.
    """

    what: str
    how: str
    needed: bool = True


DENIED = (
    Denied("output", "no permission"),
    Denied("output", "a read-only file system"),
    Denied("output", "a file is there"),
    Denied("checkpoints", "no permission"),
    Denied("checkpoints", "a file is there"),
    Denied("logs", "below a file"),
    Denied("working folder", "no permission"),
    Denied("export", "no permission"),
    Denied("preprocess", "a read-only file system"),
    Denied("caches", "no permission", needed=False),
    Denied("home", "there is none", needed=False),
    Denied("temporary folder", "nothing in it may be executed", needed=False),
)


def denied(world: World, attempt: int, rng: random.Random) -> str:
    """A real command, as a user without rights where this process has them."""
    case = DENIED[attempt]
    folder = world.new_output()
    for shared in (world.folder, folder):
        shared.chmod(0o755)
    with _place(folder / "place", case.how) as place:
        command, environment, cwd = _command(world, case, folder, place)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *(_HOMELESS if case.what == "home" else ("-m", "ollatune")), *command],
            env=environment, cwd=cwd, capture_output=True, text=True, check=False,
            **_without_rights(),
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    words = f"{case.what}, {case.how}: exit code {done.returncode}, {done.stderr[-300:]!r}"
    if not case.needed:
        return "" if done.returncode == 0 else words
    named = "models/trained" if case.what == "working folder" else str(place)
    is_said = named in done.stderr and done.stderr.count("error: ") == 1
    if done.returncode != _STORAGE or not is_said or "Base model" in done.stderr:
        return words
    return "" if seconds <= _SECONDS else f"{words} after {seconds:.1f} s of processor time"


def _command(
    world: World, case: Denied, folder: Path, place: Path
) -> tuple[list[str], dict[str, str], Path]:
    """Arguments, environment and working folder."""
    good = folder / "good"
    good.mkdir(mode=0o777)
    good.chmod(0o777)
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1",
        "HOME": str(good), "TMPDIR": str(good), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    output = place if case.what == "output" else good / "out"
    train = train_command(world.bases["lora"], world.data, output, "--max-steps", "1")
    if case.what in ("checkpoints", "logs"):
        train += ["--set", f"output.{case.what}={place}"]
    if case.what == "working folder":
        at = train.index("--output")
        return [*train[:at], *train[at + 2 :]], environment, place
    if case.what == "export":
        best = world.references["lora"] / "best_model.pt"
        train = ["create-modelfile", "--checkpoint", str(best), "--output", str(place / "export")]
    if case.what == "preprocess":
        train = ["preprocess", str(world.data / "train.jsonl"), "--output", str(place / "data")]
    if case.what == "caches":
        names = ("HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "OLLATUNE_CACHE")
        environment |= dict.fromkeys(names, str(place))
    if case.what == "home":
        del environment["HOME"]
    if case.what == "temporary folder":
        environment |= {"TMPDIR": str(place), "OLLATUNE_CACHE": str(place / "cache")}
        train += [
            "--set",
            "model.dtype=bf16",
        ]  # whose kernels are compiled there, and cannot be loaded
    return train, environment, good


@contextlib.contextmanager
def _place(path: Path, how: str) -> Iterator[Path]:
    """Something at `path` that cannot be used; with rights to mount, by a file system that says so."""
    if how == "a file is there" or how == "below a file":
        path.write_text("mine")
        yield path
    elif how in _MOUNTED and _mounted(path, _MOUNTED[how]):
        try:
            yield path
        finally:
            subprocess.run(["umount", "-l", str(path)], check=True)
    elif how == "nothing in it may be executed":
        path.mkdir(exist_ok=True)
        path.chmod(0o777)
        yield path
    elif os.geteuid() != 0 or _without_rights():
        path.mkdir(exist_ok=True)
        path.chmod(0o555)
        yield path
        path.chmod(0o755)
    elif how != _MOUNTED_READ_ONLY:  # root, whose children are root
        with _place(path, _MOUNTED_READ_ONLY) as place:
            yield place
    else:
        yield Path("/proc")  # where nobody can make a file


_MOUNTED_READ_ONLY = "a read-only file system"
_MOUNTED = {_MOUNTED_READ_ONLY: "ro", "nothing in it may be executed": "noexec,mode=777"}
_HOMELESS = (
    "-c",
    "import pwd, sys\n"
    "def nobody(number): raise KeyError(number)\n"
    "pwd.getpwuid = nobody\n"
    "from ollatune.cli import main\n"
    "sys.exit(main())",
)
"""Also where this user has a home: one that is in no list of users."""


def _mounted(path: Path, options: str) -> bool:
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size=16m,{options}", "tmpfs", str(path)]
    try:
        return subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@lru_cache(maxsize=1)
def _without_rights() -> dict[str, Any]:
    """Root may write everywhere: its children here are nobody, where nobody may run this Python."""
    rights: dict[str, Any] = {"user": 65533, "group": 65533, "extra_groups": []}
    if os.geteuid() != 0:
        return {}
    try:
        subprocess.run([sys.executable, "-c", ""], check=True, capture_output=True, **rights)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return rights


NAMES = (
    "with spaces", " leading space", "trailing space ", "trailing.", "...", "-leading", "--output",
    "naïve-é", "naïve-e\u0301", "数据", "مجلد", "😀", "~tilde", "~", "$HOME", "%TEMP%", "{brace}", "[1]",
    "*", "what?", "a'b\"c", "#hash", "a:b", "x=y", "comma, semicolon;", "back\\slash", "%20", "x" * 200,
)  # fmt: skip
WAYS = ("a link to a folder", "240 characters", "up and down again", "names that differ in case")
WINDOWS = (
    r"C:\models\base", "C:/models/base", r"d:\base.gguf", r"\\server\share\base", "//server/share/base",
    r"\\?\C:\long\base", r"models\base", r".\base",
)  # fmt: skip
NOT_PATHS = ("c:7b", "llama3.2:1b", "hf.co/org/repo:Q4_K_M", "registry.example:5000/org/model:tag")
"""Model names that begin like a drive, or look a little like a path."""


def paths(world: World, attempt: int, rng: random.Random) -> str:
    """Base, data, output and logs at a path of some kind: killed, resumed and exported there as anywhere else."""
    if attempt >= len(NAMES) + len(WAYS):
        return _windows((*WINDOWS,)[attempt - len(NAMES) - len(WAYS)])
    top = world.new_output()
    name = (*NAMES, *WAYS)[attempt]
    folder = _folder(top, name)
    base = Path(shutil.copy(world.bases["lora"], folder / "base.gguf"))
    data = Path(shutil.copytree(world.data, folder / "data"))
    output = folder / "out"
    output.mkdir()
    if name == "names that differ in case":
        (folder / "OUT").mkdir(exist_ok=True)
        (folder / "OUT" / "run.json").write_text("another's")
    command = world.command("lora", output)
    for flag, value in (("--model", base), ("--data", data)):
        command[command.index(flag) + 1] = str(value)
    if wait(start(command, faults="train.step:kill@6")) != -9:
        return f"{name}: was not killed: {(output / 'log').read_text()[-200:]}"
    if code := wait(start([*command, "--resume", "auto"])):
        return f"{name}: resume ended with {code}"
    if problem := world.differs("lora", output):
        return f"{name}: {problem}"
    export = folder / "export"
    export.mkdir()
    best = str(output / "best_model.pt")
    if code := wait(start(["create-modelfile", "--checkpoint", best, "--output", str(export)])):
        return f"{name}: export ended with {code}"
    is_whole = "FROM ./model.gguf\n" in (export / "Modelfile").read_text()
    return "" if is_whole else f"{name}: the Modelfile does not name the model beside it"


def _folder(top: Path, name: str) -> Path:
    """The folder that everything lies in."""
    ways: dict[str, Callable[[], Path]] = {
        "a link to a folder": lambda: _link(top),
        "240 characters": lambda: top / ("y" * (240 - len(str(top)) - 1)),
        "up and down again": lambda: top / "a" / ".." / "b",
    }
    folder = ways.get(name, lambda: top / name)()
    if name == "up and down again":
        (top / "a").mkdir()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _link(top: Path) -> Path:
    (top / "real").mkdir()
    (top / "link").symlink_to(top / "real", target_is_directory=True)
    return top / "link"


def _windows(name: str) -> str:
    """A path of Windows is a path and no model name, and what we write has names that Windows takes."""
    if not _looks_like_path(name):
        return f"{name} is taken for a model name"
    for model in NOT_PATHS:
        if _looks_like_path(model):
            return f"{model} is taken for a path"
        slug = ModelName.parse(model).slug
        if (
            PureWindowsPath(slug).name != slug
            or slug.endswith((".", " "))
            or set(slug) & set('<>:"|?*')
        ):
            return f"{slug} is no file name on Windows"
    return ""
