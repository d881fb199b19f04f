"""Run one command with damaged input, in this process, and say what it did that a command must not do."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from debug.command import main
from refmodels.notices import LOGGER
from tests.support.fuzz.damage import damages_of, restore
from tests.support.fuzz.scenarios import SCENARIOS, Scenario, damage_arguments, kind_of, special_places

SECONDS, WAITING = 10, 60
"""Of the processor, and of waiting for it or for a pipe, after which a command on these small models is taken to
hang."""
MEMORY = 4 << 30
"""Address space, in bytes, that a command may take beyond what the process has: the inputs have a megabyte."""
LONGEST = 1500
"""Of an error message, in characters."""


@dataclass(frozen=True)
class Case:
    """A scenario with one file damaged (a path in the corpus), or with other arguments (None)."""

    scenario: Scenario
    file: Path | None

    @property
    def kind(self) -> str:
        return "arguments" if self.file is None else kind_of(self.file)


@dataclass
class Verdict:
    """What a run did.  `faults` is empty if it behaved."""

    kind: str
    line: str
    said: str
    code: int | None = None
    out: str = ""
    err: str = ""
    seconds: float = 0
    faults: list[str] = field(default_factory=list)


def cases_of(corpus: Path) -> dict[str, list[Case]]:
    """Every pair of a scenario and a file that it reads, by kind of file; and every scenario for its arguments."""
    found: dict[str, list[Case]] = {}
    for scenario in SCENARIOS:
        files: list[Path | None] = [None]
        for name in scenario.reads:
            root = corpus / name.split("/")[0]
            paths = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
            files += [p.relative_to(corpus) for p in paths if not re.fullmatch(scenario.ignored, p.name)]
        for file in files:
            case = Case(scenario, file)
            found.setdefault(case.kind, []).append(case)
    return found


def play(rng: random.Random, case: Case, corpus: Path, folder: Path) -> Verdict:
    """Copy what the case reads into `folder`, which must not exist, damage it, run the command there and judge it."""
    folder.mkdir()
    for name in case.scenario.reads:
        root = name.split("/")[0]
        if not (folder / root).exists():
            restore(corpus / root, folder / root)
    words, said = case.scenario.words(), ""
    if case.file is None:
        special_places(folder)
        words, said = damage_arguments(rng, case.scenario)
    else:
        said = f"{case.file}: {rng.choice(damages_of(folder / case.file))(rng, folder / case.file)}"
        bundle = folder / case.file.parts[0] / "bundle.json"
        if bundle.is_file() and case.file.name != "bundle.json" and rng.random() < 0.7:
            said += ", hashes made anew" * _hash_again(bundle)
    verdict = Verdict(case.kind, " ".join(words)[:300], said)
    before = _state(folder)
    with _memory_limit(MEMORY):
        _run(verdict, words, folder)
    _judge(verdict, before, _state(folder), case)
    _make_removable(folder)
    shutil.rmtree(folder)
    return verdict


def _hash_again(manifest: Path) -> bool:
    """As somebody would who edits a bundle: bundle.json says what its files are now."""
    import json

    from trt_runtime.bundle import file_sha256

    facts = json.loads(manifest.read_text())
    for name in facts["files"]:
        path = manifest.parent / name
        if not stat.S_ISREG(path.lstat().st_mode) if path.is_symlink() or path.exists() else True:
            return False
        if path.stat().st_size > 1 << 30:
            return False
        facts["files"][name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    manifest.write_text(json.dumps(facts))
    return True


def _state(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(at, name))
            path = os.path.relpath(os.path.join(at, name), folder)
            regular = stat.S_ISREG(status.st_mode)
            found[path] = (status.st_mode, status.st_ino, *((status.st_size, status.st_mtime_ns) if regular else ()))
    return found


def _run(verdict: Verdict, words: list[str], folder: Path) -> None:
    """With the descriptors of stdout and stderr caught too: libraries in C++ write to them."""
    start, handlers = time.process_time(), list(LOGGER.handlers)
    where, temporary = os.getcwd(), tempfile.mkdtemp()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with (
            _streams(out.fileno(), err.fileno()),
            mock.patch.object(sys, "argv", ["logitlock", *words]),
            mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}),
            mock.patch.object(tempfile, "tempdir", temporary),
            warnings.catch_warnings(record=True) as warned,
            _alarm(),
        ):
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", ResourceWarning)
            os.chdir(folder)
            try:
                main()
            except SystemExit as left:
                verdict.code = left.code if isinstance(left.code, int) else 0
            except BaseException as error:
                last = traceback.extract_tb(error.__traceback__)
                ours = [f for f in last if "/.venv/" not in f.filename and "/usr/" not in f.filename]
                places = " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (*ours[-3:], last[-1]))
                verdict.faults.append(f"{type(error).__name__} at {places}: {str(error)[:150]}")
            finally:
                os.chdir(where)
        verdict.seconds = time.process_time() - start
        out.seek(0), err.seek(0)
        verdict.out, verdict.err = (stream.read().decode("utf-8", "replace") for stream in (out, err))
    # transformers says of itself what it will not do in the future.
    said = [w for w in warned if not issubclass(w.category, FutureWarning)]
    verdict.faults += [f"noise: {w.category.__name__} {str(w.message)[:150]}" for w in said]
    verdict.faults += [f"left in the temporary directory: {name}" for name in os.listdir(temporary)]
    shutil.rmtree(temporary)
    for handler in set(LOGGER.handlers) - set(handlers):
        LOGGER.removeHandler(handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _judge(verdict: Verdict, before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]], case: Case) -> None:
    faults, out = verdict.faults, verdict.out
    if verdict.seconds > SECONDS and not any("_TooLong" in fault for fault in faults):
        faults.append(f"took {verdict.seconds:.0f} s")
    lines = [line for line in verdict.err.splitlines() if not line.startswith(("engine: ", "sampling: ", "warning: "))]
    if verdict.code not in (0, 1, 2, None):
        faults.append(f"exit code {verdict.code}")
    if verdict.code == 2:
        if len(lines) != 1 or not lines[0].startswith("error: "):
            faults.append(f"stderr: {lines[:4]}"[:400])
        # The page of `check`, and of `inspect` where there is no bundle, is its answer: it names what is refused.
        if out and not (case.scenario.verb in ("check", "inspect") and re.search(r"^ refused ", out, re.MULTILINE)):
            faults.append(f"stdout of a refusal: {out[:100]!r}")
    elif verdict.code in (0, 1) and lines:
        faults.append(f"stderr of a success: {lines[:4]}"[:400])
    for line in lines:
        if len(line) > LONGEST:
            faults.append(f"a line of {len(line)} characters: {line[:120]}")
        if re.search(r"\.(cc|cpp|h|rs):\d+|Traceback|\x1b|object at 0x", line):
            faults.append(f"insides: {line[:300]}")
    allowed = {name for name in case.scenario.writes}
    given = case.file is None
    for path in after.keys() - before.keys():
        # A proposal goes through a link that is given as a map.
        mine = path.split("/")[0] in (*allowed, *["nowhere", "map.json"] * (case.kind == "name map"))
        mine = mine or (given and not path.startswith((".logitlock", "prompts/")))
        if not (verdict.code in (0, 1) and mine):
            faults.append(f"left behind: {path}")
    for path in before.keys() - after.keys():
        faults.append(f"removed: {path}")
    for path in before.keys() & after.keys():
        if before[path] != after[path]:
            faults.append(f"changed: {path}")


class _TooLong(BaseException):
    pass


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def late(number: int, frame: types.FrameType | None) -> None:
        raise _TooLong(f"after {SECONDS} s of computing or {WAITING} s of waiting")

    old = [signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING, WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _streams(out: int, err: int) -> Iterator[None]:
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(out, 1), os.dup2(err, 2)
    try:
        with (
            open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as new_out,
            open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1) as new_err,
            mock.patch.object(sys, "stdout", new_out),
            mock.patch.object(sys, "stderr", new_err),
        ):
            yield
    finally:
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        os.close(kept[0]), os.close(kept[1])


@contextlib.contextmanager
def _memory_limit(more: int) -> Iterator[None]:
    """A command that a number in a file makes greedy ends in an error, not with the machine's memory."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _make_removable(folder: Path) -> None:
    for at, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(at, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
