"""`enerverse record`: demonstrations of a simulator task as an episode dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from enerverse.cli.messages import announce
from enerverse.cli.simulator import SeededExpert, make_env

if TYPE_CHECKING:
    from dataengine.record import RecordReport


@dataclass(frozen=True, kw_only=True)
class Record:
    """Record demonstrations of a task into a LeRobot v3 dataset (with cameras); run again to go on."""

    task: str
    """One of the simulator's tasks; `enerverse info` lists them."""
    out: Path
    """Dataset folder; made where missing, gone on with where not."""
    episodes: int = 50
    """How many successful episodes the dataset shall hold."""
    seed: int = 0
    """First seed; every episode takes the next one."""
    noise: float = 1.0
    """Strength of the disturbance on the expert (the clean action is kept as the label)."""
    clean_share: float = 0.25
    """Share of episodes without disturbance."""
    cameras: tuple[str, ...] = ("front", "left", "top")
    """Views to record."""
    image_size: int = 64
    """Side of the square pictures, in pixels."""
    segmentation: bool = False
    """Record what each pixel belongs to."""
    depth: bool = False
    """Record depth in metres."""
    randomize: bool = False
    """Draw colours, light and cameras anew in every episode."""

    def run(self) -> None:
        """Record and say where it lies."""
        announce(
            f"record: {self.episodes} demonstrations of {self.task}, seeds from {self.seed} on",
            f"views: {', '.join(self.cameras)}, {self.image_size} x {self.image_size} pixels",
            f"into {self.out}; Ctrl-C keeps finished episodes, the same command goes on",
        )
        report = record_task(self)
        print(
            f"kept {report.kept} of {report.tried} episodes, {report.frames} frames "
            f"in {report.seconds:.0f} s: {self.out}"
        )
        print(f"next: enerverse train autoencoder --data {self.out} --out runs/mine")


def record_task(settings: Record) -> RecordReport:
    """Do what `settings` say."""
    from dataengine.episodes import EpisodeWriter
    from dataengine.record import record, writer_arguments

    modalities = ["rgb"] + ["segmentation"] * settings.segmentation + ["depth"] * settings.depth
    env = make_env(
        settings.task, cameras=settings.cameras, image_size=settings.image_size, modalities=tuple(modalities),
        randomize=settings.randomize,
    )  # fmt: skip
    try:
        with EpisodeWriter(settings.out, robot_type="panda", **writer_arguments(env)) as writer:
            policy = SeededExpert(env, settings.noise, settings.clean_share)
            return record(env, policy, writer, settings.episodes, settings.seed)
    finally:
        env.close()
