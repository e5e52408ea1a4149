"""Every bad input is refused in one sentence that names it."""

import numpy as np
import pytest
import torch

from dataengine.cameras import Cameras
from enerverse.pipelines.inputs import read_images


@pytest.fixture
def refused(make_pipe, pictures, cameras):
    """Assert that the pipeline, given one wrong thing, raises ValueError with the sentence."""
    pipe = make_pipe()

    def check(sentence: str, **wrong):
        given = {"images": pictures, "instruction": "lift", "cameras": cameras} | wrong
        with pytest.raises(ValueError, match=sentence) as caught:
            pipe(given.pop("images"), given.pop("instruction"), given.pop("cameras"), **given)
        assert "\n" not in str(caught.value)

    return check


def test_missing_axes(refused, pictures):
    refused(r"images: expected \[B, n, 2, 3, 16, 16\], got \[3, 16, 16\]", images=pictures[0, 0, 0])


def test_channels_last_fractions(refused, pictures):
    sentence = r"images: expected \[B, n, 2, 3, 16, 16\], got torch.float32 .*; pass uint8 pictures, or move"
    refused(sentence, images=pictures.movedim(3, -1))


def test_wrong_number_of_views(refused, pictures):
    refused(r"images: expected 2 views \('front', 'top'\), got 1", images=pictures[:, :, :1])


def test_wrong_image_size(refused):
    refused("images: expected 16 x 16 pixels, got 16 x 24; resize", images=torch.zeros(1, 1, 2, 3, 16, 24))


def test_no_frames(refused, pictures):
    refused("images: expected at least one observed frame, got none", images=pictures[:, :0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1, 255.0])
def test_values_out_of_range(refused, pictures, value):
    spoilt = pictures.clone()
    spoilt[1, 3, 0, 2, 5, 5] = value
    refused(r"images: expected finite values in \[0, 1\], got others; divide 8-bit", images=spoilt)


def test_wrong_number_of_instructions(refused):
    refused(r"instruction: expected one per episode \(2\), got 3", instruction=["a", "b", "c"])


def test_missing_view_of_a_camera_record(refused, cameras):
    record = Cameras(("front",), cameras[0][:1], cameras[1][:1], 16, 16)
    refused(r"cameras: expected the views \('front', 'top'\), got \('front',\) without 'top'", cameras=record)


def test_wrong_shape_of_cameras(refused, cameras):
    refused(
        r"cameras: expected intrinsics \[2, 3, 3\] and camera_to_world \[2, 4, 4\], got \[1, 3, 3\]",
        cameras=(cameras[0][:1], cameras[1]),
    )


def test_cameras_of_several_moments(refused, cameras):
    moving = np.stack([cameras[1]] * 5)
    refused(
        "cameras: expected camera_to_world of one moment for 2 episodes, got", cameras=(cameras[0], moving)
    )


def spoil(cameras, index, place, value):
    parts = [part.copy() for part in cameras]
    parts[index][place] = value
    return tuple(parts)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((1, slice(3), slice(3)), 1.1 * np.eye(3)),
        ((1, slice(3), slice(3)), np.diag([1.0, 1.0, -1.0])),
        ((1, 0, 3), np.nan),
        ((1, 3, 0), 0.5),
    ],
    ids=["scaled", "left-handed", "NaN", "last row"],
)
def test_a_pose_that_is_not_rigid(refused, cameras, place, value):
    refused(
        r"cameras: expected a rigid camera_to_world \(rotation, determinant \+1\) for 'top'",
        cameras=spoil(cameras, 1, place, value),
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [((0, 1, 1), 0.0), ((0, 0, 0), -5.0), ((0, 0, 2), np.nan), ((0, 2, 2), 0.0), ((0, 1, 0), 3.0)],
)
def test_intrinsics_that_project_nothing(refused, cameras, place, value):
    refused(
        "cameras: expected finite intrinsics with positive focal lengths in pixels for 'front'",
        cameras=spoil(cameras, 0, place, value),
    )


ACTIONS, BODY = torch.zeros(2, 8, 7), torch.zeros(2, 11)


def test_too_few_actions(refused):
    refused(
        r"actions: expected \[2, 9, 7\], got \[2, 8, 7\]; one action per frame",
        actions=ACTIONS, state=BODY, num_frames=9,
    )  # fmt: skip


def test_wrong_width_of_actions(refused):
    refused(r"actions: expected \[2, 8, 7\], got \[2, 8, 6\]", actions=ACTIONS[..., :6], state=BODY)


def test_actions_that_are_not_numbers(refused):
    refused("actions: expected finite values, got NaN or infinity", actions=ACTIONS * np.nan, state=BODY)


