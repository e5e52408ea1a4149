"""Work on many items by many processes: over Ray, on this machine or on a cluster.

``fan_out(task, items, workers=4)`` calls a task once per item. What a task returns when, and where it was run, never
changes what it returns.
"""

from dataengine.errors import WorkError
from dataengine.parallel.workers import fan_out

__all__ = ["WorkError", "fan_out"]
