"""Figures and tables of the README and of docs/multiview.md, drawn from the committed result files and nothing else.

    python -m benchmarks.figures [--check]

writes `docs/figures/*.svg` and the text between the markers in both; `--check` only says whether both are current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.figures_data import DATA_SECTIONS
from benchmarks.results_io import RESULTS, Result, read_results
from dataengine.charts import Bar, svg_bars, svg_curve
from enerverse.files import atomic_write

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DATA_PAGE = ROOT / "docs" / "multiview.md"
FIGURES = ROOT / "docs" / "figures"
MARKERS = re.compile(r"(<!-- figures -->).*?(<!-- /figures -->)", re.DOTALL)
MODES = {
    "copy_last": "copy the last frame",
    "instruction_5_steps": "from the instruction",
    "instruction_1_step": "from the instruction, 1 step",
    "plan_5_steps": "from the instruction, by planned actions",
    "actions_5_steps": "given the actions",
    "actions_1_step": "given the actions, 1 step",
    "autoencoder": "autoencoder (ceiling)",
}
SITUATIONS = {
    "history": "true history",
    "planned": "true history, planned actions",
    "rollout": "imagined history",
}
ARMS = {
    "tokens": "world-model tokens + latents (shipped)",
    "latents": "latents only (control)",
    "untrained": "untrained backbone + latents",
    "mean": "pooled feature + latents",
    "pixels": "CNN from pixels",
    "state": "simulator state (harness check)",
    "random": "random",
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Draw everything, or only check that it is current."""

    check: bool = False


def imagination_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Table and chart of the imagination benchmark."""
    rows, bars = [], []
    for split, title in (("test", "disturbed"), ("test_clean", "undisturbed")):
        for mode, label in MODES.items():
            for span, row in values[split].get(mode, {}).items():
                low, high = row["gain_interval"]
                rows.append(
                    f"| {title} | {label} | {span} | {row['psnr']:.1f} | {row['psnr_moving']:.1f} | {row['gain']:+.1f} "
                    f"[{low:+.1f}, {high:+.1f}] | {row['ssim']:.2f} / {row['ssim_moving']:.2f} | {row['robot_iou']:.2f} |"
                )
                if split == "test" and mode != "copy_last":
                    bars.append(Bar(f"{label}, frames {span}", row["gain"], low, high, span))
    head = "| demonstrations | mode | frames | PSNR | moving | gain over copying | SSIM all / moving | robot overlap |"
    text = "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])
    best = values.get("best_of", {}).get("best_of_8", {})
    if best:
        spans = ", ".join(f"frames {span} {row['gain']:+.1f} dB" for span, row in best.items())
        text += f"\n\nBest of 8 samples from the instruction: {spans} over copying."
    return text, {"imagination": svg_bars(bars, "gain over copying the last frame on moving pixels, dB")}


def policies_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Table and chart of the policy arms."""
    tasks = [key for key in next(iter(values.values())) if key != "p_against_latents"]
    rows, bars = [], []
    for arm, label in ARMS.items():
        if arm not in values:
            continue
        cells = []
        for task in tasks:
            row = values[arm][task]
            low, high = row["interval"]
            cells.append(f"{100 * row['success']:.0f} [{100 * low:.0f}, {100 * high:.0f}]")
            bars.append(Bar(f"{task}: {label}", 100 * row["success"], 100 * low, 100 * high, label))
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    bars.sort(key=lambda bar: tasks.index(bar.label.split(":")[0]))
    head = "| policy input | " + " | ".join(tasks) + " |"
    return "\n".join([head, "|---|" + "---|" * len(tasks), *rows]), {"policies": svg_bars(bars, "success, %")}


