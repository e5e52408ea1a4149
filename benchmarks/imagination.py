"""How well the world model imagines: held-out episodes, all views, against copying and the autoencoder's ceiling.

    python -m benchmarks.imagination --run runs/tiny

reads the held-out splits and the world model of a recipe run and writes `imagination.json`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from benchmarks.results_io import write_result
from enerverse.evaluate.imagination import (
    SPANS,
    Told,
    Window,
    best_of,
    copy_last,
    gain,
    held_out_windows,
    imagine_window,
    measure,
    pool,
    reconstruct,
)
from enerverse.evaluate.segmenter import RobotSegmenter, train_segmenter
from enerverse.pipelines import EnerVersePipeline
from enerverse.recipes.tiny import TASKS, read_split


@dataclass(frozen=True, kw_only=True)
class Imagination:
    """Score a trained world model.

    run: folder of the recipe. world: pipeline folder (default: the run's). windows: per episode. samples: for best-of.
    """

    run: Path = Path("runs/tiny")
    world: Path | None = None
    windows: int = 1
    samples: int = 8
    steps: int = 5
    seed: int = 0
    case: str = "imagination"
    tasks: tuple[str, ...] = tuple(TASKS)


def fit_segmenter(run: Path, views: tuple[str, ...]) -> RobotSegmenter:
    """The robot segmenter, trained on the recipe's `masks` split."""
    images, masks = [], []
    for dataset in read_split(run, "masks").values():
        for index in range(len(dataset)):
            episode = dataset.episode(index, views=views)
            images.append(episode.stacked_images[::2].reshape(-1, *episode.stacked_images.shape[2:]))
            assert episode.segmentation is not None
            labels = np.stack([episode.segmentation[view] for view in views], 1)[::2] == 1
            masks.append(labels.reshape(-1, *labels.shape[2:]))
    pictures = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)
    return train_segmenter(pictures, torch.from_numpy(np.concatenate(masks)))


def modes(settings: Imagination, pipe: EnerVersePipeline) -> dict[str, object]:
    """Imagination functions by name: each maps (window, generator) to frames [H, V, 3, P, P]."""

    def imagine(told: Told, steps: int) -> object:
        return lambda window, generator: imagine_window(
            pipe, window, told=told, generator=generator, steps=steps
        )[0]

    planned = (
        {} if pipe.unet.plan is None else {f"plan_{settings.steps}_steps": imagine("plan", settings.steps)}
    )

    return {
        "copy_last": lambda window, _: copy_last(window),
        "autoencoder": lambda window, _: reconstruct(pipe, window),
        f"instruction_{settings.steps}_steps": imagine("instruction", settings.steps),
        "instruction_1_step": imagine("instruction", 1),
        **planned,
        f"actions_{settings.steps}_steps": imagine("actions", settings.steps),
        "actions_1_step": imagine("actions", 1),
    }


def score_split(
    settings: Imagination,
    pipe: EnerVersePipeline,
    robot: RobotSegmenter,
    split: str,
    chosen: dict[str, object],
) -> dict[str, object]:
    """Figures of every mode, per task and pooled, on one held-out split."""
    sums: dict[str, dict[str, list[np.ndarray]]] = {mode: {span: [] for span in SPANS} for mode in chosen}
    tasks, episodes = [], []
    for task, dataset in read_split(settings.run, split).items():
        if task not in settings.tasks:
            continue
        windows = held_out_windows(pipe, dataset, settings.windows)
        for window in tqdm(windows, desc=f"{split} {task}", disable=None):
            tasks.append(task)
            episodes.append(f"{task}/{window.episode.index}")
            for mode, imagine in chosen.items():
                # The same window gets the same noise in every mode and every run.
                generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + len(tasks))
                frames = imagine(window, generator)  # type: ignore[operator]
                for span, row in measure(frames, window, robot.mask).items():
                    sums[mode][span].append(row)
    groups, kinds = np.array(episodes), np.array(tasks)
    return {mode: _rows({s: np.stack(r) for s, r in by_span.items()},
                        {s: np.stack(r) for s, r in sums["copy_last"].items()}, kinds, groups)
            for mode, by_span in sums.items()}  # fmt: skip


def _rows(
    sums: dict[str, np.ndarray], copied: dict[str, np.ndarray], kinds: np.ndarray, groups: np.ndarray
) -> dict[str, object]:
    result: dict[str, object] = {}
    for span, rows in sums.items():
        found = gain(rows, copied[span], groups)
        figures = {name: round(value, 3) for name, value in pool(rows).items()}
        result[span] = figures | {
            "gain": round(found.estimate, 3),
            "gain_interval": [round(found.low, 3), round(found.high, 3)],
            "by_task": {
                str(kind): round(
                    pool(rows[kinds == kind])["psnr_moving"]
                    - pool(copied[span][kinds == kind])["psnr_moving"],
                    3,
                )
                for kind in np.unique(kinds)
            },
        }
    return result


def segmenter_ceiling(robot: RobotSegmenter, windows: list[Window]) -> float:
    """Overlap of the segmenter's mask with the true one on true frames."""
    return pool(np.stack([measure(window.truth, window, robot.mask)["1-8"] for window in windows]))[
        "robot_iou"
    ]


def main(settings: Imagination) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    pipe = EnerVersePipeline.from_pretrained(settings.world or settings.run / "world" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    views = tuple(pipe.config.views)
    robot = fit_segmenter(settings.run, views)
    chosen = modes(settings, pipe)
    values: dict[str, object] = {
        "test": score_split(settings, pipe, robot, "test", chosen),
        "test_clean": score_split(settings, pipe, robot, "test_clean", chosen),
    }
    if settings.samples > 1:
        single = {name: chosen[name] for name in ("copy_last", f"instruction_{settings.steps}_steps")}
        best = {
            f"best_of_{settings.samples}": lambda w, g: best_of(pipe, w, settings.samples, g, settings.steps)
        }
        one_window = Imagination(**{**vars(settings), "windows": 1})
        values["best_of"] = score_split(one_window, pipe, robot, "test", single | best)
    sample = [w for d in read_split(settings.run, "test").values() for w in held_out_windows(pipe, d, 1)[:5]]
    values["segmenter_iou_on_truth"] = round(segmenter_ceiling(robot, sample), 3)
    path = write_result(settings.case, values, seconds=time.perf_counter() - began)
    _print(values)
    print(path)


def _print(values: dict[str, object]) -> None:
    for split in ("test", "test_clean", "best_of"):
        for mode, spans in values.get(split, {}).items():  # type: ignore[union-attr]
            for span, row in spans.items():
                low, high = row["gain_interval"]
                print(
                    f"{split:10} {mode:22} {span:5} psnr {row['psnr']:5.2f} moving {row['psnr_moving']:5.2f} "
                    f"gain {row['gain']:+.2f} [{low:+.2f}, {high:+.2f}] ssim {row['ssim']:.3f}/{row['ssim_moving']:.3f} "
                    f"robot {row['robot_iou']:.3f} {row['by_task']}"
                )


if __name__ == "__main__":
    main(tyro.cli(Imagination))
