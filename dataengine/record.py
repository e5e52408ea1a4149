"""Record any Gymnasium environment with any policy into an episode dataset."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from dataengine.errors import DatasetError
from dataengine.lerobot.writer import EpisodeWriter
from dataengine.recorder import CLEAN_ACTION, Recorder, as_vector, pictures_of, state_of

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
            (without a clean label, the action is stored there). With an attribute ``needs_pictures`` that is
            False it may get observations without pictures.
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
    tries = check_request(episodes, keep, max_tries)
    done = [s for s in writer.seeds if seed <= s < seed + tries]
    kept = tried = frames = 0
    begin, next_seed = time.perf_counter(), max(done, default=seed - 1) + 1
    visible = progress and sys.stderr.isatty()
    with (
        tqdm(
            total=episodes,
            initial=min(len(done), episodes),
            unit="episode",
            desc="record",
            disable=not visible,
        ) as bar,
        Recorder(env, policy, writer) as recorder,
    ):
        while len(done) + kept < episodes and next_seed < seed + tries:
            length = play_episode(env, policy, recorder, next_seed, keep, max_steps)
            tried, kept, frames = tried + 1, kept + (length > 0), frames + length
            next_seed += 1
            bar.update(int(length > 0))
            bar.set_postfix(tried=tried)
    if len(done) + kept < episodes:
        raise too_few(writer, len(done) + kept, episodes, range(seed, seed + tries))
    return RecordReport(kept, tried, frames, time.perf_counter() - begin, len(done))


def check_request(episodes: int, keep: str, max_tries: int | None) -> int:
    """How many seeds may be tried; raises ``ValueError`` for what cannot be asked."""
    if keep not in ("success", "all"):
        raise ValueError(f"keep: expected 'success' or 'all', got {keep!r}")
    if episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {episodes}")
    return TRIES_PER_EPISODE * episodes if max_tries is None else max_tries


def too_few(writer: EpisodeWriter, held: int, episodes: int, seeds: range) -> DatasetError:
    """The error for `seeds` that gave fewer than so many episodes."""
    return DatasetError(
        f"record: expected {episodes} episodes from seeds {seeds.start} to {seeds.stop - 1}, got {held}; they are kept in "
        "the dataset; use a better policy, keep='all' or more max_tries",
        path=writer.root,
    )


def play_episode(
    env: Any, policy: Any, recorder: Recorder, seed: int, keep: str, max_steps: int | None
) -> int:
    """Play the episode of `seed` into `recorder`; the number of frames written, 0 if it was dropped."""
    info, length = _run_episode(env, policy, recorder, seed, max_steps)
    success = info.get("is_success")
    if success is None and keep == "success":
        raise ValueError(
            f"env: expected info['is_success'] to tell successful episodes, got the keys {sorted(info)}; "
            "pass keep='all'"
        )
    if keep == "success" and not success:
        recorder.discard()
        return 0
    recorder.save(success=None if success is None else bool(success), seed=seed)
    return length


def _run_episode(
    env: Any, policy: Any, recorder: Recorder, seed: int, max_steps: int | None
) -> tuple[dict[str, Any], int]:
    """Play one episode into the recorder; the last info and the number of frames."""
    obs, info = env.reset(seed=seed)
    if hasattr(policy, "reset"):
        _reset(policy.reset, seed)
    act: Callable[..., Any] = policy.act if hasattr(policy, "act") else policy
    zeros = np.zeros(recorder.spec.action_dim, np.float32)
    executed, clean, done, steps = zeros, zeros, False, 0
    while not done and (max_steps is None or steps < max_steps):
        chosen, clean = _split(act(obs, info))
        executed = as_vector(chosen)
        # the environment may overwrite its buffers in step(), so the row is handed over first
        recorder.add(obs, executed, as_vector(clean), info)
        obs, _, terminated, truncated, info = env.step(chosen)
        done, steps = bool(terminated or truncated), steps + 1
    recorder.add(obs, executed, as_vector(clean), info)
    return info, steps + 1


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


def writer_arguments(env: Any, *, seed: int = 0, clean_action: bool = True) -> dict[str, Any]:
    """Keyword arguments of :class:`EpisodeWriter` for an environment, read off one ``reset``.

    ``fps`` is ``env.metadata["render_fps"]`` (10 where absent). ``info["privileged"]`` becomes an extra
    vector.

    Raises:
        ValueError: observations that :func:`record` cannot store.
    """
    obs, info = env.reset(seed=seed)
    seen = pictures_of(env, obs)
    shape = getattr(env.action_space, "shape", None) or (1,)
    action_dim = int(np.prod(shape))
    extra = {CLEAN_ACTION: action_dim} if clean_action else {}
    if "privileged" in info:
        extra["privileged"] = int(np.size(info["privileged"]))
    first = next(iter(seen["images"].values()))
    return {
        "fps": (getattr(env, "metadata", None) or {}).get("render_fps", 10),
        "views": tuple(seen["images"]),
        "image_size": tuple(first.shape[:2]),
        "state_dim": state_of(obs).size,
        "action_dim": action_dim,
        "depth": seen.get("depth") is not None,
        "segmentation": seen.get("segmentation") is not None,
        "cameras": info.get("cameras") is not None,
        "bodies": tuple(info.get("bodies", ())),
        "body_ids": "bodies" in info and seen.get("bodies") is not None,
        "extra": extra,
    }
