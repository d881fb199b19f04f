"""`python -m debug <verb>`."""

from debug.command import main

if __name__ == "__main__":
    main("python -m debug", package="debug")
