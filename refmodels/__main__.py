"""`python -m refmodels <verb>`."""

from refmodels.cli import make_app, models, run

if __name__ == "__main__":
    run(make_app("Numerical reference models.", [models]))
