"""GPU kernels of the two custom ops: one Triton source for torch, the TensorRT plugins and the benchmarks."""
