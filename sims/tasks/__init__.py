"""The tasks, by name."""

import inspect

from sims.errors import expect_name
from sims.tasks.base import Facts, Task
from sims.tasks.cue_delay_reach import CueDelayReach
from sims.tasks.lift import Lift
from sims.tasks.open_drawer import OpenDrawer
from sims.tasks.pick_place import PickPlace
from sims.tasks.push import Push

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Lift, Push, PickPlace, OpenDrawer, CueDelayReach)
}


def make_task(name: str, **options: object) -> Task:
    """Build a task by name; an unknown name or option is an error that names the closest."""
    kind = TASKS[expect_name(name, TASKS, "task")]
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            expect_name(option, known or ("no options",), f"option of {name}")
    return kind(**options)


__all__ = ["TASKS", "Facts", "Task", "make_task"]
