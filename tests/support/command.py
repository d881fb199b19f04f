"""Run the `logitlock` command inside the test process."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from debug.command import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def assert_bad_input(self, *said: str) -> None:
        """Exit code 2 and one clear line, no traceback, nothing on stdout."""
        assert self.code == 2, self
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        for text in said:
            assert text in self.err, self.err


def logitlock(*arguments: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["logitlock", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        else:
            raise AssertionError("main() must end with SystemExit")
    return Outcome(code, out.getvalue(), err.getvalue())