def memory_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Table and chart of cue recall."""
    rows, bars = [], []
    for setting, title in SITUATIONS.items():
        for policy, row in values.get(setting, {}).items():
            low, high = (100 * end for end in row["interval"])
            rows.append(
                f"| {title} | {policy} | {100 * row['rate']:.0f} [{low:.0f}, {high:.0f}] | {row['n']} |"
            )
            bars.append(Bar(f"{policy}, {title}", 100 * row["rate"], low, high, title))
    text = "\n".join(["| history | memory policy | recall, % | episodes |", "|---|---|---|---|", *rows])
    return text, {"memory": svg_bars(bars, "cue recall, %", reference=("chance", 100 / 3))}


def cost_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Table of the cost of a long rollout."""
    rows = [
        f"| {policy} | {row['ms_chunk_5']:.0f} | {row['ms_chunk_100']:.0f} | {row['resident_mb_chunk_5']:.0f} | "
        f"{row['resident_mb_chunk_100']:.0f} | {row['memory_bytes_chunk_100'] / 1024:.0f} |"
        for policy, row in values.items()
    ]
    head = "| memory policy | ms at chunk 5 | ms at chunk 100 | MB at chunk 5 | MB at chunk 100 | remembered, KiB |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows]), {}


def sparse_world_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Table of what sparse attention costs and saves."""
    rows, bars = [], []
    for name, row in values.items():
        low, high = row["against_dense_interval"]
        rows.append(
            f"| {name} | {row['attention']:.2f} | {row['time']:.2f} | {row['psnr_moving']:.2f} | "
            f"{row['against_dense']:+.2f} [{low:+.2f}, {high:+.2f}] | {row['over_copying']:+.2f} |"
        )
        bars.append(Bar(name, row["against_dense"], low, high, "control" if "control" in name else "method"))
    head = (
        "| attention over views and places | multiply-adds of all attention | time | PSNR, moving | against dense | over "
        "copying |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *rows]), {
        "sparse_world": svg_bars(bars[1:], "PSNR on moving pixels against dense attention, dB")
    }


def attention_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Table of block-sparse attention against SDPA."""
    rows = []
    for name, row in values.items():
        if name != "errors":
            kind, length, _ = name.split()
            rows.append(
                f"| {kind} | {length} | {row['density']:.2f} | {row['forward_dense_ms']:.0f} -> {row['forward_ms']:.1f} | "
                f"{row['forward_times']:.2f}x | {row['training_dense_ms']:.0f} -> {row['training_ms']:.1f} | "
                f"{row['training_times']:.2f}x |"
            )
    worst = max(max(errors.values()) for errors in values["errors"].values())
    head = (
        "| mask | tokens | density | forward, ms | against SDPA | forward and backward, ms | against SDPA |"
    )
    text = "\n".join([head, "|---|---|---|---|---|---|---|", *rows])
    return f"{text}\n\nLargest relative error of output and gradients against float64: {worst:.1e}.", {}


def decode_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Table of decoding."""
    took, stack = values["step"]["ms"], values["stack"]
    rows = [
        f"| {label} | {took['sdpa']:.1f} -> {took[kind]:.2f} | {values['step']['over_sdpa'][kind]:.1f}x | "
        f"{values['step']['over_own_dense'][kind]:.1f}x |"
        for kind, label in (("random", "1/16 of the tokens, at random"), ("pages", "1/16, in pages of 16"))
    ]
    rows.append(
        f"| 12 layers under TidalDecode | {stack['sdpa']:.0f} -> {stack['tidal']:.0f} | {stack['times']:.1f}x | - |"
    )
    head = "| one step over 32,768 keys | ms | against SDPA | against our own dense loop |"
    return "\n".join([head, "|---|---|---|---|", *rows]), {}


def gpu_attention_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Table of block-sparse attention against dense attention by backend and flex_attention."""
    named = ("flash", "cudnn", "flex")
    rows, failed, backends = [], {}, set()
    for name, row in values.items():
        if name != "errors":
            cells = [
                cell
                for part in ("forward", "training")
                for cell in (
                    _number(row, f"{part}_ms", "{:.2f}"),
                    *(_number(row, f"{part}_over_{rival}", "{:.2f}x") for rival in named),
                )
            ]
            kind, length, _ = name.split()
            rows.append(f"| {kind} | {length} | {row['density']:.2f} | " + " | ".join(cells) + " |")
            failed |= row["failed"]
            backends.add(row["sdpa_backend"])
    head = ["mask", "tokens", "density", "forward, ms", *named, "forward and backward, ms", *named]
    worst = max(max(errors.values()) for errors in values["errors"].values())
    notes = [
        f"Torch's own choice of a backend: {', '.join(sorted(backends))}. Largest relative error of output and gradients "
        f"against float64: {worst:.1e}."
    ]
    return _gpu_text(head, rows, notes, failed), {}


