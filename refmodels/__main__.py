"""`python -m refmodels <verb>`."""

from refmodels.command import Verb, main

VERBS = {"models": Verb("refmodels.cli", "models")}

if __name__ == "__main__":
    main(VERBS, "Numerical reference models.")
