"""localmoe runs Mixture-of-Experts models on the hardware you own.

`from localmoe import LocalMoE` is the whole of the public Python interface; see api.py. Nothing
heavy is imported before it is used.
"""

from __future__ import annotations

from .errors import LocalMoeError

TYPE_CHECKING = False  # as typing has it, which takes a while to import
if TYPE_CHECKING:
    from typing import Any

    from .api import LocalMoE, Reply
    from .batch.runner import BatchResult
    from .engine.protocol import Delta

__version__ = "0.1.0"
__all__ = ["BatchResult", "Delta", "LocalMoE", "LocalMoeError", "Reply", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import api  # start-up, 700 ms

        return getattr(api, name)
    raise AttributeError(f"module 'localmoe' has no attribute {name!r}")
