"""Sections on the data engine: the rasteriser, 4D scenes, the flywheel, recording, and what made views are worth."""

from __future__ import annotations

from typing import Any

from dataengine.charts import Bar, svg_bars, svg_curve

Section = tuple[str, dict[str, str]]
VARIANTS = {
    "restorer": "restorer (shipped)",
    "minute": "restorer, one minute of training",
    "world": "world model",
    "more_iterations": "more iterations (control)",
    "self_distillation": "self-distillation (control)",
    "constant_fill": "constant fill (control)",
    "planes": "planes completed, no generator (control)",
    "oracle": "true pictures (oracle)",
}
DATA = {
    "few": "(a) two observed views",
    "rendered": "(b) + six rendered",
    "flywheel": "(c) + six after two turns of the flywheel",
    "true": "(d) + six true ones",
}
CAMERAS = {"held_out": "cameras that no model was trained on", "observed": "the two that were observed"}


def spread(values: list[float], form: str = "{:+.2f}") -> str:
    """A value with its interval."""
    middle, low, high = (form.format(value) for value in values)
    return f"{middle} [{low}, {high}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def flywheel_section(values: dict[str, Any]) -> Section:
    """What every variant reached by round, and where the gated wheel stopped."""
    rounds, last = values["rounds"], len(next(iter(values["rounds"].values()))) - 1
    names = [name for name in VARIANTS if name in rounds]
    head = ["after round", *(str(n) for n in range(last + 1)), f"gain in {last} rounds", "moving", "SSIM", "input views",
            "cover", "depth, cm", "reprojection", "of depth alone", "seconds a round"]  # fmt: skip
    rows = []
    for name in names:
        end = rounds[name][last]
        rows.append([
            VARIANTS[name], *(f"{r['psnr']:.2f}" for r in rounds[name]), spread(values["gain"][name]),
            f"{end['moving_psnr']:.1f}", f"{end['ssim']:.2f}", f"{end['input_psnr']:.1f}", f"{end['cover']:.2f}",
            f"{end['depth_cm']:.2f}", f"{100 * values['reprojection_change'][name][0]:+.0f} %",
            f"{100 * values['reprojection_depth_change'][name][0]:+.0f} %", f"{end['seconds']:.1f}",
        ])  # fmt: skip
    first = rounds[names[0]][0]
    notes = [
        f"{values['scenes']} scenes, two observed cameras; PSNR in dB on held-out cameras, means over scenes with 95 % "
        f"bootstrap intervals. After the first fit: moving {first['moving_psnr']:.1f} dB, SSIM {first['ssim']:.2f}, "
        f"input views {first['input_psnr']:.1f} dB, reprojection error {first['reprojection']:.4f}.",
        "Over the best control ("
        + VARIANTS[values["best_control"]]
        + "), scene by scene: "
        + "; ".join(f"{VARIANTS[n]} {spread(v)} dB" for n, v in values["over_best_control"].items())
        + ".",
        "Pictures at the anchors before and after the generator, first round: "
        + "; ".join(
            f"{VARIANTS[n]} {v['anchor_psnr_before']:.1f} to {v['anchor_psnr_after']:.1f} dB"
            for n, v in values["anchors"].items()
        )
        + ".",
        "With the gate on, up to six rounds: " + "; ".join(_stops(values["gated"])) + ".",
    ]
    curves = {VARIANTS[name]: (list(range(last + 1)), [r["psnr"] for r in rounds[name]]) for name in names}
    drawn = {"flywheel": svg_curve(curves, "round", "PSNR on held-out cameras, dB")}
    return "\n\n".join([table(head, rows), *notes]), drawn


def _stops(gated: dict[str, Any]) -> list[str]:
    found = []
    for scene, variants in gated.items():
        words = []
        for name, log in variants.items():
            kept = sum(1 for _, _, good in log if good) - 1
            end = f"stopped itself after {kept}" if not log[-1][2] else f"kept all {kept}"
            best = [psnr for psnr, _, good in log if good]
            words.append(f"{VARIANTS[name]} {end} ({best[0]:.1f} to {best[-1]:.1f} dB)")
        found.append(f"{scene}: {', '.join(words)}")
    return found


def repair_section(values: dict[str, Any]) -> Section:
    """The world model as a generator beside the plain ones."""
    rows = [[name, f"{row['psnr']:.2f}", f"{row['moving_psnr']:.2f}"] for name, row in values.items()]
    scenes = next(iter(values.values()))["scenes"]
    note = f"Pictures of six anchor cameras in {scenes} scenes, nine frames each; the number is the strength of the noise."
    return "\n\n".join([table(["repaired by", "PSNR", "moving"], rows), note]), {}


def data_help_section(values: dict[str, Any]) -> Section:
    """Success and PSNR of models trained on each kind of data."""
    seeds = sorted({key.rsplit("/", 1)[1] for key in values if "/" in key})
    rows, bars = [], []
    for arm, label in DATA.items():
        if arm not in values:
            continue
        for kind, cameras in CAMERAS.items():
            row = values[arm][kind]
            percent = [100 * x for x in (row["success"], *row["interval"])]
            p = f"{row['p_against_few']:.2g}" if "p_against_few" in row else "-"
            gain = spread(row["gain_over_copying"], "{:+.1f}")
            rows.append([label, cameras, spread(percent, "{:.0f}"), str(row["episodes"]), p,
                         f"{row['psnr_moving']:.1f}", gain, f"{row['psnr']:.1f}"])  # fmt: skip
            middle, low, high = percent
            bars.append(Bar(f"{label}, {cameras.split()[-1]}", middle, low, high, cameras))
    head = ["trained on", "tried from", "success, %", "episodes", "p against (a)", "moving PSNR", "gain over copying",
            "PSNR"]  # fmt: skip
    note = f"Seeds of training: {', '.join(seeds)}." if seeds else ""
    text = "\n\n".join(part for part in (table(head, rows), note) if part)
    return text, {"data_help": svg_bars(bars, "success of the policy, %")}


