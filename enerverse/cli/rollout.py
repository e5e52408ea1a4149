"""`enerverse rollout`: run the policy in MuJoCo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enerverse.cli.messages import announce, command, count
from enerverse.cli.simulator import check_seed, check_task
from enerverse.loading import load_policy


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Run the policy in MuJoCo, all episodes in lock-step, and report how often it succeeds."""

    task: str
    """One of the simulator's tasks; `enerverse info` lists them."""
    checkpoint: Path | None = None
    """Checkpoint or run folder; when not given, the shipped one."""
    episodes: int = 10
    """How many episodes."""
    seed: int = 1000
    """First seed; every episode takes the next one."""
    out: Path | None = None
    """Video of all episodes to write (a name that ends in .mp4)."""
    randomize: bool = False
    """Draw colours, light and cameras anew in every episode."""
    device: str | None = None
    """cpu or cuda; when not given, the GPU if there is one."""

    def run(self) -> None:
        """Play and print success with its interval."""
        check_task(self.task)
        check_seed(self.seed)
        if self.episodes < 1:
            raise ValueError(f"episodes: expected at least 1, got {self.episodes}")
        if self.out is not None and self.out.suffix != ".mp4":
            raise ValueError(f"out: expected a name that ends in .mp4, got {self.out.name!r}")
        policy = load_policy(self.checkpoint, self.device)
        announce(
            f"rollout: {count(self.episodes, 'episode')} of {self.task}, seeds from {self.seed} on"
            + ", with another look each" * self.randomize,
            f"video into {self.out}" if self.out else "no video (name one with --out)",
        )
        from enerverse.cli.playing import play

        played = play(policy, self.task, range(self.seed, self.seed + self.episodes), self.randomize)
        rate = played.success
        wins = sum(outcome.success for outcome in played.outcomes)
        print(
            f"success: {wins} of {self.episodes}, {rate.estimate:.0%} "
            f"(95 % Wilson interval {rate.low:.0%} to {rate.high:.0%})"
        )
        print(f"mean steps: {played.steps:.1f}; {played.decision_ms:.0f} ms per decision")
        if self.out:
            self._write(played.film())
        print(f"next: {command('enerverse demo', checkpoint=self.checkpoint, device=self.device)}")

    def _write(self, film) -> None:
        from enerverse.files import atomic_write
        from enerverse.media import encode_mp4

        assert self.out is not None
        with atomic_write(self.out) as temporary:
            temporary.write_bytes(encode_mp4(film, 10.0, scale=1))
        print(f"video: {self.out}")
