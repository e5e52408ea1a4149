"""The world pipeline: chunks, memory, guidance, endings, files."""

from itertools import islice

import numpy as np
import pytest
import torch

from dataengine.cameras import Cameras
from enerverse.pipelines import EnerVersePipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(make_pipe) -> EnerVersePipeline:
    return make_pipe()


@pytest.fixture
def imagine(pipe, pictures, cameras):
    """The pipeline on the first episode of `pictures`, with a seeded generator."""

    def call(**options):
        return pipe(pictures[0], "lift the cube", cameras, **({"generator": seeded()} | options))

    return call


def test_frames_are_pictures_of_all_views(imagine):
    frames = imagine(num_frames=8).frames
    assert frames.shape == (1, 8, 2, 3, 16, 16)
    assert frames.min() >= 0
    assert frames.max() <= 1


def test_array_output_is_the_rounded_frames(imagine):
    frames, array = imagine().frames, imagine(output_type="np").frames
    assert array.dtype == np.uint8
    assert np.array_equal(array, (frames.permute(0, 1, 2, 4, 5, 3) * 255).round().byte().numpy())


def test_latent_output_decodes_to_the_frames(imagine, pipe):
    latents = imagine(output_type="latent").frames
    assert latents.shape == (1, 2, 8, 4, 4, 4)
    torch.testing.assert_close(pipe.autoencoder.decode(latents.transpose(1, 2)), imagine().frames)


def test_equal_seeds_give_equal_frames(imagine):
    assert torch.equal(imagine().frames, imagine().frames)


def test_other_seeds_give_other_frames(imagine):
    assert not torch.allclose(imagine().frames, imagine(generator=seeded(1)).frames, atol=1e-3)


