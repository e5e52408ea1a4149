"""Every verb end to end, on two episodes and two training steps."""

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest

from enerverse.cli.main import VERBS, main, parse
from enerverse.files import read_metrics
from enerverse.pipelines import EnerVersePipeline, EnerVersePolicy

STEPS = ("--steps", 2, "--batch", 2, "--device", "cpu")


def video_shape(path: Path) -> tuple[int, int, int]:
    """Frames, height, width."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return (len(frames), *frames[0].shape[:2])


def test_the_stages_fill_one_run_folder(trained):
    for part in (
        "autoencoder/autoencoder/config.json", "autoencoder/config.json", "latents.safetensors",
        "world/pipeline/model_index.json", "world/metrics.jsonl", "policy/policy/model_index.json",
        "checkpoint/world/model_index.json", "checkpoint/policy/model_index.json", "checkpoint/card.md",
    ):  # fmt: skip
        assert (trained / part).is_file(), part
    card = (trained / "checkpoint" / "card.md").read_text()
    assert "Trained on lift (2 episodes, " in card
    assert "steps: world 2, policy 2;" in card
    EnerVersePipeline.from_pretrained(trained / "checkpoint" / "world")
    EnerVersePolicy.from_pretrained(trained / "checkpoint" / "policy")


def test_a_complete_dataset_is_said_to_be_complete(data, call):
    said = call("record", "--task", "Lift", "--out", data, "--episodes", 2)
    assert said.code == 0, said.err
    assert f"{data}: already holds 2 episodes with seeds from 0 on\n" in said.out


def test_the_next_command_keeps_the_preset_and_the_episode(tmp_path):
    words = ("train", "autoencoder", "--data", "a", "b", "--preset", "small", "--out", "run")
    assert parse(words)._next() == "enerverse train world --data a b --out run --preset small"
    words = ("imagine", "--data", "a", "--episode", "3", "--device", "cpu")
    assert parse(words)._next() == "enerverse imagine --data a --episode 3 --with-actions --device cpu"


@pytest.mark.parametrize(
    ("stage", "following"),
    [
        ("autoencoder", "enerverse train world --data DATA --out RUN --device cpu"),
        ("world", "enerverse train policy --data DATA --out RUN --device cpu"),
        ("policy", "enerverse rollout --checkpoint RUN --task Lift --device cpu"),
    ],
)
def test_a_finished_stage_run_again_trains_no_more(stage, following, trained, data, call):
    before = read_metrics(trained / stage)
    said = call("train", stage, "--data", data, "--out", trained, *STEPS)
    assert said.code == 0, said.err
    following = following.replace("DATA", str(data)).replace("RUN", str(trained))
    assert f"next: {following}\n" in said.out
    assert read_metrics(trained / stage) == before


def test_imagine_writes_a_film_and_scores_every_chunk(trained, data, call, tmp_path):
    film = tmp_path / "film.mp4"
    words = ("--checkpoint", trained, "--data", data, "--episode", 1, "--start", 5, "--frames", 12)
    said = call("imagine", *words, "--out", film, "--with-actions", "--steps", 1)
    assert said.code == 0, said.err
    assert "frames   5 to  12:" in said.out
    assert "frames  13 to  16:" in said.out
    assert said.out.count(" dB (copying frame 4:") == 2
    assert "ms per chunk" in said.out
    assert "end of the task imagined" in said.out
    assert "and the recorded actions" in said.out
    assert f"next: enerverse rollout --checkpoint {trained} --task Lift\n" in said.out
    frames, height, width = video_shape(film)
    assert 8 <= frames <= 12
    assert height > 3 * 256
    assert width > 2 * 256


def test_imagine_by_a_plan_differs_from_the_instruction_alone(trained, data, call, tmp_path):
    films = []
    for words in ((), ("--plan",)):
        film = tmp_path / f"film{len(words)}.mp4"
        said = call("imagine", "--data", data, "--checkpoint", trained, "--out", film, "--steps", 1, *words)
        assert said.code == 0
        assert ("recorded state to plan from" in said.out) == bool(words)
        films.append(film.read_bytes())
    assert films[0] != films[1]


def test_imagine_goes_on_where_the_recording_ends(trained, data, call, tmp_path):
    words = ("--checkpoint", trained / "checkpoint", "--data", data, "--start", 30, "--frames", 24)
    said = call(
        "imagine", *words, "--out", tmp_path / "film.mp4", "--memory", "none", "--with-actions", "--steps", 1
    )
    assert said.code == 0, said.err
    assert "the recording has ended" in said.out


def test_imagine_is_decided_by_the_seed_and_the_instruction(trained, data, call, tmp_path):
    def film(*words):
        path = tmp_path / "film.mp4"
        fixed = ("--checkpoint", trained, "--data", data, "--frames", 8, "--steps", 1, "--out", path)
        assert call("imagine", *fixed, *words).code == 0
        return path.read_bytes()

    assert film("--seed", 3) == film("--seed", 3)
    assert film("--seed", 3) != film("--seed", 4)


def test_rollout_reports_success_with_its_interval(trained, call, tmp_path):
    film = tmp_path / "film.mp4"
    said = call("rollout", "--checkpoint", trained, "--task", "Lift", "--episodes", 2, "--out", film)
    assert said.code == 0, said.err
    assert "success: 0 of 2, 0% (95 % Wilson interval 0% to 66%)" in said.out
    assert "mean steps: 80.0" in said.out
    assert "ms per decision" in said.out
    assert video_shape(film)[0] == 80


def test_demo_writes_a_page_and_prints_its_table(trained, call, tmp_path):
    said = call(
        "demo", "--checkpoint", trained, "--out", tmp_path, "--episodes", 1, "--takes", 1, "--frames", 8,
        "--tasks", "CueDelayReach", "--skip-scene",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "CueDelayReach" in said.out
    assert "ms per chunk" in said.out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<video") == 3  # imagination, memory, policy
    assert "sparse memory" in page
    assert "of 1 solved" in page


def test_info_lists_what_there_is(trained, call):
    said = call("info", "--checkpoint", trained)
    assert said.code == 0
    for word in (
        "torch 2", "MUJOCO_GL=", "tiny: 64 px, 3 views; autoencoder 2.9 M", "PickPlace", "sparse_uniform",
        "flow_x0", f"{trained}: world, policy", "A checkpoint of the preset tiny", "Trained on lift (2 episodes, ",
    ):  # fmt: skip
        assert word in said.out, word
    assert "``" not in said.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_explained(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in VERBS[verb].__dataclass_fields__:
        positional = name in ("stage", "action") or (verb, name) == ("sparse", "name")
        assert positional or f"--{name.replace('_', '-')}" in text


def test_help_loads_nothing_heavy():
    code = (
        "import sys, enerverse.cli.main\n"
        "print(*{'torch', 'mujoco', 'diffusers', 'cv2', 'gymnasium', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_words_show_the_verbs(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    assert "imagine" in capsys.readouterr().out


def test_methods_are_listed(call):
    said = call("sparse", "list")
    assert said.code == 0
    assert said.out.count("attention/") == 10
    assert "search        vertical and slash in every head, share of the keys" in said.out
    assert "distillation  a gate at random; training with its loss distils it" in said.out
    assert "attention/tidal            2410.05076  decode" in said.out


def test_a_claim_is_measured(capfd):
    with pytest.raises(SystemExit) as left:
        main(["sparse", "claim", "hip", "--seeds", "1"])
    assert left.value.code == 0
    assert '"name": "attention/hip"' in capfd.readouterr().out


@pytest.mark.parametrize("method", ["s2", "hip", "routing", "sea", "seer"])
def test_a_world_model_trains_with_a_sparse_attention(trained, data, call, tmp_path, method):
    words = (
        "train",
        "world",
        "--data",
        data,
        "--out",
        tmp_path,
        "--autoencoder",
        trained / "autoencoder" / "autoencoder",
    )
    said = call(*words, "--attention", method, *STEPS)
    assert said.code == 0, said.err
    pipe = EnerVersePipeline.from_pretrained(tmp_path / "world" / "pipeline")
    places = [part for name, part in pipe.unet.named_modules() if name.endswith(".views.slot")]
    assert places
    assert all(part.filled for part in places)
    assert pipe.unet.config.attention == method
    rows = [json.loads(line) for line in (tmp_path / "world" / "metrics.jsonl").read_text().splitlines()]
    assert ("attention" in rows[-1]) == (
        method in ("routing", "sea", "seer")
    )  # which have a loss of their own
