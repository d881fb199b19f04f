"""The `logitlock` command: every verb of the four packages."""

from __future__ import annotations

from debug.__main__ import HELP, help_of
from debug.__main__ import VERBS as _DEBUG
from export.__main__ import VERBS as _EXPORT
from refmodels import command
from refmodels.__main__ import VERBS as _REFMODELS
from trt_runtime.__main__ import VERBS as _TRT_RUNTIME

VERBS = {**_EXPORT, **_TRT_RUNTIME, **_DEBUG, **_REFMODELS}


def main() -> None:
    """Run the command of `sys.argv` and leave the process."""
    command.main(VERBS, HELP, help_of=help_of)