def test_actions_out_of_range(refused):
    refused(r"actions: expected values in \[-1, 1\], got 1.5; normalise", actions=ACTIONS - 1.5, state=BODY)


def test_actions_without_a_state(refused):
    refused(r"state: expected proprioception \[B, S\] beside actions, got None", actions=ACTIONS)


@pytest.mark.parametrize("body", [BODY[:1], BODY[:, :9], BODY[None]])
def test_wrong_shape_of_the_state(refused, body):
    refused(r"state: expected \[2, S\] with S of at least 11, got", actions=ACTIONS, state=body)


def test_a_state_that_is_not_a_number(refused):
    refused("state: expected finite values, got NaN or infinity", actions=ACTIONS, state=BODY * np.nan)


def test_an_unknown_memory_policy(refused):
    refused("unknown memory policy 'fiffo': did you mean 'fifo'", memory="fiffo")


def test_an_unknown_output_type(refused):
    refused("output_type: expected 'pt', 'np' or 'latent', got 'pil'", output_type="pil")


@pytest.mark.parametrize("name", ["num_frames", "num_inference_steps"])
def test_counts_below_one(refused, name):
    refused(f"{name}: expected at least 1, got 0", **{name: 0})


def test_a_list_of_generators_of_another_length(refused):
    refused(r"generator: expected one per episode \(2\), got 1", generator=[torch.Generator()])


def test_a_state_without_actions_where_the_model_cannot_plan(refused):
    refused("plan: expected a world model that plans actions .*, got one without a plan", state=BODY)


@pytest.mark.parametrize("name", ["num_frames", "num_inference_steps"])
@pytest.mark.parametrize("value", [8.0, "8", None, True])
def test_counts_that_are_no_whole_numbers(refused, name, value):
    refused(f"{name}: expected a whole number of at least 1, got {value!r}; give an int", **{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "1"])
def test_a_guidance_scale_that_guides_nowhere(refused, value):
    refused(
        f"guidance_scale: expected a finite number of at least 0, got {value!r}; 1 turns",
        guidance_scale=value,
    )


@pytest.mark.parametrize("value", [7, [7, 7]])
def test_a_seed_is_no_generator(refused, value):
    refused(r"generator: expected a torch\.Generator, .* got 7; make one with torch", generator=value)


@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), (3, "int"), (["lift", 3], "int")])
def test_an_instruction_that_is_no_text(refused, value, kind):
    refused(f"instruction: expected text, or a list of one per episode, got {kind}; say", instruction=value)


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "NoneType"), ("x.png", "str"), ([[1, 2], [3]], "list"), ({}, "dict")]
)
def test_images_that_are_no_array(refused, value, kind):
    refused(rf"images: expected \[B, n, 2, 3, 16, 16\], got {kind}; pass numbers", images=value)


@pytest.mark.parametrize(
    ("value", "got"), [(None, "NoneType"), (np.eye(3), "ndarray"), ((1, 2, 3), "3 parts"), ("front", "str")]
)
def test_cameras_in_no_known_form(refused, value, got):
    refused(
        rf"cameras: expected info\['cameras'\], .*camera_to_world, got {got}; environments", cameras=value
    )


def test_a_pair_of_cameras_without_numbers(refused, cameras):
    refused(r"cameras: expected info\['cameras'\], .* got NoneType; pass numbers", cameras=(None, cameras[1]))


def named(cameras) -> dict[str, dict[str, np.ndarray]]:
    """The same cameras as an environment's info holds them."""
    keys = ("intrinsics", "camera_to_world")
    return {
        view: {key: cameras[i][row] for i, key in enumerate(keys)}
        for row, view in enumerate(("front", "top"))
    }


def test_a_missing_view_of_named_cameras(refused, cameras):
    given = {"front": named(cameras)["front"]}
    refused(
        r"cameras: expected the views \('front', 'top'\), got \('front',\) without 'top'; add", cameras=given
    )


def test_a_missing_matrix_of_named_cameras(refused, cameras):
    given = named(cameras) | {"top": {"intrinsics": cameras[0][1]}}
    refused(
        r"cameras\['top'\]: expected 'intrinsics' and 'camera_to_world', missing 'camera_to_world'",
        cameras=given,
    )


def test_named_cameras_of_different_moments(refused, cameras):
    given = named(cameras)
    given["top"]["camera_to_world"] = np.stack([np.eye(4)] * 3)
    refused("cameras: expected one camera_to_world matrix per view, got the shapes", cameras=given)


def test_arrays_that_run_backwards_are_taken(pictures):
    taken = read_images(pictures.numpy()[:, ::-1], ("front", "top"), 16)
    assert torch.equal(taken, pictures.flip(1))
