"""How fast demonstrations are recorded: pictures per second beside MuJoCo's own renderer drawing the same pictures.

    python -m benchmarks.speed.recording

Writes `speed/recording.json`. For every number of cameras, size and kind of pictures three candidates take turns, each
over the same episodes, the same cameras and the same simulated states, and the best round of each counts:

- `record`: what `enerverse record` does, that is physics, inverse kinematics, the expert, drawing, checking, compressing,
  publishing, from the first reset until the last episode is on disk. Two threads beside the main one.
- `raw`: `mujoco.Renderer`, update of the scene, drawing and reading back, one pass per picture, nothing else. One thread.
- `draw`: the same by `sims`, which reads colour and depth from one pass. One thread.
- `loop`: `raw` within a rollout, its seconds and those of the physics, inverse kinematics and the expert of the same
  episodes; what a plain loop over an environment gets that keeps nothing. One thread.

`share` is `record` over `raw`, the bar is 0.9; `share_of_loop` is `record` over `loop`. They go by the clock, and
recording wants more cores than drawing, so other work on the machine lowers them: `record_cores` says how many cores
recording got, `load` what waited for them at the end. `record_cpu` and `raw_cpu` are processor milliseconds per picture;
`two_cores` is the largest share that those allow on two idle cores, reached if no thread ever waited for
another.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
import tyro

from benchmarks.results_io import write_result
from dataengine.episodes import EpisodeWriter
from dataengine.record import record, writer_arguments
from enerverse.cli.simulator import SeededExpert, make_env

BAR = 0.9


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Which cases, over how many episodes, how often."""

    cameras: tuple[int, ...] = (2, 4, 8)
    sizes: tuple[int, ...] = (64, 128)
    episodes: int = 6
    rounds: int = 5
    task: str = "Lift"
    case: str = "speed/recording"


@dataclass
class Took:
    """Pictures and what they took."""

    pictures: int = 0
    seconds: float = 0.0
    cpu: float = 0.0

    @contextlib.contextmanager
    def timed(self, pictures: int) -> Iterator[None]:
        """Add what happens inside."""
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - began
        self.cpu += time.process_time() - cpu
        self.pictures += pictures


def best(rounds: list[Took]) -> dict[str, float]:
    """Most pictures per second and fewest processor milliseconds per picture."""
    return {
        "per_second": max(t.pictures / t.seconds for t in rounds),
        "cpu": min(1000 * t.cpu / t.pictures for t in rounds),
        "cores": max(t.cpu / t.seconds for t in rounds),
    }


def recorded(settings: Recording, env: gymnasium.Env) -> Took:
    """One recording, from the first reset until the last episode is published."""
    base: Any = env.unwrapped
    took, expert = Took(), SeededExpert(env, 1.0, 0.25)
    with (
        tempfile.TemporaryDirectory() as folder,
        EpisodeWriter(Path(folder) / "d", **writer_arguments(env)) as writer,
        took.timed(0),
    ):
        report = record(env, expert, writer, settings.episodes, progress=False)
    took.pictures = report.frames * len(base.cameras) * len(base.modalities)
    return took


def episodes_of(settings: Recording) -> dict[int, list[np.ndarray]]:
    """The joint positions of every frame of the episodes that `record` keeps, by seed."""
    env = make_env(settings.task, cameras=())
    expert, kept, seed = SeededExpert(env, 1.0, 0.25), {}, 0
    base: Any = env.unwrapped
    while len(kept) < settings.episodes:
        obs, info = env.reset(seed=seed)
        expert.reset(seed)
        states, finished = [base.sim.data.qpos.copy()], False
        while not finished:
            obs, _, ended, cut, info = env.step(expert.act(obs, info)[0])
            states.append(base.sim.data.qpos.copy())
            finished = ended or cut
        if info["is_success"]:
            kept[seed] = states
        seed += 1
    return kept


def drawn(env: gymnasium.Env, episodes: dict[int, list[np.ndarray]], renderer: Any) -> Took:
    """The pictures of all states by `mujoco.Renderer`, or by `sims` where `renderer` is None."""
    base: Any = env.unwrapped
    took, sim, count = Took(), base.sim, len(base.cameras) * len(base.modalities)
    for seed, states in episodes.items():
        env.reset(seed=seed)  # the look of the episode
        for state in states:
            sim.data.qpos[:] = state
            sim.refresh()
            with took.timed(count):
                base._pictures() if renderer is None else raw_pictures(base, renderer)
    return took


