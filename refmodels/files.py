"""Reading files that others made, and writing files: the only module that does either.

Reading reports damage in one sentence with the file and the problem: a path that cannot be read, a pipe or device in
place of a file, an unreasonable size, text that is not UTF-8, JSON that is broken, nested too deep or full of digits.

A file is written as a whole or not at all: a temporary file beside it is filled and renamed.  Only a regular file or a
directory of ours is ever replaced, links are followed, the mode follows the umask, and temporary files of killed runs
are removed by the next run that writes to the same directory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import stat
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from refmodels.errors import LogitLockError

TEXT_BYTES = 256 << 20
"""Largest text file that is read as a whole, in bytes: tokenizers and index files of published models stay below a
tenth of it."""
JSON_DEPTH = 100
JSON_DIGITS = 40
"""Longest integer in a JSON file, in digits.  int64 has 19; the reader of a number refuses it if it does not fit."""

_START = 8192
"""Bytes of a file that are looked at to see of what kind it is."""
_TEMPORARY = re.compile(r"\.logitlock-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.tmp")
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"


def reason(error: OSError) -> str:
    """The operating system's message, without the path (the caller names it)."""
    return error.strerror or str(error) or type(error).__name__


def check_regular(path: Path, what: str = "") -> None:
    """Refuse a path that cannot be read as a file.

    Raises:
        LogitLockError: nothing exists there, it is a directory, a pipe, a socket or a device, or it cannot be accessed.
    """
    named = f"the {what} {path}" if what else f"{path}"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise LogitLockError(f"{named} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise LogitLockError(f"{named} is not a path: {error}") from None
    if not stat.S_ISREG(mode):
        raise LogitLockError(f"{named} cannot be read: it is {_kind_of(mode)}, not a file")


def _kind_of(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((text for test, text in kinds if test(mode)), "a device")


def read_bytes(path: Path, what: str = "", *, limit: int = TEXT_BYTES) -> bytes:
    """The contents of a regular file.

    Args:
        what: how errors name the file, such as "prompt file".
        limit: largest size in bytes.
    Raises:
        LogitLockError: as `check_regular`; larger than `limit`; or the read fails.
    """
    check_regular(path, what)
    named = f"the {what} {path}" if what else f"{path}"
    try:
        size = path.stat().st_size
        if size > limit:
            raise LogitLockError(f"{named} has {size} bytes; at most {limit} are read")
        return path.read_bytes()
    except OSError as error:
        raise LogitLockError(f"{named} cannot be read: {reason(error)}") from None


def read_text(path: Path, what: str = "", *, limit: int = TEXT_BYTES) -> str:
    """As `read_bytes`, as UTF-8 text (a byte-order mark is dropped).

    Raises:
        LogitLockError: as `read_bytes`, or not UTF-8.
    """
    data = read_bytes(path, what, limit=limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        named = f"the {what} {path}" if what else f"{path}"
        raise LogitLockError(f"{named} is not UTF-8: bad byte at {error.start}") from None


def parse_json(text: str | bytes, where: object) -> Any:
    """JSON with bounds on its depth and on the length of its integers.

    Args:
        where: how errors name the text: a file, or a file and a line.
    Raises:
        LogitLockError: not JSON, nested deeper than `JSON_DEPTH`, or an integer longer than `JSON_DIGITS`.
    """

    def integer(digits: str) -> int:
        if len(digits) > JSON_DIGITS:
            raise LogitLockError(f"{where} holds a number of {len(digits)} digits; at most {JSON_DIGITS} are read")
        return int(digits)

    try:
        content = json.loads(text, parse_int=integer)
    except RecursionError:
        raise LogitLockError(f"{where} is nested too deep; at most {JSON_DEPTH} levels are read") from None
    except ValueError as error:
        raise LogitLockError(f"{where} is not valid JSON: {error}") from None
    if _deeper_than(content, JSON_DEPTH):
        raise LogitLockError(f"{where} is nested too deep; at most {JSON_DEPTH} levels are read")
    return content


def _deeper_than(content: Any, depth: int) -> bool:
    level = [content]
    for _ in range(depth):
        level = [item for value in level for item in _items(value)]
        if not level:
            return False
    return True


def _items(value: Any) -> Iterator[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (v for v in values if isinstance(v, dict | list))


@contextlib.contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Turn an error of the operating system while `path` is written into one sentence.

    Raises:
        LogitLockError: a full disk, no permission, a read-only place, a name too long, a loop of links, ...
    """
    try:
        yield
    except OSError as error:
        other = error.filename
        if isinstance(other, str) and not Path(other).absolute().is_relative_to(path.absolute().parent):
            raise LogitLockError(f"{other}: {reason(error)}") from None
        raise LogitLockError(f"the {what} {path} cannot be written: {reason(error)}") from None
    except Exception as error:
        # safetensors wraps the operating system's error in one of its own.
        if type(error).__name__ == "SafetensorError" and "os error" in str(error).lower():
            raise LogitLockError(f"the {what} {path} cannot be written: {error}") from None
        raise


def check_file_output(path: Path, what: str, mark: str | None = None) -> Path:
    """The path at which a file named `path` is written: links are followed.  Call it before the work.

    Args:
        what: how errors name the file, such as "report".
        mark: text near the start of every such file.  An existing file is replaced only if it has them, or is empty;
            None: never.
    Raises:
        LogitLockError: an empty or impossible path, no directory to put it into, one that cannot be written to, or
            something there that is not a file of this kind.
    """
    if not str(path) or path.name in ("", "..") or str(path) == ".":
        raise LogitLockError(f"the {what} {str(path)!r} cannot be written: it names no file")
    with writing(what, path):
        try:
            target = path.resolve()
            mode = target.stat().st_mode
        except FileNotFoundError:
            mode = 0
        except (ValueError, RuntimeError) as error:
            raise LogitLockError(f"the {what} {path} cannot be written: {error}") from None
        if mode and not stat.S_ISREG(mode):
            raise LogitLockError(f"the {what} {path} cannot be written: it is {_kind_of(mode)}, not a file")
        if mode and not _replaceable(target, mark):
            raise LogitLockError(
                f"the {what} {path} cannot be written: it exists and is no {what} of LogitLock; choose another "
                "name, or delete it first"
            )
        if not target.parent.is_dir():
            raise LogitLockError(f"the {what} {path} cannot be written: there is no directory {path.parent}")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise LogitLockError(f"the {what} {path} cannot be written: the directory {path.parent} is read-only")
        # A name that is too long is reported now, not after the work.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)
    return target


def _replaceable(file: Path, mark: str | None) -> bool:
    with file.open("rb") as stream:
        start = stream.read(_START)
    return not start or (mark is not None and mark.encode() in start)


@contextlib.contextmanager
def write_file(path: Path, what: str, mark: str | None = None) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all.

    Yields a temporary path beside it; on success that is renamed to `path`, on any exception it is removed.

    Args:
        what, mark: as `check_file_output`.
    Raises:
        LogitLockError: as `check_file_output` and `writing`.
    """
    target = check_file_output(path, what, mark)
    temporary = temporary_beside(target)
    try:
        with writing(what, path):
            yield temporary
            temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, what: str, mark: str | None = None) -> None:
    """Write a UTF-8 file as `write_file` does."""
    assert mark is None or mark in text[:_START]
    with write_file(path, what, mark) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def write_directory(output: Path, what: str, *, replace: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Write a directory so that it appears whole or not at all.

    Yields a temporary directory beside it; on success that is renamed to `output`, on any exception it is removed.

    Args:
        what: how errors name the directory, such as "bundle".
        replace: checks (and raises) whether what is at `output` may be replaced; None: it must be missing or empty.
    Raises:
        LogitLockError: as `writing`, or something else has appeared at `output` meanwhile.
    """
    with writing(what, output):
        output = output.absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        # A name that is too long is reported now, not after the work.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(output)
        temporary = temporary_beside(output)
        temporary.mkdir()
    try:
        with writing(what, output):
            yield temporary
            if replace is not None:
                replace(output)
            _put(temporary, output, what, overwrite=replace is not None)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put(temporary: Path, output: Path, what: str, *, overwrite: bool) -> None:
    old = None
    if overwrite and output.is_dir() and any(output.iterdir()):
        # A directory cannot be replaced in one step; the old one stays complete until the new one is in place.
        # Not the name of a temporary: if this run is killed in between, no later one may remove the only bundle left.
        old = temporary_beside(output).with_suffix(".old")
        output.rename(old)
    try:
        temporary.rename(output)
    except BaseException as error:
        if old is not None:
            old.rename(output)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise LogitLockError(f"the {what} {output} was written by another run meanwhile; it is kept") from None
        raise
    if old is not None:
        shutil.rmtree(old)
    sync(output.parent)


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of a directory that match any pattern, such as "*.json" or "folder/*.txt", to the same place in
    another one."""
    for path in (path for pattern in patterns for path in sorted(source.glob(pattern))):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def temporary_beside(target: Path) -> Path:
    """An unused path in the directory of `target`; temporary files of dead runs there are removed.

    Its name does not contain the target's, which may already be as long as names can be.
    """
    for found in target.parent.glob(".logitlock-*.tmp"):
        match = _TEMPORARY.fullmatch(found.name)
        if match and match["host"] == _HOST and not _alive(int(match["pid"])):
            with contextlib.suppress(OSError):
                shutil.rmtree(found) if found.is_dir() and not found.is_symlink() else found.unlink()
    return target.parent / f".logitlock-{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
