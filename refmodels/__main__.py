"""`python -m refmodels <verb>`."""

from refmodels.cli import models
from refmodels.command import make_app, run

if __name__ == "__main__":
    run(make_app("Numerical reference models.", [models]))