def gpu_decode_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Table of decoding against every dense way."""
    step, stack = values["step"], values.get("stack", {})
    dense = [key.removeprefix("over_") for key in step if key.startswith("over_")]
    rows = [
        f"| {label} | {_number(step['ms'], kind, '{:.3f}')} | "
        + " | ".join(_number(step[f"over_{name}"], kind, "{:.1f}x") for name in dense)
        + " |"
        for kind, label in (("random", "1/16 of the tokens, at random"), ("pages", "1/16, in pages of 16"))
    ]
    notes = [f"Torch's own choice of a backend: {step['sdpa_backend']}."]
    if "times" in stack:
        notes.append(f"12 layers under TidalDecode: {stack['times']:.1f}x over SDPA.")
    head = ["one step over 32,768 keys", "ms", *(f"over {name.replace('_', ' ')}" for name in dense)]
    return _gpu_text(head, rows, notes, step["failed"] | stack.get("failed", {})), {}


def _gpu_text(head: list[str], rows: list[str], notes: list[str], failed: dict[str, str]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows, "", " ".join(notes)]
    return "\n".join([*lines, *(f"- {name} did not run: {why}" for name, why in failed.items())])


def _number(row: dict[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if key in row else "-"


def costs_section(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Sentences on memory, first calls, threads and half precision; charts of growth."""
    memory, first, half = values["memory"], values["first_call"], values["half_precision"]
    lines = [
        f"Memory of one forward and backward pass, 8192 tokens, density .1: {memory['ours']:.0f} MiB (SDPA "
        f"{memory['dense']:.0f}).",
        f"First call of a process: {first['compiled']:.1f} s, with the compiled kernels on disk {first['cached']:.2f} s.",
        "Two threads: "
        + ", ".join(f"{kind} {times:.2f}x" for kind, times in values["two_threads"].items())
        + ".",
        "bfloat16 against our own float32: "
        + ", ".join(
            f"density {density} forward {row['forward_times']:.2f}x, training {row['training_times']:.2f}x"
            for density, row in half.items()
        )
        + ".",
        "Memory that one head of 20,000 tokens adds: "
        + ", ".join(f"{name.split('/')[1]} {row['mib']:.0f}" for name, row in values["mask_memory"].items())
        + " MiB.",
    ]
    drawn = {}
    for name, label in (("density", "kept share of all pairs"), ("tokens", "tokens"), ("heads", "heads")):
        x, y = zip(*values["growth"][name], strict=True)
        drawn[f"growth_{name}"] = svg_curve({"forward": (list(x), list(y))}, label, "milliseconds")
    return "\n".join(f"- {line}" for line in lines), drawn


def claims_section(results: dict[str, Result], more: dict[str, Result]) -> str:
    """Table of the papers' claims, each from a file of its own; then the runs over more seeds than a claim asks for."""
    rows = []
    for case, result in sorted(results.items()):
        row, digits = result.values, "{:.3f}".format
        oracle = "-" if row["oracle"] is None else digits(row["oracle"])
        held = sum(trial["passed"] for trial in row["trials"])
        rows.append(
            f"| {case.removeprefix('claims/')} | {row['claim']} | {digits(row['value'])} | {digits(row['control'])} | "
            f"{oracle} | {held} of {row['seeds']} | {result.commit} |"
        )
    head = "| method | what must be seen | value | control | oracle | seeds that hold | commit |"
    table = "\n".join([head, "|---|---|---|---|---|---|---|", *rows])
    return "\n\n".join([table, *([_more_seeds(more)] if more else [])])


