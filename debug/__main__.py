"""`python -m debug <verb>`."""

from debug.command import HELP, OWN_VERBS, help_of
from refmodels.command import main

if __name__ == "__main__":
    main(OWN_VERBS, HELP, help_of=help_of)
