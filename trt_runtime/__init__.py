"""Running a bundle: the bundle format, the engines, the cache bindings, generation.

    bundle.py              the directory that an export writes: bundle.json, the ONNX model, tokenizer, hashes
    engine.py              what every engine answers to, and the reference behind the same interface
    onnxruntime_engine.py  the CPU engine; rounding.py: how it imitates fp16 and bf16
    generate.py            greedy and sampled generation, the same code for the reference and for engines

May import: the standard library, torch, numpy and `refmodels`; onnxruntime (and later tensorrt) where they are needed.
It never imports export or debug: a bundle runs where nothing can be exported.
"""
