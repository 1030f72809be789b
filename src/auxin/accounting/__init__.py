"""Accounting: parameters, FLOPs, memory, and the ledger of a run."""

from auxin.accounting.cost import Cost
from auxin.accounting.electricity import Electricity
from auxin.accounting.executed import ExecutedFlops
from auxin.accounting.flops import FlopsPerToken, flops_per_token
from auxin.accounting.ledger import Ledger, StageRecord
from auxin.accounting.memory import ServingMemory, TrainingMemory, serving_memory, training_memory
from auxin.accounting.parameters import ParameterCount, count_parameters

__all__ = [
    "Cost",
    "Electricity",
    "ExecutedFlops",
    "FlopsPerToken",
    "Ledger",
    "ParameterCount",
    "ServingMemory",
    "StageRecord",
    "TrainingMemory",
    "count_parameters",
    "flops_per_token",
    "serving_memory",
    "training_memory",
]
