"""Quantization algorithms, and calibration on top of them.

    observers.py    statistics of activations while they stream by: maxima, percentiles, a sample of tokens
    gptq.py         Hessian-based rounding (Frantar et al., arXiv:2210.17323)
    awq.py          activation-aware scales and clipping (Lin et al., arXiv:2306.00978)
    smoothquant.py  shifting activation outliers into weights (Xiao et al., arXiv:2211.10438)
    fold.py         a scale of input channels folded into the layer that produces the input
    method.py       one algorithm applied to the layers of a block

The arithmetic of quantized values (codes) is in `refmodels.quantization.arithmetic`; nothing here multiplies them.
"""
