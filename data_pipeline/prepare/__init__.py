"""The command `python -m data_pipeline.prepare`: text in, a dataset out, whole or not at all.

`prepare` loads on first use: the workers of the command need not import it all.
"""

from typing import Any

__all__ = ["prepare"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from data_pipeline.prepare.pipeline import prepare

    return prepare
