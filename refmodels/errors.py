"""The one exception that users see."""


class LogitLockError(Exception):
    """Bad input, said in one clear sentence: what was wrong, where, and what would be right.

    Every command line prints its text as one line and exits with code 2; nothing else is caught.
    """
