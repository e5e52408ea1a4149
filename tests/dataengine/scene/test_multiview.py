"""From two views to many: what is kept, what is made, what is said of it, and what is refused."""

import dataclasses
import hashlib
import json
import resource

import numpy as np
import pytest

from dataengine.episodes import DatasetError, DatasetWriteError, EpisodeDataset
from dataengine.fit import Fit
from dataengine.flywheel import Flywheel
from dataengine.generators import ConstantFill, Identity, load_restorer, make_generator
from dataengine.multiview import Multiview, multiply, multiview
from dataengine.reconstruct import Reconstruction
from dataengine.sources import open_reading, windows
from tests.dataengine.scene.conftest import capture, look_at, ring, save_dataset

QUICK = Flywheel(
    rounds=1,
    start=Reconstruction(complete=False, fit=Fit(steps=12, quiet=True)),
    refit=Fit(steps=6, quiet=True),
)
SETTINGS = Multiview(views=4, flywheel=QUICK, window=3)
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


class Brighter(Identity):
    """Changes every picture a little."""

    name = "brighter"

    def repair(self, renders, references, anchors):
        repaired = super().repair(renders, references, anchors)
        return dataclasses.replace(repaired, images=(repaired.images + 0.01).clamp(0, 1))


@pytest.fixture(scope="module")
def pair():
    return capture(ring(6).select(["ring_0", "ring_1"]))


@pytest.fixture(scope="module")
def source(pair, tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp("source") / "push", [pair, pair])


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "push4"
    report = multiview(source, out, SETTINGS, progress=False)
    assert (report.made, report.before, report.frames) == (2, 0, 8)
    return EpisodeDataset(out)


def psnr(ours, true):
    return -10 * np.log10(np.square((ours.astype(float) - true) / 255).mean())


