"""Torch-TensorRT without a GPU, in its own process: `python -m tests.support.torch_tensorrt_worker SITE JOBS`.

Importing Torch-TensorRT asks CUDA for a device, and on the CPU build of torch it cannot load its runtime.  `shim`
answers those questions, for tests only: a conversion needs none of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import refmodels
from tests.support.network_interpreter import Interpreter


def shim(site: Path) -> None:
    """Make `import torch_tensorrt` work, with the packages in `site`."""
    sys.path.append(str(site))
    torch.cuda.get_device_capability = lambda *_: (8, 9)
    torch.cuda.current_device = lambda: 0
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
    is_file = os.path.isfile
    # Without these files it does without its C++ runtime, which needs torch's CUDA libraries.
    os.path.isfile = lambda path: not os.path.basename(path).startswith("libtorchtrt") and is_file(path)


def export(job: dict[str, Any]) -> None:
    """One bundle; where there is a file inputs.pt, the outputs that the network gives for it go to outputs.pt."""
    import export.tensorrt.torch_export
    from export.bundle import export_model

    output = Path(job["output"])
    inputs = output.with_suffix(".inputs.pt")
    build_network = export.tensorrt.torch_export.build_network

    def observed(builder: Any, network: Any, path: Path, **options: Any) -> None:
        if inputs.exists():
            torch.save(Interpreter(network, wide=True).run(torch.load(inputs)), output.with_suffix(".outputs.pt"))
        build_network(builder, network, path, **options)
        tensors = {
            kind: {(t := get(i)).name: [t.dtype.name, *t.shape] for i in range(count)}
            for kind, get, count in (
                ("inputs", network.get_input, network.num_inputs),
                ("outputs", network.get_output, network.num_outputs),
            )
        }
        kinds = [network.get_layer(i).type for i in range(network.num_layers)]
        counts = {kind.name: kinds.count(kind) for kind in set(kinds)}
        output.with_suffix(".network.json").write_text(json.dumps({**tensors, "layers": counts}))

    export.tensorrt.torch_export.build_network = observed
    try:
        source = refmodels.resolve(job["model"], variant=job.get("variant"))
        export_model(source, backend="torch-tensorrt", attention="native", output=output, **job["options"])
    finally:
        export.tensorrt.torch_export.build_network = build_network


if __name__ == "__main__":
    torch.set_num_threads(1)
    shim(Path(sys.argv[1]))
    for job in json.loads(Path(sys.argv[2]).read_text()):
        export(job)
