"""The exceptions that users see."""


class LogitLockError(Exception):
    """Bad input, described in one clear sentence: what is wrong, where, and what would be right.

    Every command line prints its text as one line and exits with code 2; nothing else is caught.  Names from a damaged
    file can hold anything, so characters that cannot be printed are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class NoTokenizerError(LogitLockError):
    """A directory without any tokenizer file.  Damaged files are a `LogitLockError`, never this."""
