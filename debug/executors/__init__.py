"""Executors of models that are not ours; each answers to `trt_runtime.engine.Engine`, so that diff takes any."""
