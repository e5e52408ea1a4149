"""Many items worked on by many processes: over Ray, on this machine or on a cluster.

``fan_out(task, items, workers=4)`` calls a task once per item, ``record_parallel`` records episodes into one dataset,
``reconstruct_parallel`` fits a scene to each episode. How many processes there are, and which of them die, never changes
what comes out.
"""

from dataengine.errors import WorkError
from dataengine.parallel.reconstruct import reconstruct_parallel
from dataengine.parallel.record import record_parallel
from dataengine.parallel.workers import fan_out

__all__ = ["WorkError", "fan_out", "reconstruct_parallel", "record_parallel"]
