"""trt_runtime"""