def _more_seeds(results: dict[str, Result]) -> str:
    """In how many seeds a claim held where more were tried, and what failed in the others."""
    found = []
    for case, result in sorted(results.items()):
        trials = result.values["trials"]
        held = sum(trial["passed"] for trial in trials)
        failed = sorted({name for trial in trials for name, kept in trial["conditions"].items() if not kept})
        why = f", failing on {' and '.join(failed)}" if failed else ""
        found.append(
            f"{case.removeprefix('more_seeds/')} holds in {held} of {len(trials)}{why} ({result.commit})"
        )
    return f"With more seeds: {'; '.join(found)}."


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[str, dict[str, str]]]]] = {
    "imagination": ("Imagination on held-out episodes", imagination_section),
    "policies": ("Policy success in MuJoCo", policies_section),
    "memory_recall": ("Cue recall after 64 hidden frames", memory_section),
    "memory_cost": ("Cost of a long rollout", cost_section),
    "speed/attention": ("Block-sparse attention on one CPU core", attention_section),
    "speed/decode": ("Decoding over selected keys on one CPU core", decode_section),
    "speed/gpu_attention_64": ("Block-sparse attention on a GPU, blocks of 64", gpu_attention_section),
    "speed/gpu_attention_128": ("Block-sparse attention on a GPU, blocks of 128", gpu_attention_section),
    "speed/gpu_decode": ("Decoding over selected keys on a GPU", gpu_decode_section),
    "speed/costs": ("What attention costs besides", costs_section),
    "sparse_world": ("Sparse attention in the world model, put in without training", sparse_world_section),
}


PAGES = {README: SECTIONS, DATA_PAGE: DATA_SECTIONS}


def render(page: Path) -> tuple[str, dict[str, str]]:
    """The block of a page, and its figures by name."""
    results = {result.case: result for result in read_results(RESULTS)}
    where = FIGURES.relative_to(page.parent).as_posix()
    parts, figures = [], {}
    for case, (title, section) in PAGES[page].items():
        if case not in results:
            continue
        result = results[case]
        text, drawn = section(result.values)
        figures |= drawn
        pictures = "\n\n".join(f"![{title}]({where}/{name}.svg)" for name in drawn)
        origin = (
            f"Measured on {result.device} in {result.seconds:.0f} s (`{case}.json`, commit {result.commit})."
        )
        parts.append("\n\n".join(part for part in (f"### {title}", pictures, text, origin) if part))
    parts += [render_claims(results)] if page == README else []
    return "\n\n".join(part for part in parts if part), figures


def render_claims(results: dict[str, Result]) -> str:
    """The section of the papers' claims, empty where none was measured."""
    claims = {case: result for case, result in results.items() if case.startswith("claims/")}
    if not claims:
        return ""
    more = {case: result for case, result in results.items() if case.startswith("more_seeds/")}
    origin = (
        "Measured by `python -m benchmarks.claims all`; thresholds and every seed are in `claims/*/*.json`."
    )
    if any(result.commit.endswith("-dirty") for result in (*claims.values(), *more.values())):
        origin += " A commit marked dirty had changes that no commit holds."
    return "\n\n".join(("### Claims of the papers", claims_section(claims, more), origin))


def fresh(page: Path) -> dict[Path, str]:
    """What the files of a page should hold."""
    block, figures = render(page)
    text = page.read_text(encoding="utf-8")
    if not MARKERS.search(text):
        raise ValueError(
            f"{page.name}: expected the markers <!-- figures --> and <!-- /figures -->, found none"
        )
    whole = MARKERS.sub(lambda found: f"{found[1]}\n{block}\n{found[2]}", text)
    return {page: whole} | {FIGURES / f"{name}.svg": svg for name, svg in figures.items()}


def main(settings: Figures) -> None:
    """Write or check the figures."""
    targets = {path: text for page in PAGES for path, text in fresh(page).items()}
    stale = [
        path
        for path, wanted in targets.items()
        if not path.exists() or path.read_text(encoding="utf-8") != wanted
    ]
    if settings.check:
        sys.exit(f"not current: {', '.join(p.name for p in stale)}; run make figures" if stale else 0)
    for path in stale:
        with atomic_write(path) as temporary:
            temporary.write_text(targets[path], encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(tyro.cli(Figures))
