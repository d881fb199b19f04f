"""The catalogue of known faults: each a small change of one reference module, by name.

A fault is a function from a `Module` and the engine's output to the changed arguments under which the reference makes
the same mistake.  It yields as many variants as the mistake has (other thetas, off by one either way), each with a few
words that say which.  Where the mistake is a number (an epsilon, a scale), it is first estimated from what the engine
showed.  A new fault is one decorated function in the file of its kind.
"""

from debug.comparison.faults import attention, linear, pointwise, quantized, rotation
from debug.comparison.faults.catalogue import CATALOGUE, Fault

__all__ = ["CATALOGUE", "Fault", "attention", "linear", "pointwise", "quantized", "rotation"]
