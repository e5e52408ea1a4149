"""`enerverse imagine`: the future of a recorded episode, beside what really happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enerverse.cli.messages import announce, command
from enerverse.cli.record import recorded_task
from enerverse.loading import load_world

if TYPE_CHECKING:
    import numpy as np

    from enerverse.demo.imagining import Imagined
    from enerverse.demo.takes import Take
    from enerverse.evaluate.imagination import Told
    from enerverse.pipelines import EnerVersePipeline


@dataclass(frozen=True, kw_only=True)
class Imagine:
    """Imagine how a recorded episode goes on and write a video of truth and imagination, all views."""

    data: Path
    """Dataset folder with the episode."""
    out: Path = Path("imagined.mp4")
    """Video to write."""
    checkpoint: Path | None = None
    """Checkpoint or run folder; when not given, the shipped one."""
    episode: int = 0
    """Which episode of the dataset."""
    start: int = 8
    """First imagined frame; the frames before it are observed."""
    frames: int = 32
    """How many frames to imagine."""
    instruction: str | None = None
    """What to imagine; when not given, the episode's own instruction."""
    with_actions: bool = False
    """Follow the recorded actions instead of the instruction alone."""
    plan: bool = False
    """Let the model plan its actions from the recorded state at the last observed frame, and follow those."""
    memory: str | None = None
    """Memory policy; when not given, the checkpoint's, sparse_uniform."""
    steps: int = 5
    """Denoising steps per chunk."""
    guidance: float = 1.0
    """Strength of the instruction; 1 is off and twice as fast."""
    seed: int = 0
    """Seed of the noise."""
    device: str | None = None
    """cpu or cuda; when not given, the GPU if there is one."""

    def run(self) -> None:
        """Imagine, write the video, print the score of every chunk."""
        from enerverse.pipelines.inputs import check_plan

        self._check()
        pipe = load_world(self.checkpoint, self.device)
        pipe.make_memory(self.memory)
        if self.plan:
            check_plan(pipe)
        take = read_take(self, pipe)
        announce(
            f"imagine: frames {self.start} to {self.start + self.frames - 1} of episode {self.episode} in "
            f"{self.data}",
            f"told: {self.instruction or take.task!r}{', and the recorded actions' * self.with_actions}"
            f"{', and the recorded state to plan from' * self.plan}",
            f"into {self.out}",
        )
        from enerverse.demo.imagining import imagine

        result = imagine(
            pipe, [take], self.start, self.frames, told=self._told(), task=self.instruction,
            memory=self.memory, steps=self.steps, guidance=self.guidance, seed=self.seed, stop_at_end=True,
        )  # fmt: skip
        write_film(self, take, result.frames[0])
        print("\n".join(describe(take, result, self.start, pipe.unet.config.chunk)))
        print(f"video: {self.out}")
        print(f"next: {self._next()}")

    def _next(self) -> str:
        """The command that shows the other half: with actions, or a policy that uses the model."""
        if self.with_actions:
            task = recorded_task(self.data)
            return command("enerverse rollout", checkpoint=self.checkpoint, task=task, device=self.device)
        return command(
            "enerverse imagine", checkpoint=self.checkpoint, data=self.data, episode=self.episode or None,
            start=self.start if self.start != 8 else None, frames=self.frames if self.frames != 32 else None,
            memory=self.memory, steps=self.steps if self.steps != 5 else None, seed=self.seed or None,
            with_actions=True, device=self.device,
        )  # fmt: skip

    def _told(self) -> Told:
        return "actions" if self.with_actions else "plan" if self.plan else "instruction"

    def _check(self) -> None:
        if self.with_actions and self.plan:
            raise ValueError("with-actions and plan: expected one of them, got both; leave one out")
        if self.start < 1:
            raise ValueError(f"start: expected at least one observed frame, got {self.start}")
        if self.frames < 1 or self.steps < 1:
            raise ValueError(f"frames and steps: expected at least 1, got {self.frames} and {self.steps}")
        if self.out.suffix != ".mp4":
            raise ValueError(f"out: expected a name that ends in .mp4, got {self.out.name!r}")


def read_take(settings: Imagine, pipe: EnerVersePipeline) -> Take:
    """The episode, checked against the model. Raises DatasetError or ValueError in one sentence."""
    from dataengine.episodes import EpisodeDataset
    from enerverse.cli.train import check_pictures
    from enerverse.demo.takes import from_episode

    config: Any = pipe.config
    dataset, views = EpisodeDataset(settings.data), tuple(config.views)
    check_pictures(dataset, views, config.image_size, "checkpoint")
    if not 0 <= settings.episode < len(dataset):
        raise ValueError(
            f"episode: expected 0 to {len(dataset) - 1} in {settings.data}, got {settings.episode}"
        )
    take = from_episode(dataset.episode(settings.episode, views=views))
    if settings.start > len(take):
        raise ValueError(
            f"start: expected at most {len(take)}, the length of episode {settings.episode}, got {settings.start}"
        )
    return take


def write_film(settings: Imagine, take: Take, imagined: np.ndarray) -> None:
    """Rows are views, columns truth and imagination [T, V, P, P, 3]; written whole or not at all."""
    from enerverse.files import atomic_write
    from enerverse.films import comparison
    from enerverse.media import encode_mp4

    truth = take.pictures[settings.start : settings.start + len(imagined)]
    columns = {"truth": truth, "imagined": imagined} if len(truth) else {"imagined": imagined}
    film = encode_mp4(comparison(columns, take.views, side=256), take.fps, scale=1)
    with atomic_write(settings.out) as temporary:
        temporary.write_bytes(film)


def describe(take: Take, result: Imagined, start: int, chunk: int) -> list[str]:
    """One line per chunk, then speed and end."""
    from enerverse.demo.imagining import frame_psnr, mean_psnr

    frames, truth = result.frames[0], take.pictures[start:]
    psnr = frame_psnr([frames], [truth])
    still = frame_psnr([take.pictures[start - 1 : start].repeat(len(frames), 0)], [truth])
    lines = []
    for first in range(0, len(frames), chunk):
        part = slice(first, min(first + chunk, len(frames)))
        name = f"frames {start + first:3d} to {start + part.stop - 1:3d}"
        score = (
            f"{mean_psnr(psnr[part]):5.1f} dB (copying frame {start - 1}: {mean_psnr(still[part]):.1f} dB)"
        )
        lines.append(f"{name}: {score if part.start < len(truth) else 'the recording has ended'}")
    lines.append(f"{result.chunk_ms:.0f} ms per chunk of {chunk} frames and {len(take.views)} views")
    end = result.ended[0]
    lines.append(
        f"end of the task imagined at frame {start + end}" if end >= 0 else "no end of the task imagined"
    )
    return lines
