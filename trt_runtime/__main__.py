"""`python -m trt_runtime <verb>`."""

from refmodels.command import Verb, main

VERBS = {"generate": Verb("trt_runtime.cli", "generate"), "inspect": Verb("trt_runtime.cli", "inspect")}

if __name__ == "__main__":
    main(VERBS, "Run a bundle, or look into it.")
