"""`enerverse info`: what runs on this machine and what there is to choose from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enerverse.cli.simulator import check_backend, make_env
from enerverse.loading import PLACES, SHIPPED, find_part

KERNELS = Path(__file__).parents[2] / "sparse_core" / "kernels"
IMPLEMENTATIONS = ("reference", "numba", "triton")


@dataclass(frozen=True, kw_only=True)
class Info:
    """List versions, device, rendering, presets, tasks, memory policies, objectives, checkpoints, kernels."""

    checkpoint: Path | None = None
    """Checkpoint or run folder to describe; when not given, the shipped one and those under runs/."""

    def run(self) -> None:
        """Print one block per subject. Raises FileNotFoundError where there is no checkpoint at `checkpoint`."""
        check_backend()
        if self.checkpoint is not None and not list_parts(self.checkpoint):
            raise FileNotFoundError(
                f"{self.checkpoint}: expected a trained world model or policy, found none; train one with `enerverse "
                "train`, or give its run folder"
            )
        for title, lines in self._blocks():
            print(f"{title}:")
            print("\n".join(f"  {line}" for line in lines))

    def _blocks(self) -> Iterator[tuple[str, list[str]]]:
        from enerverse.diffusion import OBJECTIVES
        from enerverse.memory import POLICIES

        yield "versions", list_versions()
        yield "device", list_devices()
        yield "rendering", [describe_rendering()]
        yield "presets", list_presets()
        yield "tasks", list_tasks()
        yield "memory policies", list(POLICIES)
        yield "objectives", list(OBJECTIVES)
        yield "checkpoints", list_checkpoints(self.checkpoint)
        yield "kernels", list_kernels()


def list_versions() -> list[str]:
    """Python and packages."""
    from enerverse.environment import versions

    return [f"{name} {version}" for name, version in versions().items()]


def list_devices() -> list[str]:
    """The processor, and the GPU if torch sees one."""
    import torch

    from enerverse.environment import device_name

    gpu = [device_name("cuda")] if torch.cuda.is_available() else ["no CUDA device"]
    return [f"{device_name('cpu')}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads", *gpu]


def describe_rendering() -> str:
    """The OpenGL backend and whether it draws; where it does not, the packages to install."""
    from sims.errors import RenderingError

    try:
        env = make_env("Lift", cameras=("front",), image_size=16)
        env.reset(seed=0)
        env.close()
    except RenderingError as error:
        return str(error)
    return f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '(display)')}: works"


def list_presets() -> list[str]:
    """Presets with the parameters of their parts, in millions."""
    from enerverse.cli.stages import count_parameters
    from enerverse.presets import PRESETS

    lines = []
    for name, make in PRESETS.items():
        parts = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in count_parameters(make()).items())
        lines.append(f"{name}: {make().image_size} px, {len(make().views)} views; {parts}")
    return lines


def list_tasks() -> list[str]:
    """Tasks with the first sentence of what they ask for."""
    from sims.tasks import TASKS

    sentences = {name: (task.__doc__ or "").replace("``", "").split(".")[0] for name, task in TASKS.items()}
    return [f"{name}: {' '.join(sentence.split())}" for name, sentence in sentences.items()]


def list_checkpoints(asked: Path | None) -> list[str]:
    """Checkpoints that can be loaded, with the beginning of their card."""
    folders = [asked] if asked else [SHIPPED, *sorted(Path("runs").glob("*"))]
    lines = []
    for folder in folders:
        if parts := list_parts(folder):
            name = "shipped (tiny)" if folder == SHIPPED else str(folder)
            lines += [f"{name}: {', '.join(parts)}", *(f"  {line}" for line in read_card(folder))]
    return lines or ["none found; `make tiny` trains one"]


def list_parts(folder: Path) -> list[str]:
    """Which of `world` and `policy` are in a checkpoint or run folder."""
    return [name for kind, name in zip(PLACES, ("world", "policy"), strict=True) if _has(folder, kind)]


def _has(folder: Path, kind: str) -> bool:
    try:
        find_part(folder, kind)
    except FileNotFoundError:
        return False
    return True


def read_card(folder: Path) -> list[str]:
    """Title and first paragraph of a checkpoint's card, line by line; none where it has no card."""
    for path in (folder / "card.md", folder / "checkpoint" / "card.md"):
        if path.is_file():
            blocks = path.read_text(encoding="utf-8").strip().split("\n\n")
            return [line.strip("# ") for block in blocks[:2] for line in block.splitlines()]
    return []


def list_kernels() -> list[str]:
    """Operations of sparse_core and the implementations that lie beside each."""
    lines = []
    for folder in sorted(path for path in KERNELS.glob("*") if (path / "__init__.py").is_file()):
        found = [name for name in IMPLEMENTATIONS if (folder / f"{name}.py").is_file()]
        lines.append(f"{folder.name}: {', '.join(found) or 'none'}")
    return lines or ["none yet; attention runs through torch"]
