"""Read model files that nobody vouches for, and write files so that nothing is lost."""

from .load import LoadError, check_writable, digest, load, read_state_dict, save, sha256, versions

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
