"""Read model files that nobody vouches for, and write files so that nothing is lost."""

from .atomic_files import sha256
from .load import check_writable, load, save, versions
from .read import LoadError, read_state_dict
from .shards import digest

__all__ = [
    "LoadError",
    "check_writable",
    "digest",
    "load",
    "read_state_dict",
    "save",
    "sha256",
    "versions",
]
