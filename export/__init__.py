"""From a reference model to a bundle: an ONNX file whose value names are the tap names, weights beside it.

    graph.py      torch.fx trace of the decoder -> ONNX nodes     functions.py   bodies of the refmodels:: functions
    weights.py    streaming the weights into external data        compile.py     the whole way, written atomically

May import: the standard library, torch, numpy, onnx, onnx_ir, `refmodels` and `trt_runtime` (for the bundle format).
It never imports debug.
"""
