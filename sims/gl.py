"""Choice of the OpenGL backend, made before mujoco is imported, because mujoco loads it at import."""

import ctypes.util
import os
import sys

LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
DISABLED = "disable"  # mujoco's word for "import no OpenGL"


def choose_backend(requested: str, has_display: bool) -> str:
    """The value for ``MUJOCO_GL``: what was asked for, else EGL or OSMesa where there is no display.

    A missing library disables OpenGL instead of failing, since simulations without pictures need none.
    """
    if requested in LIBRARIES:
        return requested if ctypes.util.find_library(LIBRARIES[requested]) else DISABLED
    if requested or has_display:
        return requested
    found = (name for name, library in LIBRARIES.items() if ctypes.util.find_library(library))
    return next(found, DISABLED)


def prepare_environment() -> None:
    """Set ``MUJOCO_GL`` and Mesa's thread count, unless mujoco has been imported or the user has chosen."""
    if sys.platform == "linux" and "mujoco" not in sys.modules:
        requested = os.environ.get("MUJOCO_GL", "").lower().strip()
        backend = choose_backend(requested, "DISPLAY" in os.environ)
        if backend != requested:
            os.environ["MUJOCO_GL"] = backend
    # Software GL gains nothing from threads on small pictures, and a forked worker would wait forever for
    # the parent's threads.
    os.environ.setdefault("LP_NUM_THREADS", "0")
