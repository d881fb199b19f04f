"""Quantized linear layers and caches: their formats, their exact arithmetic, and the checkpoints that hold them."""
