"""Executors for models of other projects; each implements `trt_runtime.engine.Engine`, so that diff accepts any."""
