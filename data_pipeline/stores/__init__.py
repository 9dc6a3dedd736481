"""Files behind URLs, read through fsspec in spite of connections that break."""

from data_pipeline.stores.errors import StoreError
from data_pipeline.stores.reader import open_remote
from data_pipeline.stores.systems import FileState, check_unchanged, open_system, state_of

__all__ = ["FileState", "StoreError", "check_unchanged", "open_remote", "open_system", "state_of"]
