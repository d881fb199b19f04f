"""A command of one verb that ends in different ways: the frame that all commands share, seen from outside."""

from __future__ import annotations

import os

from refmodels.command import Verb, main


def verb(what: str, count: int = 100_000) -> None:
    """Print, or fail as told."""
    if what == "print":
        print(("x" if count > 1 else "\u4e16") * count)
    if what == "denied":
        raise PermissionError(13, "Permission denied", "/secret")
    if what == "memory":
        raise MemoryError("9 GB")
    if what == "terminate":
        os.kill(os.getpid(), 15)
    if what == "bug":
        raise KeyError("bug")


if __name__ == "__main__":
    main({"verb": Verb("tests.support.frame", "verb")}, "Test.")
