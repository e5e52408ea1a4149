"""Record any Gymnasium environment with any policy into an episode dataset."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dataengine.errors import DatasetError
from dataengine.lerobot.writer import EpisodeWriter

RENDER_VIEW = "render"
CLEAN_ACTION = "action.clean"
TRIES_PER_EPISODE = 10


@dataclass(frozen=True)
class RecordReport:
    """What one call of :func:`record` did: episodes kept and tried, frames written, seconds taken; `held` episodes with
    seeds of the same range were there before.
    """

    kept: int
    tried: int
    frames: int
    seconds: float
    held: int = 0


@dataclass(frozen=True)
class _Observation:
    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    depth: Mapping[str, Any] | None
    segmentation: Mapping[str, Any] | None
    body_ids: Mapping[str, Any] | None


def record(
    env: Any,
    policy: Any,
    writer: EpisodeWriter,
    episodes: int,
    seed: int = 0,
    *,
    keep: Literal["success", "all"] = "success",
    max_steps: int | None = None,
    max_tries: int | None = None,
    progress: bool = True,
) -> RecordReport:
    """Play episodes with seeds ``seed, seed + 1, ...`` until the dataset holds ``episodes`` of them.

    Row t of an episode holds observation t and the action taken there. The last observation gets a row too;
    its action, which is never executed, repeats the last one (zeros where no step was taken), so an episode
    of N steps has N + 1 rows.

    Recording resumes: episodes of earlier runs with a seed in the same range count, and playing goes on after
    the largest of their seeds. The same seeds give the same dataset whether or not it was interrupted (for a
    deterministic env and policy).

    Args:
        env: a Gymnasium environment. Observations are either ``{"images": {view: uint8}, "state": [S]}`` with
            optional ``"depth"``, ``"segmentation"`` and ``"bodies"`` (ids) per view, or an array, which is the
            state, while ``env.render()`` (made with ``render_mode="rgb_array"``) is the view ``"render"``. Used
            from ``info`` where present: ``task``, ``is_success``, ``cameras``, ``bodies``, ``privileged`` (and
            any other name that the writer lists in ``extra``).
        policy: an object with ``act(obs, info)`` and optionally ``reset(seed)``, or a function of ``(obs,
            info)``. It returns the action, or ``(executed, clean)`` where ``clean`` is the label without
            exploration noise; it is stored in the extra column ``action.clean`` when the writer has one
            (without a clean label, the action is stored there).
        writer: open writer with the environment's features, see :func:`writer_arguments`.
        episodes: how many kept episodes the dataset shall hold for this seed range.
        seed: the first seed.
        keep: ``"success"`` drops episodes whose final ``info["is_success"]`` is false, ``"all"`` keeps
            everything.
        max_steps: end an episode after this many steps; needed only for environments that never end.
        max_tries: give up after this many seeds; default 10 per episode.
        progress: show a bar on a terminal.

    Raises:
        ValueError: an observation, action or info that does not fit; nothing of that episode is kept.
        DatasetError: ``max_tries`` seeds gave fewer than ``episodes`` episodes; what was kept stays.
    """
    if keep not in ("success", "all"):
        raise ValueError(f"keep: expected 'success' or 'all', got {keep!r}")
    if episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {episodes}")
    tries = TRIES_PER_EPISODE * episodes if max_tries is None else max_tries
    done = [s for s in writer.seeds if seed <= s < seed + tries]
    kept = tried = frames = 0
    begin, next_seed = time.perf_counter(), max(done, default=seed - 1) + 1
    visible = progress and sys.stderr.isatty()
    with tqdm(
        total=episodes, initial=min(len(done), episodes), unit="episode", desc="record", disable=not visible
    ) as bar:
        while len(done) + kept < episodes and next_seed < seed + tries:
            length = _play(env, policy, writer, next_seed, keep, max_steps)
            tried, kept, frames = tried + 1, kept + (length > 0), frames + length
            next_seed += 1
            bar.update(int(length > 0))
            bar.set_postfix(tried=tried)
    if len(done) + kept < episodes:
        raise DatasetError(
            f"record: expected {episodes} episodes from seeds {seed} to {seed + tries - 1}, got "
            f"{len(done) + kept}; they are kept in the dataset; use a better policy, keep='all' or more "
            "max_tries",
            path=writer.root,
        )
    return RecordReport(kept, tried, frames, time.perf_counter() - begin, len(done))


def _play(env: Any, policy: Any, writer: EpisodeWriter, seed: int, keep: str, max_steps: int | None) -> int:
    """Play one episode; the number of frames written, 0 if it was dropped."""
    try:
        info = _run_episode(env, policy, writer, seed, max_steps)
    except BaseException:
        writer.discard_episode()
        raise
    success = info.get("is_success")
    if success is None and keep == "success":
        writer.discard_episode()
        raise ValueError(
            f"env: expected info['is_success'] to tell successful episodes, got the keys {sorted(info)}; "
            "pass keep='all'"
        )
    if keep == "success" and not success:
        writer.discard_episode()
        return 0
    length = writer.frames
    writer.save_episode(success=None if success is None else bool(success), seed=seed)
    return length


def _run_episode(
    env: Any, policy: Any, writer: EpisodeWriter, seed: int, max_steps: int | None
) -> dict[str, Any]:
    obs, info = env.reset(seed=seed)
    if hasattr(policy, "reset"):
        _reset(policy.reset, seed)
    act: Callable[..., Any] = policy.act if hasattr(policy, "act") else policy
    zeros = np.zeros(writer.spec.action_dim, np.float32)
    executed, clean, done, steps = zeros, zeros, False, 0
    while not done and (max_steps is None or steps < max_steps):
        chosen, clean = _split(act(obs, info))
        executed = _as_vector(chosen)
        # the environment may overwrite its buffers in step(), so the row is written first
        _add(writer, env, _observe(env, obs), executed, _as_vector(clean), info)
        obs, _, terminated, truncated, info = env.step(chosen)
        done, steps = bool(terminated or truncated), steps + 1
    _add(writer, env, _observe(env, obs), executed, _as_vector(clean), info)
    return info


def _reset(reset: Callable[..., Any], seed: int) -> None:
    """``reset(seed)``, or ``reset()`` for policies without a seed."""
    if inspect.signature(reset).parameters:
        reset(seed)
    else:
        reset()


def _split(result: Any) -> tuple[Any, Any]:
    if isinstance(result, tuple):
        if len(result) != 2:
            raise ValueError(f"policy: expected an action or (executed, clean), got a tuple of {len(result)}")
        return result
    return result, result


def _as_vector(action: Any) -> NDArray[np.float32]:
    return np.asarray(action, dtype=np.float32).reshape(-1)


def _observe(env: Any, obs: Any) -> _Observation:
    if isinstance(obs, Mapping):
        if "images" not in obs or "state" not in obs:
            raise ValueError(
                f"env: expected observations with 'images' and 'state', got the keys {sorted(obs)}; add an "
                "adapter"
            )
        return _Observation(
            dict(obs["images"]),
            _as_vector(obs["state"]),
            obs.get("depth"),
            obs.get("segmentation"),
            obs.get("bodies"),
        )
    image = env.render()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"env: expected an image from render(), got {type(image).__name__}; make the environment with "
            "render_mode='rgb_array'"
        )
    return _Observation({RENDER_VIEW: image}, _as_vector(obs), None, None, None)


def _add(
    writer: EpisodeWriter,
    env: Any,
    seen: _Observation,
    action: NDArray[np.float32],
    clean: NDArray[np.float32],
    info: Mapping[str, Any],
) -> None:
    spec = writer.spec
    extra = {name: info[name] for name in spec.extra if name in info}
    if CLEAN_ACTION in spec.extra:
        extra[CLEAN_ACTION] = clean
    writer.add_frame(
        images={v: i for v, i in seen.images.items() if v in spec.views},
        state=seen.state,
        action=action,
        task=_task(env, info),
        cameras=_cameras(info, spec.views),
        depth=seen.depth if spec.depth else None,
        segmentation=seen.segmentation if spec.segmentation else None,
        bodies=info.get("bodies") if spec.bodies else None,
        body_ids=seen.body_ids if spec.body_ids else None,
        extra=extra,
    )


def _cameras(info: Mapping[str, Any], views: tuple[str, ...]) -> Any:
    cameras = info.get("cameras")
    return {v: c for v, c in cameras.items() if v in views} if isinstance(cameras, Mapping) else cameras


def _task(env: Any, info: Mapping[str, Any]) -> str:
    """The instruction; environments without one are described by their id."""
    if "task" in info:
        return info["task"]
    spec = getattr(env, "spec", None)
    return spec.id if spec is not None else type(getattr(env, "unwrapped", env)).__name__


def writer_arguments(env: Any, *, seed: int = 0, clean_action: bool = True) -> dict[str, Any]:
    """Keyword arguments of :class:`EpisodeWriter` for an environment, read off one ``reset``.

    ``fps`` is ``env.metadata["render_fps"]`` (10 where absent). ``info["privileged"]`` becomes an extra
    vector.

    Raises:
        ValueError: observations that :func:`record` cannot store.
    """
    obs, info = env.reset(seed=seed)
    seen = _observe(env, obs)
    shape = getattr(env.action_space, "shape", None) or (1,)
    action_dim = int(np.prod(shape))
    extra = {CLEAN_ACTION: action_dim} if clean_action else {}
    if "privileged" in info:
        extra["privileged"] = int(np.size(info["privileged"]))
    first = next(iter(seen.images.values()))
    return {
        "fps": (getattr(env, "metadata", None) or {}).get("render_fps", 10),
        "views": tuple(seen.images),
        "image_size": tuple(first.shape[:2]),
        "state_dim": seen.state.size,
        "action_dim": action_dim,
        "depth": seen.depth is not None,
        "segmentation": seen.segmentation is not None,
        "cameras": info.get("cameras") is not None,
        "bodies": tuple(info.get("bodies", ())),
        "body_ids": "bodies" in info and seen.body_ids is not None,
        "extra": extra,
    }
