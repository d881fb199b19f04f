"""Loading and launching machine code through the CUDA driver, with cuda.bindings."""

from __future__ import annotations

from typing import Any

from refmodels.errors import LogitLockError


def load_function(image: bytes, entry: str, shared: int) -> Any:
    """A CUfunction of an image, allowed `shared` bytes.  Its module stays loaded as long as the context."""
    from cuda.bindings import driver

    module = checked(driver.cuModuleLoadData(image), f"loading the kernel {entry}")
    function = checked(driver.cuModuleGetFunction(module, entry.encode()), f"finding {entry}")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(function, attribute, shared), f"shared memory of {entry}")
    return function


def start(
    function: Any,
    name: str,
    arguments: Any,
    *,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    stream: int,
    overlap: bool,
    cooperative: bool = False,
) -> None:
    """Launch a CUfunction.

    Args:
        name: for errors.
        arguments: as cuda.bindings takes them: values and their ctypes, or the address of an array of pointers.
        threads, shared: threads and bytes of shared memory per block.
        stream: a CUstream's address.
        overlap: it may start before the kernel ahead has finished.
        cooperative: all blocks are on the GPU at once, or none.
    Raises:
        LogitLockError: the driver refuses.
    """
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    config.hStream = driver.CUstream(stream)
    attributes = []
    if overlap:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    if cooperative:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attributes[-1].value.cooperative = 1
    if attributes:
        config.attrs = attributes
        config.numAttrs = len(attributes)
    checked(driver.cuLaunchKernelEx(config, function, arguments, 0), f"launching {name}")


def checked(result: tuple[Any, ...], what: str) -> Any:
    """The value beside a CUDA driver call's return code."""
    from cuda.bindings import driver

    code = result[0]
    if code != driver.CUresult.CUDA_SUCCESS:
        name = driver.cuGetErrorName(code)[1]
        raise LogitLockError(f"{what}: CUDA error {name.decode() if isinstance(name, bytes) else code}")
    return result[1] if len(result) > 1 else None
