"""`python -m export [<verb>]`: without a verb it exports."""

from refmodels.command import Verb, main

VERBS = {"export": Verb("export.cli", "export"), "quantize": Verb("export.quantization.cli", "quantize")}

if __name__ == "__main__":
    main(VERBS, "Export or quantize a model.", default="export")
