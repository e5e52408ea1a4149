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
from typing import Any

import mujoco
import numpy as np

from sims.errors import RenderingError, expect_name

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
        self._scene = mujoco.MjvScene(model, MAX_GEOMS)
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._size = size
        # Registered after MuJoCo's own clean-up of the display, hence run before it.
        atexit.register(self.free)

    def render(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: int, modality: str, size: int
    ) -> np.ndarray:
        """One picture: rgb uint8 [P, P, 3], depth float32 [P, P] in metres, segmentation and bodies int32 [P, P] geom
        id or -1.
        """
        expect_name(modality, MODALITIES, "modality")
        self._open(model, size)
        assert self._context is not None
        self._context.make_current()
        self._camera.fixedcamid = camera
        category = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, self._option, None, self._camera, category, self._scene)
        by_id = modality != "rgb"
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = by_id
        self._scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = by_id
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        rectangle = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(rectangle, self._scene, self._resources)
        if modality == "depth":
            return self._read_depth(model, rectangle)
        pixels = np.empty((size, size, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, rectangle, self._resources)
        pixels = np.ascontiguousarray(pixels[::-1])
        return self._geom_ids(pixels) if by_id else pixels

    def _read_depth(self, model: mujoco.MjModel, rectangle: mujoco.MjrRect) -> np.ndarray:
        """Undo the perspective map: with a reversed depth buffer b (1 near, 0 far), z = n f / (n + b (f -
        n)).
        """
        buffer = np.empty((rectangle.height, rectangle.width), np.float32)
        mujoco.mjr_readPixels(None, buffer, rectangle, self._resources)
        near = model.vis.map.znear * model.stat.extent
        far = model.vis.map.zfar * model.stat.extent
        reversed_depth = buffer[::-1].astype(np.float64)
        return (near * far / (near + reversed_depth * (far - near))).astype(np.float32)

    def _geom_ids(self, pixels: np.ndarray) -> np.ndarray:
        """Colours written by mjRND_IDCOLOR -> model geom ids; -1 where nothing was drawn."""
        packed = pixels.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        table = np.full(self._scene.ngeom + 1, -1, np.int32)
        for index in range(self._scene.ngeom):
            geom = self._scene.geoms[index]
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
