"""The ops: checked, differentiable where it makes sense, one name for every backend."""

from fst_fast.ops.head_step import head_step_

__all__ = ["head_step_"]
