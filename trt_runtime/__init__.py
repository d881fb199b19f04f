"""Run a bundle: one `Engine` interface over the PyTorch reference, ONNX Runtime and (later) TensorRT, and generation
on top of it.

May import `refmodels`; never `export` or `debug`.
"""
