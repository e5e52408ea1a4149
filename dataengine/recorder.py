"""Hand the frames of an environment to a writer while the environment goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataengine.background import Direct, Worker
from dataengine.lerobot.layout import DatasetSpec
from dataengine.lerobot.writer import EpisodeWriter

RENDER_VIEW = "render"
CLEAN_ACTION = "action.clean"
WRITING_AHEAD = 32  # frames that may wait to be encoded, so that publishing an episode holds nobody up
DRAWING_AHEAD = 8  # frames that may wait to be drawn


class Recorder:
    """Hands frames to a writer, which encodes them in a thread of its own while the environment goes on.

    Where the policy says that it looks at no picture (``needs_pictures`` False) and the environment can draw apart
    (``draws_apart``, as the tasks of ``sims`` can), pictures are drawn in a second thread, from shots that the
    environment takes, while physics goes on. What is written is the same in every case. A failure of a thread is
    raised by the next call or on leaving; then, and after any other error, the unfinished episode is dropped.

    Args:
        threads: False has everything done in the caller's thread, which costs least where other processes record too.
    """

    def __init__(self, env: Any, policy: Any, writer: EpisodeWriter, *, threads: bool = True) -> None:
        self.env, self.spec, self._writer, self._threads = env, writer.spec, writer, threads
        self._base = getattr(env, "unwrapped", env)
        blind = getattr(policy, "needs_pictures", True) is False
        self._apart = threads and blind and getattr(self._base, "draws_apart", False)
        self._drawer: Any = None

    def __enter__(self) -> Recorder:
        self._writing: Worker | Direct = Worker(WRITING_AHEAD) if self._threads else Direct()
        self._drawing = self._writing
        if self._apart:
            self._base.draws = False
            self._drawing = Worker(DRAWING_AHEAD)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            self._finish()
        except BaseException as failure:
            self._writer.discard_episode()
            if kind is None:
                raise
            if failure is not error and isinstance(error, Exception):  # but Ctrl-C stays Ctrl-C
                raise failure from error
        else:
            if kind is not None:
                self._writer.discard_episode()

    def _finish(self) -> None:
        """End both threads, the one that draws first; raises what failed in them."""
        try:
            if self._apart:
                self._base.draws = True
                self._drawing.close(last=self._close_drawer)
        finally:
            self._writing.close()

    def add(
        self, obs: Any, action: NDArray[np.float32], clean: NDArray[np.float32], info: Mapping[str, Any]
    ) -> None:
        """One frame: observation, executed and clean action, info."""
        if self._apart:
            frame, shots = _frame(self.env, self.spec, obs, action, clean, info), self._base.shoot()
            self._drawing.put(lambda: self._draw(frame, shots))
        else:
            pictures = _detached(_selected(pictures_of(self.env, obs), self.spec))
            frame = _frame(self.env, self.spec, obs, action, clean, info)
            self._writing.put(lambda: self._writer.add_frame(**frame, **pictures))

    def _draw(self, frame: dict[str, Any], shots: Any) -> None:
        if self._drawer is None:  # here, because an OpenGL context belongs to one thread
            self._drawer = self._base.make_drawer()
        pictures = _selected(self._drawer.draw(shots), self.spec)
        self._writing.put(lambda: self._writer.add_frame(**frame, **pictures))

    def _close_drawer(self) -> None:
        if self._drawer is not None:
            self._drawer.close()

    def save(self, *, success: bool | None, seed: int) -> None:
        """Publish the episode after all its frames."""
        self._in_turn(lambda: self._writer.save_episode(success=success, seed=seed))

    def discard(self) -> None:
        """Drop the episode."""
        self._in_turn(self._writer.discard_episode)

    def _in_turn(self, call: Callable[[], object]) -> None:
        if self._apart:
            self._drawing.put(lambda: self._writing.put(call))
        else:
            self._writing.put(call)


def _frame(
    env: Any,
    spec: DatasetSpec,
    obs: Any,
    action: NDArray[np.float32],
    clean: NDArray[np.float32],
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of ``add_frame`` that are no pictures, as copies."""
    extra = {name: info[name] for name in spec.extra if name in info}
    if CLEAN_ACTION in spec.extra:
        extra[CLEAN_ACTION] = clean
    values = {
        "state": state_of(obs),
        "action": action,
        "task": _task(env, info),
        "cameras": _cameras(info, spec.views),
        "bodies": info.get("bodies") if spec.bodies else None,
        "extra": extra,
    }
    return _detached(values)


def pictures_of(env: Any, obs: Any) -> Mapping[str, Any]:
    """The pictures of an observation, or else what the environment renders; raises ``ValueError`` where neither is."""
    if not isinstance(obs, Mapping):
        return {"images": {RENDER_VIEW: _rendered(env)}}
    if "images" not in obs or "state" not in obs:
        raise ValueError(
            f"env: expected observations with 'images' and 'state', got the keys {sorted(obs)}; add an "
            "adapter"
        )
    return obs


def _selected(pictures: Mapping[str, Any], spec: DatasetSpec) -> dict[str, Any]:
    """Of an observation's pictures those that frames of the dataset have, under the names of ``add_frame``."""
    return {
        "images": {v: i for v, i in pictures["images"].items() if v in spec.views},
        "depth": pictures.get("depth") if spec.depth else None,
        "segmentation": pictures.get("segmentation") if spec.segmentation else None,
        "body_ids": pictures.get("bodies") if spec.body_ids else None,
    }


def _rendered(env: Any) -> NDArray[np.uint8]:
    image = env.render()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"env: expected an image from render(), got {type(image).__name__}; make the environment with "
            "render_mode='rgb_array'"
        )
    return image


def state_of(obs: Any) -> NDArray[np.float32]:
    """The state vector of an observation, which may be that vector itself."""
    return as_vector(obs["state"] if isinstance(obs, Mapping) else obs)


def _detached(value: Any) -> Any:
    """A copy of the arrays in nested mappings: environments may use theirs again."""
    if isinstance(value, Mapping):
        return {name: _detached(part) for name, part in value.items()}
    return value.copy() if isinstance(value, np.ndarray) else value


def _cameras(info: Mapping[str, Any], views: tuple[str, ...]) -> Any:
    cameras = info.get("cameras")
    return {v: c for v, c in cameras.items() if v in views} if isinstance(cameras, Mapping) else cameras


def _task(env: Any, info: Mapping[str, Any]) -> str:
    """The instruction; environments without one are described by their id."""
    if "task" in info:
        return info["task"]
    spec = getattr(env, "spec", None)
    return spec.id if spec is not None else type(getattr(env, "unwrapped", env)).__name__


def as_vector(action: Any) -> NDArray[np.float32]:
    """Numbers as one float32 vector."""
    return np.asarray(action, dtype=np.float32).reshape(-1)