@pytest.mark.parametrize("objective", ["flow_x0", "v_zero_snr"])
def test_saved_and_loaded_gives_the_same_frames(make_pipe, pictures, cameras, tmp_path, objective):
    pipe = make_pipe(objective=objective)
    pipe.save_pretrained(tmp_path)
    loaded = EnerVersePipeline.from_pretrained(tmp_path)
    assert dict(loaded.config)["views"] == dict(pipe.config)["views"]
    first, second = (
        p(pictures, "lift", cameras, generator=seeded(), num_frames=16).frames for p in (pipe, loaded)
    )
    for name in ("autoencoder", "unet", "text_encoder"):
        weights = getattr(pipe, name).state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in getattr(loaded, name).state_dict().items())
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_a_saved_folder_holds_no_pickle(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_a_chunk_is_the_residual_to_the_last_frame(make_unet, make_pipe, pictures, cameras):
    """A network that predicts zero repeats the last observed frame."""
    unet = make_unet()
    with torch.no_grad():
        for value in unet.out.parameters():
            value.zero_()
    pipe = make_pipe(unet)
    frames = pipe(pictures[:1], "lift", cameras, output_type="latent").frames
    last = pipe.autoencoder.encode(pictures[0, -1:]).transpose(0, 1)
    torch.testing.assert_close(frames, last[None].expand_as(frames))


def test_guidance_of_one_runs_the_network_once_per_step(imagine, pipe):
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    imagine(num_inference_steps=3)
    assert len(calls) == 3
    imagine(num_inference_steps=3, guidance_scale=2.0)
    assert len(calls) == 9


def test_guidance_extrapolates_between_told_and_untold(imagine):
    """With one step the sample is the prediction, which is linear in the guidance scale."""
    free, told, guided = (
        imagine(num_inference_steps=1, guidance_scale=scale, output_type="latent").frames
        for scale in (0.0, 1.0, 3.0)
    )
    assert not torch.allclose(free, told, atol=1e-4)
    torch.testing.assert_close(guided, free + 3 * (told - free), atol=1e-4, rtol=1e-3)


def test_the_callback_is_called_after_every_step_of_every_chunk(imagine, pipe):
    calls = []

    def look(pipeline, index, time, given):
        calls.append((pipeline is pipe, index, float(time), tuple(given["latents"].shape)))
        return given

    imagine(num_frames=24, num_inference_steps=2, callback_on_step_end=look)
    assert [call[1] for call in calls] == [0, 1] * 3
    assert all(call[0] and call[3] == (1, 2, 8, 4, 4, 4) for call in calls)
    assert calls[0][2] == 1.0


def test_the_callback_may_replace_latents(imagine, pipe, pictures):
    result = imagine(
        callback_on_step_end=lambda pipeline, index, time, given: {
            "latents": torch.zeros_like(given["latents"])
        },
        output_type="latent",
    )
    last = pipe.autoencoder.encode(pictures[0, -1])
    torch.testing.assert_close(result.frames, last[None, :, None].expand_as(result.frames))


def test_a_callback_that_only_looks_changes_nothing(imagine):
    assert torch.equal(imagine(callback_on_step_end=lambda *_: {}).frames, imagine().frames)


def test_24_frames_are_three_chunks(pipe, pictures, cameras):
    whole = pipe(pictures[:1], "lift", cameras, num_frames=24, generator=seeded(), output_type="latent")
    first = pipe(
        pictures[:1], "lift", cameras, num_frames=8, generator=(generator := seeded()), output_type="latent"
    )
    policy, memory, chunks = pipe.make_memory(), first.memory, [first.frames]
    rays = pipe.draw_rays(
        torch.from_numpy(cameras[0]).float()[None], torch.from_numpy(cameras[1]).float()[None], (4, 4)
    )
    text = pipe.text_encoder(["lift"])
    for _ in range(2):
        chunk, memory = pipe.imagine_chunk(memory, policy, rays, text, generator=generator)
        chunks.append(chunk)
    torch.testing.assert_close(whole.frames, torch.cat(chunks, 2))
    assert memory.times == whole.memory.times


def test_a_number_of_frames_that_is_no_multiple_of_the_chunk(imagine):
    short, whole = imagine(num_frames=11).frames, imagine(num_frames=16).frames
    assert torch.equal(short, whole[:, :11])


@pytest.mark.parametrize("count", [3, 8, 12])
def test_the_memory_has_seen_just_the_frames_returned(imagine, count):
    result = imagine(num_frames=count, output_type="latent")
    assert result.frames.shape[2] == count
    assert result.memory.now == 5 + count - 1
    assert torch.equal(result.memory.frames[:, :, -1], result.frames[:, :, -1])


def test_a_continued_rollout_has_no_gap_in_time(pipe, imagine):
    first, policy = imagine(num_frames=12, output_type="latent"), pipe.make_memory()
    text = pipe.text_encoder(["lift the cube"])
    chunk, memory = pipe.imagine_chunk(first.memory, policy, torch.zeros(1, 2, 6, 4, 4), text)
    assert chunk.shape[2] == 8
    assert memory.times == tuple(range(5 + 12 + 8))


def test_the_stream_goes_on_like_the_call(pipe, pictures, cameras, imagine):
    stream = pipe.stream(pictures[0], "lift the cube", cameras, generator=seeded())
    chunks = torch.cat(list(islice(stream, 3)), 1)
    assert not chunks.requires_grad
    assert torch.equal(chunks, imagine(num_frames=24).frames)


def test_the_stream_holds_a_constant_number_of_frames(pipe, pictures, cameras):
    sizes, generator = [], seeded()
    past = pipe(pictures[0], "lift", cameras, num_inference_steps=1, generator=generator).memory
    policy, rays = pipe.make_memory(), torch.zeros(1, 2, 6, 4, 4)
    for _ in range(40):
        _, past = pipe.imagine_chunk(past, policy, rays, torch.zeros(1, 8), steps=1, generator=generator)
        sizes.append(past.bytes)
    assert past.now == 5 + 41 * 8 - 1
    assert max(sizes) <= 34 * 2 * 4 * 4 * 4 * 4


def test_a_batch_equals_its_episodes_one_by_one(pipe, pictures, cameras):
    texts = ["lift the cube", "push the block"]
    together = pipe(
        pictures, texts, cameras, num_frames=16, generator=[seeded(3), seeded(7)], output_type="latent"
    ).frames
    for row, seed in enumerate((3, 7)):
        alone = pipe(
            pictures[row], texts[row], cameras, num_frames=16, generator=seeded(seed), output_type="latent"
        ).frames
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_latents_may_stand_in_for_pictures(pipe, pictures, cameras):
    latents = pipe.autoencoder.encode(pictures)
    first, second = (pipe(seen, "lift", cameras, generator=seeded()).frames for seen in (pictures, latents))
    torch.testing.assert_close(first, second)


def test_8_bit_pictures_equal_their_fractions(pipe, pictures, cameras):
    eight_bit = (pictures * 255).round().byte()
    arrays = eight_bit.permute(0, 1, 2, 4, 5, 3).numpy()
    first, second = (
        pipe(seen, "lift", cameras, generator=seeded()).frames for seen in (arrays, eight_bit.float() / 255)
    )
    assert torch.equal(first, second)


def test_cameras_of_a_dataset_equal_their_matrices_and_are_scaled(imagine, pipe, pictures, cameras):
    intrinsics = cameras[0] * [[2.0], [2.0], [1.0]]
    names = ("top", "front")
    record = Cameras(names, intrinsics[::-1], cameras[1][::-1], 32, 32)
    frames = pipe(pictures[0], "lift the cube", record, generator=seeded()).frames
    torch.testing.assert_close(frames, imagine().frames)


@pytest.mark.parametrize(
    "make", [dict, lambda named: dict(reversed(named.items()))], ids=["ordered", "reversed"]
)
def test_cameras_of_an_info_equal_their_matrices(imagine, pipe, pictures, cameras, make):
    named = {
        view: {"intrinsics": cameras[0][row], "camera_to_world": cameras[1][row], "size": (16, 16)}
        for row, view in enumerate(("front", "top"))
    }
    frames = pipe(pictures[0], "lift the cube", make(named), generator=seeded()).frames
    assert torch.equal(frames, imagine().frames)


@pytest.fixture
def plan() -> dict[str, torch.Tensor]:
    generator = seeded(5)
    return {
        "actions": torch.rand(1, 16, 7, generator=generator) * 2 - 1,
        "state": 0.1 * torch.randn(1, 11, generator=generator),
    }


def test_actions_change_what_is_imagined(imagine, plan):
    other = plan | {"actions": -plan["actions"]}
    assert not torch.allclose(
        imagine(num_frames=8, **plan).frames, imagine(num_frames=8, **other).frames, atol=1e-4
    )


def test_a_chunk_is_told_only_its_own_actions(imagine, plan):
    """What happens in the second chunk does not change the first."""
    other = plan | {"actions": torch.cat([plan["actions"][:, :8], -plan["actions"][:, 8:]], 1)}
    first, second = (imagine(num_frames=16, **told).frames for told in (plan, other))
    assert torch.equal(first[:, :8], second[:, :8])
    assert not torch.allclose(first[:, 8:], second[:, 8:], atol=1e-4)


def test_a_plan_rests_after_its_last_action_with_the_gripper_kept(imagine, plan):
    padded = torch.cat([plan["actions"][:, :11], torch.zeros(1, 5, 7)], 1)
    padded[:, 11:, 6] = plan["actions"][:, 10, 6]
    short = imagine(num_frames=11, actions=plan["actions"][:, :11], state=plan["state"]).frames
    assert torch.equal(short, imagine(num_frames=11, actions=padded, state=plan["state"]).frames)


@pytest.fixture
def planner(make_pipe, make_unet):
    return make_pipe(make_unet(plan_tokens=3))


def test_with_the_state_alone_the_model_simulates_the_actions_it_plans(planner, pictures, cameras, plan):
    given = (pictures[0], "lift the cube", cameras)
    free = planner(*given, state=plan["state"], generator=seeded())
    assert free.actions.shape == (1, 8, 7)
    assert free.actions.abs().max() <= 1
    generator = seeded()
    torch.randn(1, 2, 8, 4, 4, 4, generator=generator)  # the noise that the plan was made from
    told = planner(*given, state=plan["state"], actions=free.actions, generator=generator)
    torch.testing.assert_close(told.frames, free.frames)
    assert torch.equal(told.actions, free.actions)


def test_a_planned_path_goes_on_where_the_last_chunk_ended(planner, pictures, cameras, plan, monkeypatch):
    options = {"state": plan["state"], "num_frames": 13, "stop_at_end": False}
    told = planner(pictures[0], "lift", cameras, actions=plan["actions"], generator=seeded(), **options)
    chunks = iter(plan["actions"].split(8, 1))
    monkeypatch.setattr(planner, "plan_actions", lambda *_: next(chunks))
    free = planner(pictures[0], "lift", cameras, generator=seeded(), **options)
    torch.testing.assert_close(free.frames, told.frames)
    assert torch.equal(free.actions, plan["actions"][:, :13])


def test_a_stream_may_be_planned_too(planner, pictures, cameras, plan):
    options = {"state": plan["state"], "generator": seeded()}
    chunks = list(islice(planner.stream(pictures[0], "lift", cameras, **options), 2))
    options = {"state": plan["state"], "generator": seeded(), "num_frames": 16, "stop_at_end": False}
    frames = planner(pictures[0], "lift", cameras, **options).frames
    torch.testing.assert_close(torch.cat(chunks, 1), frames)


def test_a_world_without_a_plan_plans_nothing(pipe):
    with pytest.raises(ValueError, match="plan: expected a world model that plans actions"):
        pipe.plan_actions(None, None, None, None)


def test_imagination_without_actions_has_none(imagine):
    assert imagine().actions is None


def test_find_end_names_the_first_frame_near_the_end_latent(make_pipe):
    pipe = make_pipe(end_threshold=0.2)
    chunk = torch.ones(3, 2, 8, 4, 4, 4)
    chunk[1, :, 5:] = 0.1
    chunk[2, :, 0] = -0.19
    assert pipe.find_end(chunk).tolist() == [-1, 5, 0]
    assert pipe.find_end(chunk, 16).tolist() == [-1, 21, 16]


def test_find_end_averages_over_views(make_pipe):
    chunk = torch.zeros(1, 2, 8, 4, 4, 4)
    chunk[:, 0] = 0.5
    assert make_pipe(end_threshold=0.2).find_end(chunk).tolist() == [-1]


@pytest.fixture
def end_at(pipe, pictures):
    """A callback that makes the latents of frame `index` of every chunk the end-of-task latent."""

    def make(index: int, rows: slice = slice(None)):
        last = pipe.autoencoder.encode(pictures[:, -1]).detach()

        def callback(pipeline, step, time, given):
            latents = given["latents"].clone()
            latents[rows, :, index] = -last[: len(latents)][rows] / pipeline.config.residual_scale
            return {"latents": latents}

        return callback

    return make


def test_imagination_stops_at_the_end_frame(imagine, end_at):
    result = imagine(num_frames=40, num_inference_steps=1, callback_on_step_end=end_at(5))
    assert result.ended.tolist() == [5]
    assert result.frames.shape[1] == 8


def test_imagination_goes_on_past_the_end_when_asked(imagine, end_at):
    result = imagine(num_frames=16, num_inference_steps=1, callback_on_step_end=end_at(5), stop_at_end=False)
    assert result.ended.tolist() == [5]
    assert result.frames.shape[1] == 16


def test_a_batch_goes_on_until_all_have_ended(pipe, pictures, cameras, end_at):
    result = pipe(
        pictures,
        "lift",
        cameras,
        num_frames=16,
        num_inference_steps=1,
        callback_on_step_end=end_at(2, slice(1)),
    )
    assert result.ended.tolist() == [2, -1]
    assert result.frames.shape[1] == 16


def test_an_end_beyond_the_frames_asked_for_is_not_seen(imagine, end_at):
    result = imagine(num_frames=4, num_inference_steps=1, callback_on_step_end=end_at(5))
    assert result.ended.tolist() == [-1]


@pytest.mark.parametrize("name", ["none", "dense", "sparse_uniform", "fifo"])
def test_every_memory_policy_runs(imagine, name):
    assert imagine(num_frames=16, num_inference_steps=1, memory=name).frames.shape[1] == 16


def test_no_memory_sees_only_the_last_frame(pipe, pictures, cameras):
    other = pictures.clone()
    other[:, :-1] = 0.5
    for name, equal in (("none", True), ("sparse_uniform", False)):
        first, second = (
            pipe(seen, "lift", cameras, memory=name, generator=seeded()).frames for seen in (pictures, other)
        )
        assert torch.allclose(first, second, atol=1e-5) is equal


def test_mixed_precision_stays_near_full_precision(make_pipe, pictures, cameras):
    full, mixed = (
        make_pipe(mixed_precision=on)(pictures, "lift", cameras, generator=seeded()).frames
        for on in (False, True)
    )
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, full, atol=0.05, rtol=0)
