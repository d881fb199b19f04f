"""Lower a reference model to ONNX.

`export_model` writes a bundle: a graph whose custom nodes (`refmodels::FusedRmsNorm`, `refmodels::CachedAttention`)
carry their own function bodies and whose values have the names of the taps, with weights streamed from the checkpoint.
`graph` traces the decoder with `torch.fx` and lowers it through one table, `functions` has the bodies, `weights` writes
external data, `compile` makes the bundle.

May import refmodels and trt_runtime (the bundle format); never debug.
"""
