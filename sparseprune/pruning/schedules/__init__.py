"""Pruning in several steps, with recovery between them.

A schedule knows no method: it is given `prune_to(sparsity)`, such as
`lambda sparsity: sp.prune(model, "unstructured", "wanda", sparsity, calibration=data)`, and `recover(model)`, any
training loop. What a step has pruned stays zero in all that follow, also where the loop's optimizer would move it.
"""

from sparseprune.pruning.schedules.base import ScheduleReport, Step
from sparseprune.pruning.schedules.gradual import Gradual
from sparseprune.pruning.schedules.greedy import Greedy
from sparseprune.pruning.schedules.lottery import LotteryTicket

__all__ = ["Gradual", "Greedy", "LotteryTicket", "ScheduleReport", "Step"]
