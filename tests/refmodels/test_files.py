"""Reading and writing files: damage is one sentence of error; an output is whole, and never replaces a device."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from refmodels import files
from refmodels.errors import LogitLockError
from refmodels.files import (
    check_file_output,
    parse_json,
    read_bytes,
    read_text,
    temporary_beside,
    write_directory,
    write_file,
    write_text,
    writing,
)
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deep"),
        ("[" * 101 + "]" * 101, "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"a": -' + "9" * 41 + "}", "a number of 42 digits"),
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
)
def test_json_beyond_reason(text: str, said: str) -> None:
    with pytest.raises(LogitLockError, match=said) as caught:
        parse_json(text, "config.json")
    assert str(caught.value).startswith("config.json ") and "\n" not in str(caught.value)


def test_json_within_reason() -> None:
    content = parse_json("[" * 100 + "]" * 100, "f")
    for _ in range(99):
        (content,) = content
    assert content == [] and parse_json("9" * 40, "f") == int("9" * 40)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    kinds = {
        "pipe": "it is a pipe",
        ".": "it is a directory",
        "loop": "Too many levels|symbolic links",
        "absent": "No such file",
        "x" * 300: "File name too long",
        "a\0b": "is not a path",
    }
    for name, said in kinds.items():
        with pytest.raises(LogitLockError, match=said):
            read_bytes(tmp_path / name, "prompt file")
    with pytest.raises(LogitLockError, match="it is a device"):
        read_bytes(Path("/dev/zero"))


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"\xef\xbb\xbfa")
    assert read_text(path) == "a"
    path.write_bytes(b"ab\xff")
    with pytest.raises(LogitLockError, match=r"the prompt file .* is not UTF-8: bad byte at 2"):
        read_text(path, "prompt file")
    with pytest.raises(LogitLockError, match="has 3 bytes; at most 2 are read"):
        read_text(path, limit=2)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_text(path, "old", "report", "old")
    with pytest.raises(KeyError), write_file(path, "report", "old") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "f", "", "report")
        with write_directory(tmp_path / "d", "bundle"):
            pass
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in "fd"] == [0o640, 0o750]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "text", "report")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, said in [
        (tmp_path / "pipe", "it is a pipe, not a file"),
        (tmp_path, "it is a directory, not a file"),
        (Path("/dev/null"), "it is a device, not a file"),
        (tmp_path / "loop", "Too many levels|symlink loop|Symlink loop"),
        (tmp_path / "absent" / "f", "there is no directory"),
        (tmp_path / ("x" * 256), "File name too long"),
        (tmp_path / "a\0", "null"),
        (Path("."), "names no file"),
        (Path(""), "names no file"),
    ]:
        with pytest.raises(LogitLockError, match=f"the trace .* cannot be written: .*(?:{said})"):
            check_file_output(path, "trace")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    said = r"the bundle .*/b cannot be written: No space left on device"
    with pytest.raises(LogitLockError, match=said), write_directory(tmp_path / "b", "bundle") as made:
        (made / "part").write_text("")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not os.listdir(tmp_path)


def test_an_error_of_reading_is_not_said_to_be_of_writing(tmp_path: Path) -> None:
    with pytest.raises(LogitLockError, match=r"^/elsewhere/weights: Permission denied$"), writing("bundle", tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/weights")


def test_a_directory_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "b"
    said = "was written by another run meanwhile"
    with pytest.raises(LogitLockError, match=said), write_directory(output, "bundle"):
        output.mkdir()
        (output / "theirs").write_text("")
    assert os.listdir(tmp_path) == ["b"] and os.listdir(output) == ["theirs"]


@pytest.mark.slow
def test_temporaries_of_killed_runs_are_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from refmodels.files import write_directory, write_file\n"
        "with write_directory(pathlib.Path(sys.argv[1]) / 'b', 'bundle') as made:\n"
        "    (made / 'part').write_text('x')\n"
        "    with write_file(pathlib.Path(sys.argv[1]) / 'f', 'trace') as temporary:\n"
        "        temporary.write_text('x')\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=ROOT, timeout=60)
    assert len(os.listdir(tmp_path)) == 2
    of_this_run = temporary_beside(tmp_path / "b")
    assert os.listdir(tmp_path) == []
    of_this_run.write_text("")
    other_host = tmp_path / ".logitlock-00000000-1-00000000.tmp"
    other_host.write_text("")
    temporary_beside(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == sorted([other_host.name, of_this_run.name])


def frame(what: str, tail: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = f'"{sys.executable}" -m tests.support.frame verb {what} {tail}'
    env = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, timeout=60, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("denied", 2, "error: /secret: Permission denied\n"),
        ("memory", 2, "error: this needs more memory than is available: 9 GB\n"),
        ("terminate", 143, ""),
    ],
)
def test_what_the_system_refuses_is_bad_input(what: str, code: int, said: str) -> None:
    done = frame(what)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.slow
def test_a_reader_that_has_gone() -> None:
    done = frame("print", '| head -c 1; exit "${PIPESTATUS[0]}"')
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_a_full_output() -> None:
    done = frame("print", "> /dev/full")
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.slow
def test_text_that_the_output_cannot_show_is_escaped() -> None:
    done = frame("print", "--count 1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "\\u4e16\n")


@pytest.mark.slow
def test_a_bug_keeps_its_traceback() -> None:
    done = frame("bug")
    assert done.returncode == 1 and "KeyError: 'bug'" in done.stderr


def test_the_host_is_a_part_of_a_temporarys_name(tmp_path: Path) -> None:
    assert files._TEMPORARY.fullmatch(temporary_beside(tmp_path / "b").name)


def test_an_output_replaces_only_its_own_kind(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_text(file, "made by us: 1", "page", "made by us")
    write_text(file, "made by us: 2", "page", "made by us")
    assert file.read_text() == "made by us: 2"
    with pytest.raises(LogitLockError, match="exists and is no page of LogitLock"):
        write_text(file, "3", "page")
    for content in (b"somebody's", b"\x00" * 9000 + b"made by us"):
        file.write_bytes(content)
        with pytest.raises(LogitLockError, match="exists and is no page of LogitLock; choose another name"):
            write_text(file, "made by us: 3", "page", "made by us")
        assert file.read_bytes() == content
    file.write_bytes(b"")  # as mktemp leaves it
    write_text(file, "made by us: 4", "page", "made by us")
    assert file.read_text() == "made by us: 4"


@pytest.mark.parametrize(
    "arguments",
    [
        ("trace", "reference", "--model", "qwen", "--out"),
        ("diff", "reference:fp16", "--model", "qwen", "--html"),
        ("diff", "reference:fp16", "--model", "qwen", "--junit"),
        ("verify", GOLDENS / "qwen_b1", "--junit"),
        ("bisect", "--model", "qwen", "--out"),
        ("eval", "reference:fp16", "--model", "qwen", "--against", "reference", "--markdown"),
    ],
)
def test_no_verb_writes_over_a_foreign_file(arguments: tuple[object, ...], tmp_path: Path) -> None:
    """It says so before it runs."""
    file = tmp_path / "config.json"
    file.write_text('{"precision": "fp16"}')
    logitlock(*arguments, file).assert_bad_input(str(file), "exists and is no")
    assert file.read_text() == '{"precision": "fp16"}' and list(tmp_path.iterdir()) == [file]
