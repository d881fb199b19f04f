"""Say which layer differs, by how much, and why.

    from debug.sides import diff_bundle

    result = diff_bundle(Path("engines/qwen-fp16"))              # .verdict, .culprits, .taps, .to_json()

    verify.py   the reference against golden cases of the upstream code      record.py   make such a case
    diff.py     an engine against the fp64 reference, tap by tap             metrics.py  the distances
    cli.py      the whole `logitlock` command and the verbs verify, record, diff
    executors/  models that are not ours as engines: transformers, any ONNX decoder, golden cases; open.py opens all
    report/     a diff as one HTML file that works offline; results.py has to_frame() for pandas

May import at module level: the standard library, torch, safetensors, typer, rich, onnx_ir, onnxruntime, and the
packages refmodels, trt_runtime and export; transformers, plotly and pandas only inside functions.  Nothing imports
debug.
"""