def raw_pictures(base: Any, renderer: Any) -> dict[str, list[np.ndarray]]:
    """Every camera's pictures now, as MuJoCo's documentation draws them."""
    found: dict[str, list[np.ndarray]] = {}
    for modality in base.modalities:
        if modality == "depth":
            renderer.enable_depth_rendering()
        for name in base.cameras:
            renderer.update_scene(base.sim.data, camera=name)
            found.setdefault(modality, []).append(renderer.render())
        renderer.disable_depth_rendering()
    return found


def same_pictures(env: gymnasium.Env, renderer: Any) -> bool:
    """Whether both renderers draw the same colours, and depth within a part in a million."""
    base: Any = env.unwrapped
    env.reset(seed=0)
    ours, raw = base._pictures(), raw_pictures(base, renderer)
    colours = zip(ours["images"].values(), raw["rgb"], strict=True)
    depth = zip(ours.get("depth", {}).values(), raw.get("depth", []), strict=True)
    return all(np.array_equal(a, b) for a, b in colours) and all(
        np.allclose(a, b, rtol=1e-6) for a, b in depth
    )


def measure(
    settings: Recording, episodes: dict[int, list[np.ndarray]], cameras: int, size: int, depth: bool
) -> dict[str, Any]:
    """One row: pictures per second and processor milliseconds per picture of every candidate."""
    from sims.cameras import ring  # before mujoco, which looks for OpenGL as it is imported

    import mujoco  # isort: skip

    free = ring(cameras)
    modalities = ("rgb", "depth") if depth else ("rgb",)
    env = make_env(
        settings.task, cameras=tuple(free), free_cameras=free, image_size=size, modalities=modalities
    )
    env.reset(seed=0)  # the first context is made by `sims`, which knows what must be imported before
    model = cast(Any, env.unwrapped).sim.model
    model.vis.global_.offwidth = model.vis.global_.offheight = size
    rounds: dict[str, list[Took]] = {"raw": [], "draw": [], "loop": [], "record": []}
    with mujoco.Renderer(model, size, size) as renderer:
        same = same_pictures(env, renderer)
        for turn in range(settings.rounds + 1):
            raw, played = drawn(env, episodes, renderer), Took()
            with played.timed(raw.pictures):
                episodes_of(settings)
            took = {
                "raw": raw,
                "draw": drawn(env, episodes, None),
                "loop": Took(raw.pictures, raw.seconds + played.seconds, raw.cpu + played.cpu),
                "record": recorded(settings, env),
            }
            for name in rounds if turn else ():
                rounds[name].append(took[name])
    env.close()
    found = {name: best(turns) for name, turns in rounds.items()}
    row: dict[str, Any] = {"cameras": cameras, "size": size, "depth": depth, "same_pictures": same}
    row |= {name: values["per_second"] for name, values in found.items()}
    row |= {f"{name}_cpu": values["cpu"] for name, values in found.items()}
    row["record_cores"] = found["record"]["cores"]
    row["two_cores"] = 2 * row["raw_cpu"] / row["record_cpu"]
    shares = {"share": "raw", "share_of_draw": "draw", "share_of_loop": "loop"}
    return row | {share: row["record"] / row[name] for share, name in shares.items()}


def main(settings: Recording) -> None:
    """Measure every case and write the result file."""
    began, episodes = time.perf_counter(), episodes_of(settings)
    rows = []
    for size in settings.sizes:
        for cameras in settings.cameras:
            for depth in (False, True):
                rows.append(measure(settings, episodes, cameras, size, depth))
                print(json.dumps(rows[-1]), flush=True)
    values = {
        "task": settings.task,
        "bar": BAR,
        "reached": sum(row["share"] >= BAR for row in rows),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "rows": rows,
    }
    print(write_result(settings.case, values, seconds=time.perf_counter() - began))


if __name__ == "__main__":
    main(tyro.cli(Recording))
