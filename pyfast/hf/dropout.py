"""Dropout modules on hidden states: torch's own draws its mask on one thread, and keeps it for backward."""

from pyfast import dispatch, ops
from pyfast.hf.families import Family


def dropout_forward(self, family: Family, stock, input):
    """The generic forward of a Dropout module; where there is no kernel, torch's own is the faster one."""
    if not self.training or not 0 < self.p < 1 or dispatch.choose("dropout", input) == "torch":
        return stock.forward(self, input)
    return ops.dropout(input, self.p)