def scenes_section(values: dict[str, Any]) -> Section:
    """Every model of motion on cameras that it never saw."""
    rows, bars = [], []
    for key, row in values.items():
        task, size, *model = key.split(" ")
        name = " ".join(model)
        rows.append([task, size, name, f"{row['psnr']:.1f}", f"{row['moving_psnr']:.1f}", f"{row['ssim']:.2f}",
                     f"{row['fitted_psnr']:.1f}", f"{row['depth_cm']:.2f}", f"{row['gaussians']:.0f}",
                     f"{row['seconds']:.0f}"])  # fmt: skip
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for key, row in values.items():
        _, size, *model = key.split(" ")
        groups.setdefault((" ".join(model), size), []).append(row)
    means = []
    for (name, size), found in groups.items():
        psnr, moving = (sum(row[k] for row in found) / len(found) for k in ("psnr", "moving_psnr"))
        means.append([name, size, str(len(found)), f"{psnr:.1f}", f"{moving:.1f}"])
        bars.append(Bar(f"{name}, {size} px", moving, group=f"{size} px"))
    head = [
        "task",
        "pixels",
        "motion",
        "PSNR",
        "moving",
        "SSIM",
        "fitted views",
        "depth, cm",
        "Gaussians",
        "seconds",
    ]
    short = table(["motion", "pixels", "tasks", "PSNR", "moving"], means)
    chart = svg_bars(bars, "PSNR on moving pixels of held-out cameras, dB")
    return "\n\n".join([short, "All of them:", table(head, rows)]), {"scenes": chart}


def rasterize_section(values: dict[str, Any]) -> Section:
    """Times by size, beside torch tiles."""
    rows = []
    for key, row in values["rows"].items():
        side, n = key.split()
        tiled = f"{row['training_over_tiled']:.0f}x" if "training_over_tiled" in row else "-"
        rows.append([side, n, f"{row['ours_forward_ms']:.1f}", f"{row['ours_training_ms']:.1f}", tiled])
    head = ["pixels", "Gaussians", "forward, ms", "with backward, ms", "times as fast as torch, tile by tile"]
    ours = values["errors"]["ours"]
    worst = max(value for key, value in ours.items() if key != "image")
    note = f"Against the definition in float64: image {ours['image']:.1e}, gradients {worst:.1e} relative."
    drawn = {}
    for number, (title, series) in enumerate(values["growth"].items()):
        curves = {
            name.removesuffix("_training_ms"): (series["size"][: len(times)], times)
            for name, times in series.items()
            if name != "size"
        }
        drawn[f"rasterize_{number}"] = svg_curve(curves, title, "milliseconds with backward", log_y=True)
    return "\n\n".join([table(head, rows), note]), drawn


def recording_section(values: dict[str, Any]) -> Section:
    """Pictures per second beside the bare renderer."""
    rows = [
        [str(row["cameras"]), str(row["size"]), "colour and depth" if row["depth"] else "colour",
         f"{row['raw']:.0f}", f"{row['record']:.0f}", f"{100 * row['share']:.0f} %", f"{row['record_cores']:.1f}",
         f"{100 * row['two_cores']:.0f} %",
         f"{100 * row['share_of_loop']:.0f} %" if "share_of_loop" in row else "-"]
        for row in values["rows"]
    ]  # fmt: skip
    head = ["cameras", "pixels", "what", "bare renderer, pictures/s", "recording", "share", "cores in use",
            "share if both cores were idle", "share of a rollout that keeps nothing"]  # fmt: skip
    note = (
        f"{100 * values['bar']:.0f} % of the bare renderer are reached in {values['reached']} of {len(rows)} cases, on "
        f"{values['cores']} cores. Physics, inverse kinematics and the expert are a fixed price of a frame, so the share "
        "grows with the cameras; colour pictures are compressed as well as drawn, and depth comes from "
        "the same pass as colour. Where the last column but one is below the bar, no order of the same work reaches it; "
        "elsewhere threads that wait for each other lose the rest."
    )
    return "\n\n".join([table(head, rows), note]), {}


def parallel_section(values: dict[str, Any]) -> Section:
    """What a second worker brings, quiet medians of rounds taken in turn."""
    rows = []
    for work, unit in (("recording", "pictures"), ("fitting", "scenes")):
        found = values[work]["median"]
        speed = found[f"{unit}_per_second"]
        form = "{:.0f}" if work == "recording" else "{:.2f}"
        rows.append([f"{work}, {unit}/s", *(form.format(speed[key]) for key in ("alone", "one", "two")),
                     f"{found['speedup']:.2f}", f"{found['over_alone']:.2f}"])  # fmt: skip
    head = ["work", "no Ray", "one worker", "two workers", "two over one", "two over no Ray"]
    note = f"{values['cores']} cores; workers are warm, starting them takes some seconds more."
    return "\n\n".join([table(head, rows), note]), {}


DATA_SECTIONS = {
    "flywheel": ("The flywheel, turned twice", flywheel_section),
    "repair": ("The world model as a generator", repair_section),
    "data_help": ("Do made views help?", data_help_section),
    "scenes": ("4D scenes on cameras never seen", scenes_section),
    "speed/rasterize": ("The rasteriser on one CPU core", rasterize_section),
    "speed/recording": ("Recording", recording_section),
    "speed/parallel": ("Workers", parallel_section),
}
