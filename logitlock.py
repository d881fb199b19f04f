"""The public names of debug, export, trt_runtime and refmodels in one module, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refmodels.lazy import public_names

if TYPE_CHECKING:
    from debug import *  # noqa: F403
    from export import *  # noqa: F403
    from refmodels import *  # noqa: F403
    from trt_runtime import *  # noqa: F403
else:
    __all__, __getattr__, __dir__ = public_names(globals())