def test_all_that_training_reads_comes_along(source, made):
    assert made.problems() == []
    assert made.views == ("ring_0", "ring_1", "view_00", "view_01")
    assert made.success == (True, False)
    for index in range(2):
        ours, theirs = made.episode(index), source.episode(index)
        for name in ("state", "action", "timestamp"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for name in ("action.clean", "privileged"):
            np.testing.assert_array_equal(ours.extra[name], theirs.extra[name])
        assert (ours.task, ours.seed, ours.fps) == (theirs.task, theirs.seed, theirs.fps)
        np.testing.assert_allclose(ours.bodies.poses, theirs.bodies.poses, atol=1e-6)
        for view in source.views:
            assert psnr(ours.images[view], theirs.images[view]) > 38
            np.testing.assert_array_equal(ours.depth[view], theirs.depth[view])
            np.testing.assert_array_equal(ours.body_ids[view], theirs.body_ids[view])
        np.testing.assert_array_equal(
            ours.cameras.select(source.views).camera_to_world, theirs.cameras.camera_to_world
        )


def test_new_views_show_what_their_cameras_would_have_seen(made):
    episode = made.episode(0)
    cameras = episode.cameras.select(["view_00", "view_01"]).at(0)
    truth = capture(cameras)
    seen = (truth.depth > 0).numpy()
    for v, view in enumerate(cameras.names):
        true = (truth.images[:, v] * 255).numpy()
        assert psnr(episode.images[view], true) > 23
        assert psnr(episode.images[view], true) > psnr(np.full_like(true, true.mean()), true) + 4
        close = np.abs(episode.depth[view] - truth.depth[:, v].numpy())[seen[:, v]]
        assert np.median(close) < 0.03
        ids, block = episode.body_ids[view] > 0, truth.body_ids[:, v].numpy() > 0
        assert (ids & block).sum() > 0.5 * (ids | block).sum()


def test_provenance_says_where_each_picture_comes_from(source, made, tmp_path):
    told = made.episode(1).provenance
    assert {view: set(codes.tolist()) for view, codes in told.items()} == {
        "ring_0": {0}, "ring_1": {0}, "view_00": {1}, "view_01": {1}
    }  # fmt: skip
    report = multiview(source, tmp_path / "fill", SETTINGS, Brighter(), episodes=[1], progress=False)
    filled = EpisodeDataset(tmp_path / "fill").episode(0)
    assert set(filled.provenance["view_00"].tolist()) == {2}
    assert set(filled.provenance["ring_0"].tolist()) == {0}
    assert filled.task == source.episode(1).task
    assert report.figures[0]["episode"] == 1


def test_a_generator_that_changes_nothing_generates_nothing(pair):
    cameras = ring(2, phase=0.5, name="new")
    told = multiply(pair, cameras, Identity(), QUICK)
    assert set(told.views.provenance.flatten().tolist()) == {1}
    assert told.figures["rounds"] <= 1


def test_figures_are_kept_by_episode(made):
    told = json.loads((made.root / "meta" / "multiview.json").read_text())
    assert [row["episode"] for row in told["episodes"]] == [0, 1]
    assert told["generator"] == "none"
    row = told["episodes"][0]
    assert row["frames"] == 4
    assert row["input_psnr"] > 25
    assert set(row["cover"]) == {"view_00", "view_01"}
    assert 0.3 < row["cover"]["view_00"] <= 1


def test_cover_tells_what_nobody_saw(pair):
    away = ring(1, name="away")
    away = dataclasses.replace(away, camera_to_world=np.stack([look_at((0, 0, 1.0), (3, 3, 1.5))]))
    beside = ring(6).select(["ring_0"])
    beside = dataclasses.replace(beside, names=("beside",))
    both = dataclasses.replace(
        away, names=("away", "beside"), intrinsics=np.concatenate([away.intrinsics, beside.intrinsics]),
        camera_to_world=np.concatenate([away.camera_to_world, beside.camera_to_world]),
    )  # fmt: skip
    cover = multiply(pair, both, None, QUICK).figures["cover"]
    assert cover["away"] < 0.1
    assert cover["beside"] > 5 * cover["away"]


def files(root):
    """Digests of all files but the record, whose seconds differ."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "multiview.json"
    }


@pytest.mark.parametrize("after", [1, 3])
def test_interrupted_and_resumed_it_is_the_same_dataset(source, made, tmp_path, after):
    """Two windows an episode: stopped within the first episode, and within the second."""

    def stop(work, jobs):
        for count, job in enumerate(jobs):
            if count == after:
                raise KeyboardInterrupt
            yield work(job)

    with pytest.raises(KeyboardInterrupt):
        multiview(source, tmp_path / "d", SETTINGS, progress=False, run=stop)
    assert len(list((tmp_path / "d").glob("meta/episodes/*/*.parquet"))) == after // 2
    report = multiview(source, tmp_path / "d", SETTINGS, progress=False)
    assert report.before == after // 2
    assert files(tmp_path / "d") == files(made.root)
    again = multiview(source, tmp_path / "d", SETTINGS, progress=False)
    assert (again.made, again.before, len(again.figures)) == (0, 2, 2)


def test_a_full_disk_keeps_finished_episodes(source, tmp_path):
    """A real refusal by the kernel: from the second episode on, no file may grow beyond 1 kB."""
    out, before = tmp_path / "d", resource.getrlimit(resource.RLIMIT_FSIZE)
    multiview(source, out, SETTINGS, episodes=[0], progress=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            DatasetWriteError, match=r"cannot write \(File too large\); the 1 finished episodes"
        ):
            multiview(source, out, SETTINGS, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(EpisodeDataset(out)) == 1
    assert multiview(source, out, SETTINGS, progress=False).made == 1
    assert EpisodeDataset(out).problems() == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"views": 5}, "views: expected 4 as in .*, got 5; choose another folder or the same settings"),
        ({"window": 2}, "window: expected 3 as in"),
        ({"size": 16}, "size: expected None as in .*, got 16"),
        ({"flywheel": dataclasses.replace(QUICK, weight=0.25)}, "flywheel: expected weight 0.5 as in .*, got weight 0.25"),
    ],
)  # fmt: skip
def test_other_settings_in_the_folder_are_refused(source, made, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        multiview(source, made.root, dataclasses.replace(SETTINGS, **changes), progress=False)


def test_another_generator_source_or_order_is_refused(source, made, pair, tmp_path):
    with pytest.raises(ValueError, match="generator: expected none as in .*, got constant_fill"):
        multiview(source, made.root, SETTINGS, ConstantFill(), progress=False)
    other = save_dataset(tmp_path / "other", [pair])
    with pytest.raises(ValueError, match="dataset: expected push as in .*, got other"):
        multiview(other, made.root, SETTINGS, progress=False)
    with pytest.raises(
        ValueError, match="expected its 2 episodes to be the first of those asked for, got others"
    ):
        multiview(source, made.root, SETTINGS, episodes=[1, 0], progress=False)
    with pytest.raises(ValueError, match="which holds another dataset; name another"):
        multiview(source, other.root, SETTINGS, progress=False)


def test_the_folder_of_the_dataset_itself_is_refused(source):
    with pytest.raises(ValueError, match="out: expected another folder than the dataset's"):
        multiview(source, source.root, SETTINGS, progress=False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"views": 2}, r"views: expected more than the 2 that are observed \(ring_0, ring_1\), got 2; ask for more"),
        ({"views": 1}, "views: expected more than the 2 that are observed"),
        ({"observed": ("ring_0",)}, r"expected at least 2 views with camera poses, got 1 \(ring_0 of ring_0, ring_1\)"),
        ({"observed": ("ring_0", "rng_1")}, "views: unknown view 'rng_1'; did you mean 'ring_1'"),
        ({"cameras": ring(2)}, r"cameras: expected names that no view has, got \['ring_0', 'ring_1'\]; rename them"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(source, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        multiview(source, tmp_path / "d", dataclasses.replace(SETTINGS, **changes), progress=False)
    assert not (tmp_path / "d").exists()


def test_bad_settings_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="window: expected at least 1 frame, got 0"):
        Multiview(window=0)
    with pytest.raises(ValueError, match="size: expected at least 1 pixel, got 0"):
        Multiview(size=0)
    with pytest.raises(ValueError, match="episodes: expected some of 0 to 1 in .*, got 5"):
        multiview(source, tmp_path / "d", SETTINGS, episodes=[5])


def test_generators_go_by_name(tmp_path):
    assert make_generator("none") is None
    assert isinstance(make_generator("fill"), ConstantFill)
    with pytest.raises(
        ValueError, match="generator: expected one of none, fill, restorer, got 'restore'; did you mean"
    ):
        make_generator("restore")
    with pytest.raises(FileNotFoundError, match="expected the weights of a restorer, found none; train one"):
        load_restorer(tmp_path / "none.safetensors")


def refusal(root, views, error=ValueError, **options):
    dataset = save_dataset(root, [views], **options)
    with pytest.raises(error) as caught:
        multiview(dataset, root.with_name("out"), SETTINGS, progress=False)
    assert not root.with_name("out").exists()
    return str(caught.value), dataset


def mended(dataset, settings=SETTINGS):
    return open_reading(dataset, mend=True)


def test_poses_with_opengl_axes_are_named_and_mended(pair, tmp_path):
    said, dataset = refusal(tmp_path / "d", pair, poses=lambda pose: pose @ OPENGL)
    assert "episode 0: camera_to_world: expected OpenCV axes (y down, z forward), got poses with" in said
    assert "looks like OpenGL axes (y up, z back)" in said
    assert said.endswith("or repair (--repair)")
    reading, told = mended(dataset)
    assert told == ["poses are read as OpenGL axes (y up, z back), not as OpenCV axes (y down, z forward)"]
    np.testing.assert_allclose(
        reading.cameras(dataset, 0).at(0).camera_to_world, pair.cameras.camera_to_world, atol=1e-6
    )
    multiview(dataset, tmp_path / "out", dataclasses.replace(SETTINGS, mend=True), progress=False)
    poses = EpisodeDataset(tmp_path / "out").cameras(0, pair.names).camera_to_world[0]
    np.testing.assert_allclose(poses, pair.cameras.camera_to_world, atol=1e-6)


def test_depth_in_millimetres_is_named_and_mended(pair, tmp_path):
    said, dataset = refusal(tmp_path / "d", pair, depth_scale=1000.0)
    assert "depth: expected metres, got a median of" in said
    assert "looks like millimetres" in said
    _, told = mended(dataset)
    assert told == ["depth is multiplied by 0.001"]
    multiview(dataset, tmp_path / "out", dataclasses.replace(SETTINGS, mend=True), progress=False)
    depth = EpisodeDataset(tmp_path / "out").episode(0).depth["ring_0"]
    np.testing.assert_allclose(depth, pair.depth[:, 0].clamp_min(0.02), rtol=2e-3)


def test_left_handed_poses_are_named(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("dataengine.lerobot.frames.check_rigid", lambda *_: None)  # another program wrote it
    said, _ = refusal(
        tmp_path / "d", pair, DatasetError, poses=lambda pose: pose @ np.diag([1.0, -1.0, 1.0, 1.0])
    )
    assert (
        "episode 0: camera_to_world: expected a right-handed rotation (det +1), got a left-handed one" in said
    )


def test_no_poses_are_named(pair, tmp_path):
    said, _ = refusal(tmp_path / "d", pair, cameras=False)
    assert "expected at least 2 views with camera poses, got 0 (none of ring_0, ring_1)" in said
    assert said.endswith("record with poses or add meta/cameras.json")


def test_poses_beside_the_dataset_will_do(pair, tmp_path):
    dataset = save_dataset(tmp_path / "d", [pair], cameras=False)
    (dataset.root / "meta" / "cameras.json").write_text(pair.cameras.to_json())
    dataset = EpisodeDataset(dataset.root)
    assert multiview(dataset, tmp_path / "out", SETTINGS, progress=False).made == 1
    assert EpisodeDataset(tmp_path / "out").cameras(0).names[-1] == "view_01"


def test_views_that_never_overlap_are_named(pair, tmp_path):
    back = look_at((50.0, 0.0, 1.0), (60.0, 3.0, 1.0))
    apart = dataclasses.replace(
        pair, cameras=dataclasses.replace(
            pair.cameras, camera_to_world=np.stack([pair.cameras.camera_to_world[0], back])
        ),
    )  # fmt: skip
    said, _ = refusal(tmp_path / "d", apart)
    assert "views: expected views that overlap in one chain, got ['ring_0', 'ring_1']" in said


def test_colour_alone_and_another_size(pair, tmp_path):
    plain = dataclasses.replace(pair, depth=None)
    dataset = save_dataset(tmp_path / "d", [plain], ids=False)
    settings = dataclasses.replace(SETTINGS, size=16, views=3)
    multiview(dataset, tmp_path / "out", settings, progress=False)
    episode = EpisodeDataset(tmp_path / "out").episode(0)
    assert episode.images["view_00"].shape == (4, 16, 16, 3)
    assert episode.depth is None
    assert episode.body_ids is None
    record = json.loads((tmp_path / "out" / "meta" / "multiview.json").read_text())
    assert record["episodes"][0]["cover"] is None  # nothing says what the observed views see of the new ones
    np.testing.assert_allclose(episode.cameras.intrinsics[0, 0, 0, 0], 1.2 * 16, rtol=1e-6)


def test_what_was_made_is_not_taken_for_seen(made, tmp_path):
    report = multiview(
        made, tmp_path / "more", dataclasses.replace(SETTINGS, views=3), episodes=[0], progress=False
    )
    assert report.made == 1
    assert EpisodeDataset(tmp_path / "more").views == ("ring_0", "ring_1", "view_00")


@pytest.mark.parametrize(("length", "longest"), [(1, 64), (64, 64), (65, 64), (129, 64), (7, 3)])
def test_windows_cover_every_frame_once(length, longest):
    cuts = windows(length, longest)
    assert [t for start, stop in cuts for t in range(start, stop)] == list(range(length))
    sizes = [stop - start for start, stop in cuts]
    assert max(sizes) <= longest
    assert max(sizes) - min(sizes) <= 1
