"""One GL context for all environments of a process.

Scenes here have no meshes or textures, so the GL context holds nothing that belongs to one model:
``mjv_updateScene`` takes each environment's own model and data, and fifty environments cost one context and
one framebuffer. The context is made at the first picture and freed when the last environment that rendered
is closed.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco's names come from compiled modules without stubs.

import atexit
import contextlib
import importlib
import os
from collections.abc import Collection
from typing import Any

import mujoco
import numpy as np

from sims.errors import RenderingError

MODALITIES = ("rgb", "depth", "segmentation", "bodies")
MAX_GEOMS = 200
GL_ADVICE = (
    "rendering: expected a working OpenGL off-screen context, got {problem}; install the system packages "
    "libegl1 libgl1 libgles2 (or libosmesa6 and set MUJOCO_GL=osmesa), or pass cameras=() for no images"
)


def _import_triton_first() -> None:
    """Mesa and triton each bring an LLVM; when Mesa's is loaded first, importing triton later ends the
    process.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")


def _new_context(size: int) -> Any:
    if not hasattr(mujoco, "GLContext"):
        raise ImportError("no OpenGL library")
    return mujoco.GLContext(size, size)


class SharedRenderer:
    """Renders any environment of this process. ``retain`` and ``release`` count its users."""

    def __init__(self) -> None:
        self.users = 0
        self.process = os.getpid()
        self._context: Any = None
        self._size = 0

    @property
    def is_open(self) -> bool:
        """Whether a GL context exists now."""
        return self._context is not None

    def retain(self) -> None:
        """Count one more environment that renders."""
        self.users += 1

    def release(self) -> None:
        """Count one less; the last one frees the context."""
        self.users -= 1
        if self.users == 0:
            self.free()

    def free(self) -> None:
        """Free the GL context; the next picture makes a new one."""
        if self._context is not None and self.process == os.getpid():
            atexit.unregister(self.free)
            self._context.make_current()
            self._resources.free()
            self._context.free()
        self._context = None
        self._size = 0

    def _open(self, model: mujoco.MjModel, size: int) -> None:
        if size <= self._size:
            return
        self.free()
        _import_triton_first()
        try:
            self._context = _new_context(size)
            self._context.make_current()
            model.vis.global_.offwidth = model.vis.global_.offheight = size
            self._resources = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        except Exception as problem:  # each GL backend raises its own kinds
            self._context = None
            raise RenderingError(GL_ADVICE.format(problem=repr(str(problem)))) from problem
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._resources)
        self._resources.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._size = size
        # Registered after MuJoCo's own clean-up of the display, hence run before it.
        atexit.register(self.free)

    def draw(self, shot: "Shot", modalities: Collection[str], size: int) -> dict[str, np.ndarray]:
        """Pictures by modality: rgb uint8 [P, P, 3], depth float32 [P, P] in metres, segmentation and bodies int32
        [P, P] geom id or -1.

        Colours and ids take one pass each. Depth is the same in both and read beside the other picture.
        """
        self._open(shot.model, size)
        assert self._context is not None
        self._context.make_current()
        found: dict[str, np.ndarray] = {}
        by_id = [m for m in modalities if m in ("segmentation", "bodies")]
        depth = "depth" in modalities
        if by_id or "rgb" not in modalities:
            pixels = self._draw_pass(shot, True, size, found if depth else None)
            found |= dict.fromkeys(by_id, _geom_ids(pixels, shot.scene)) if by_id else {}
        if "rgb" in modalities:
            wanted = found if depth and "depth" not in found else None
            found["rgb"] = self._draw_pass(shot, False, size, wanted)
        return found

    def _draw_pass(
        self, shot: "Shot", by_id: bool, size: int, found: dict[str, np.ndarray] | None
    ) -> np.ndarray:
        """Pixels uint8 [P, P, 3] of one pass; with ``found``, its depth goes there."""
        flags = shot.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = by_id
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        rectangle = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(rectangle, shot.scene, self._resources)
        pixels = np.empty((size, size, 3), np.uint8)
        depth = None if found is None else np.empty((size, size), np.float32)
        mujoco.mjr_readPixels(pixels, depth, rectangle, self._resources)
        if found is not None and depth is not None:
            found["depth"] = _metres(depth, shot.near, shot.far)
        return np.ascontiguousarray(pixels[::-1])


class Shot:
    """What one camera sees at one moment, copied out of the simulation, so that it can be drawn after that went on.

    Making one costs a fraction of a millisecond, taking it again microseconds.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self.scene = mujoco.MjvScene(model, MAX_GEOMS)
        self.near = model.vis.map.znear * model.stat.extent
        self.far = model.vis.map.zfar * model.stat.extent
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def take(self, data: mujoco.MjData, camera: int) -> None:
        """Look through a camera now."""
        self._camera.fixedcamid = camera
        category = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self.model, data, self._option, None, self._camera, category, self.scene)


def _metres(buffer: np.ndarray, near: float, far: float) -> np.ndarray:
    """Undo the perspective map: with a reversed depth buffer b (1 near, 0 far), z = n f / (n + b (f - n))."""
    depth = buffer[::-1].astype(np.float64)
    depth *= far - near
    depth += near
    return (near * far / depth).astype(np.float32)


def _geom_ids(pixels: np.ndarray, scene: mujoco.MjvScene) -> np.ndarray:
    """Colours written by mjRND_IDCOLOR -> model geom ids; -1 where nothing was drawn."""
    packed = pixels.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    table = np.full(scene.ngeom + 1, -1, np.int32)
    for index in range(scene.ngeom):
        geom = scene.geoms[index]
        if geom.segid >= 0 and geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
            table[geom.segid + 1] = geom.objid
    return table[packed]


_shared = SharedRenderer()
_inherited: list[SharedRenderer] = []


def shared_renderer() -> SharedRenderer:
    """The renderer of this process; a forked child gets its own, as GL contexts do not survive a fork."""
    global _shared
    if _shared.process != os.getpid():
        # Kept alive, never freed: freeing the parent's context from here would end the child.
        _inherited.append(_shared)
        _shared = SharedRenderer()
    return _shared
