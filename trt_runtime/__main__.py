from refmodels.command import make_app, run
from trt_runtime.cli import generate, inspect

if __name__ == "__main__":
    run(make_app("Run a bundle, or look into it.", [generate, inspect]))
