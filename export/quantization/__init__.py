"""How codes and scales are found: the methods, and calibration on top of them.

    observers.py    what is kept of activations while they stream by: maxima, percentiles, a sample of tokens
    gptq.py         Hessian-based rounding (Frantar et al., arXiv:2210.17323)
    awq.py          activation-aware scales and clipping (Lin et al., arXiv:2306.00978)
    smoothquant.py  shifting activation outliers into weights (Xiao et al., arXiv:2211.10438)
    fold.py         a scale of input channels folded into what produces the input
    method.py       one method applied to the layers of a block

The arithmetic of codes is that of `refmodels.quantization.arithmetic`; nothing here computes a product of codes.
"""
