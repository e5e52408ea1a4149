"""Loading checkpoints: a folder with `world` and `policy`, a run folder that holds one, or one part itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from enerverse.pipelines import EnerVersePipeline, EnerVersePolicy

SHIPPED = Path(__file__).parent / "checkpoints" / "tiny"
PLACES = {
    "EnerVersePipeline": ("world", "checkpoint/world", "world/pipeline", "."),
    "EnerVersePolicy": ("policy", "checkpoint/policy", "policy/policy", "."),
}
WORDS = {"EnerVersePipeline": "world model", "EnerVersePolicy": "policy"}


def find_part(checkpoint: str | Path | None, kind: str) -> Path:
    """The folder of the world model or the policy in `checkpoint` (None: the shipped one).

    Raises FileNotFoundError in one sentence that says how to train what is missing.
    """
    folder = SHIPPED if checkpoint is None else Path(checkpoint)
    for place in PLACES[kind]:
        if _class_name(folder / place) is not None and (place != "." or _class_name(folder) == kind):
            return folder / place
    advice = "run `make tiny` to train one (hours on a CPU), or name yours with --checkpoint"
    if checkpoint is not None:
        advice = "train one with `enerverse train`, or give its run folder"
    where = "the shipped checkpoint" if checkpoint is None else str(checkpoint)
    raise FileNotFoundError(f"{where}: expected a trained {WORDS[kind]}, found none; {advice}")


def _class_name(folder: Path) -> str | None:
    """The kind of pipeline saved in `folder`, "" where its index is damaged, None where there is none."""
    path = folder / "model_index.json"
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    return str(index.get("_class_name", "")) if isinstance(index, dict) else ""


def load_world(checkpoint: str | Path | None = None, device: str | None = None) -> EnerVersePipeline:
    """The world model of a checkpoint on `device` (default: the GPU if there is one).

    Raises FileNotFoundError when there is none and ValueError when it is damaged.
    """
    from enerverse.pipelines import EnerVersePipeline

    pipeline = EnerVersePipeline.from_pretrained(find_part(checkpoint, "EnerVersePipeline"))
    pipeline.set_progress_bar_config(disable=None)
    return pipeline.to(check_device(device))


def load_policy(checkpoint: str | Path | None = None, device: str | None = None) -> EnerVersePolicy:
    """The policy of a checkpoint on `device`; raises as `load_world` does."""
    from enerverse.pipelines import EnerVersePolicy

    policy = EnerVersePolicy.from_pretrained(find_part(checkpoint, "EnerVersePolicy"))
    return policy.to(check_device(device))


def check_device(device: str | None) -> str:
    """`device` or the default one; ValueError where torch cannot use it."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, found none; use --device cpu")
    return device
