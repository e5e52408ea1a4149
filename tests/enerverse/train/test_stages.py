"""The whole way on recorded episodes: autoencoder, latents, world model, policy, and back into the pipelines."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from enerverse import presets
from enerverse.data import ClipSampler, LatentEpisodes
from enerverse.files import read_metrics
from enerverse.pipelines import EnerVersePipeline, EnerVersePolicy
from enerverse.policy import PolicyConfig, read_features
from enerverse.presets import AutoencoderConfig, TextConfig, UNetConfig
from enerverse.train import TrainConfig, stages
from enerverse.train.policy import PolicyTask, cut_windows, extract_features, train_policy

FEW = TrainConfig(steps=3, batch=2, warmup=1, precision="no", log_every=1)
PRESET = replace(
    presets.tiny(),
    name="smallest",
    image_size=32,
    autoencoder=AutoencoderConfig(channels=4, width=8, encoder_blocks=1, decoder_blocks=1),
    unet=UNetConfig(widths=(8, 16), head_width=8, embedding=16),
    text=TextConfig(width=8),
    policy=PolicyConfig(width=16, layers=1, heads=2, keypoints=4, steps=2),
    train_autoencoder=FEW,
    train_world=FEW,
    train_policy=FEW,
)


@pytest.fixture(scope="module")
def run(recorded, tmp_path_factory):
    """A run folder in which every stage was trained for three steps, and what the stages returned."""
    root = tmp_path_factory.mktemp("run")
    autoencoder = stages.train_autoencoder(recorded, PRESET, root / "autoencoder", "cpu")
    episodes = stages.encode(recorded, autoencoder, PRESET, root / "latents.safetensors")
    pipe = stages.train_world(episodes, autoencoder, PRESET, root / "world", "cpu")
    policy = train_policy(episodes, pipe, PRESET, root / "policy", device="cpu")
    return root, episodes, pipe, policy


def test_every_stage_left_its_record(run):
    for stage in ("autoencoder", "world", "policy"):
        assert [record["step"] for record in read_metrics(run[0] / stage)] == [1, 2, 3]
        assert (run[0] / stage / "config.json").exists()


def test_no_stage_left_a_pickle(run):
    kinds = {path.suffix for path in run[0].rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".txt", ".safetensors"}


def test_latents_are_standardised_over_the_dataset(run):
    latents = run[1].latents.float()
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.2
    torch.testing.assert_close(latents.std((0, 1, 3, 4)), torch.ones(4), atol=0.2, rtol=0)


def test_latents_are_encoded_once(run, recorded):
    """The second call reads the file: it needs no dataset."""
    again = stages.encode([], run[2].autoencoder, PRESET, run[0] / "latents.safetensors")
    assert torch.equal(again.latents, run[1].latents)


def test_the_saved_world_imagines_what_the_trained_one_does(run, recorded):
    loaded = EnerVersePipeline.from_pretrained(run[0] / "world" / "pipeline")
    episode = recorded[0].episode(0, views=PRESET.views)
    frames = [
        pipe(
            episode.stacked_images[None, :6], episode.task, episode.cameras.select(PRESET.views).at(0),
            num_frames=16, actions=episode.action[None, 5:21], state=episode.state[None, 5],
            generator=torch.Generator().manual_seed(0), stop_at_end=False,
        ).frames
        for pipe in (run[2], loaded)
    ]  # fmt: skip
    assert frames[0].shape == (1, 16, 3, 3, 32, 32)
    torch.testing.assert_close(frames[0], frames[1], atol=0.01, rtol=0)


def test_the_pipeline_keeps_the_window_it_was_trained_on(run):
    for name in ("memory", "chunk", "recent", "action_scale", "command"):
        assert getattr(run[2].clip_config, name) == getattr(PRESET.clips, name)


def test_the_saved_policy_acts_in_the_simulator(run):
    from enerverse.cli.simulator import make_env

    policy = EnerVersePolicy.from_pretrained(run[0] / "policy" / "policy")
    env = make_env("Lift", cameras=PRESET.views, image_size=32)
    observation, info = env.reset(seed=0)
    for _ in range(6):
        action = policy.select_action(observation, info)
        assert env.action_space.contains(action.astype(np.float32))
        observation, _, _, _, info = env.step(action)
    env.close()


def test_features_in_training_are_those_in_use(run):
    """The cached feature of a window equals what the policy reads when it has seen the same frames."""
    root, episodes, pipe, _ = run
    windows = cut_windows(episodes)
    cached = extract_features(pipe, episodes, windows, (3, 7, 11), root / "policy" / "features.safetensors")
    assert len(cached) == len(windows)
    index = int((windows.episode == 1).nonzero()[9])
    now = int(windows.rows[index] - windows.start[index])
    seen = episodes.latents[episodes.span(1)][: now + 1].float().transpose(0, 1)[None]
    times = pipe.make_memory().select(list(range(now + 1)), now)
    rays = pipe.draw_rays(episodes.intrinsics[1:2], episodes.camera_to_world[1:2], (4, 4))
    offsets = torch.tensor([times]) - now
    text = pipe.text_encoder([episodes.tasks[1]])
    features = read_features(pipe.unet, seen[:, :, times], offsets, rays, text, (3, 7, 11))
    torch.testing.assert_close(cached[index : index + 1].float(), features, atol=0.05, rtol=0.02)


def test_windows_leave_out_most_rest_but_no_motion(make_episodes):
    episodes = make_episodes((60,))
    label = torch.zeros_like(episodes.label)
    label[20:30, 0] = 0.5
    rest = {row for row in range(59) if row % 4 == 0} - set(range(16, 34))
    for every in (1, 2):
        kept = set(cut_windows(replace(episodes, label=label), every=every).rows.tolist())
        assert kept == set(range(16, 34, every)) | rest


def policy_task(episodes: LatentEpisodes, head, **options) -> PolicyTask:
    return PolicyTask(head, episodes, cut_windows(episodes), batch=6, **options)


def test_labels_are_the_clean_actions_and_rest_at_the_end(make_episodes, make_head):
    episodes = make_episodes((20, 12))
    episodes = replace(episodes, label=episodes.label.neg())
    task = policy_task(episodes, make_head(world=None))
    labels = task.actions_at(torch.tensor([3, 15]), torch.tensor([0, 0]))
    assert torch.equal(labels[0], episodes.label[3:11])
    assert torch.equal(labels[1, :4], episodes.label[15:19])
    assert not labels[1, 4:, :6].any()
    assert torch.equal(labels[1, 4:, 6], episodes.label[18, 6].expand(4))


def test_the_policy_sees_the_last_two_frames_of_its_episode(make_episodes, make_head):
    episodes = make_episodes((20, 12))
    task = policy_task(episodes, make_head(world=None))
    first = int((task.windows.rows == 20).nonzero()[0])
    later = int((task.windows.rows == 27).nonzero()[0])
    inputs = task.inputs_at(torch.tensor([first, later]))
    assert inputs.latents[:, :, 0, 0, 0, 0].tolist() == [[100, 100], [106, 107]]
    assert torch.equal(inputs.state, episodes.state[[20, 27]])
    assert inputs.texts == ("push the block",) * 2


def test_policy_batches_are_a_function_of_the_step(make_episodes, make_head):
    episodes = make_episodes()
    first, second = (policy_task(episodes, make_head(world=None)) for _ in range(2))
    second.batch(0)
    assert torch.equal(first.batch(9)[1], second.batch(9)[1])
    assert not torch.equal(first.batch(9)[1], first.batch(8)[1])


def test_presets_name_the_closest():
    with pytest.raises(ValueError, match="unknown preset 'tinny': did you mean 'tiny'"):
        presets.get_preset("tinny")


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_every_preset_fits_together(name):
    """Built without memory: autoencoder, grid, UNet and objective of a preset agree on their sizes."""
    preset = presets.get_preset(name)
    with torch.device("meta"):
        autoencoder = stages.build_autoencoder(preset.autoencoder)
        unet = stages.VideoUNet(**preset.unet_arguments())
    assert unet.config.channels == autoencoder.channels
    assert unet.config.grid * autoencoder.patch == preset.image_size
    assert stages.make_objective(preset.diffusion.objective, **preset.diffusion.options())
    assert max(preset.policy.frames) < preset.clips.memory + preset.clips.chunk
    assert preset.policy.chunk == preset.clips.chunk


def test_the_sampler_of_recorded_episodes_runs(run):
    clip = ClipSampler(run[1], PRESET.clips, batch=4).batch(0)
    assert clip.future.shape == (4, 3, 8, 4, 4, 4)
