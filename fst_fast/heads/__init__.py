"""Find a classifier's head, look at the model, and leave it as it was."""

from .find import (
    AmbiguousHeadError,
    find_head,
    head_matrix,
    head_name,
    head_shape,
    logits_of,
    unwrap,
)

__all__ = [
    "AmbiguousHeadError",
    "find_head",
    "head_matrix",
    "head_name",
    "head_shape",
    "logits_of",
    "unwrap",
]
