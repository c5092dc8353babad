"""The ops: checked, differentiable where it makes sense, one name for every backend."""

from fst_fast.ops.head_deviation_loss import HeadDeviation, head_deviation_loss
from fst_fast.ops.head_step import head_step_
from fst_fast.ops.inject import TriggerTables, inject

__all__ = ["HeadDeviation", "TriggerTables", "head_deviation_loss", "head_step_", "inject"]
