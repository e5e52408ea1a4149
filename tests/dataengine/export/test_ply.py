"""PLY files: what comes back, which bytes are written, what foreign files may look like."""

import json
import logging
import struct

import numpy as np
import pytest
import torch

from dataengine.export import read_ply, read_ply_sequence, write_ply, write_ply_sequence

FIELDS = [
    *("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
]


def header(order: str, count: int, fields: list[str], kind: str = "float", before: str = "") -> str:
    lines = ["ply", f"format {order} 1.0", "comment by another program", *before.splitlines()]
    lines += [f"element vertex {count}", *(f"property {kind} {name}" for name in fields), "end_header"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("body", [False, True])
def test_everything_comes_back(tmp_path, gaussians, same, degree, body) -> None:
    wanted = gaussians(40, degree)
    if body:
        wanted = wanted.replace(body=torch.arange(40) - 1)
    path = write_ply(tmp_path / "new" / "folder" / "a.ply", wanted, body=body)
    assert same(read_ply(path), wanted)


def test_layout_is_that_of_the_reference(tmp_path, gaussians) -> None:
    one = gaussians(1, 1)
    content = write_ply(tmp_path / "a.ply", one).read_bytes()
    text, data = content.split(b"end_header\n")
    assert text.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty float x\n")
    names = [line.split()[2] for line in text.decode().splitlines() if line.startswith("property")]
    dc, rest = [f"f_dc_{i}" for i in range(3)], [f"f_rest_{i}" for i in range(9)]
    assert names == ["x", "y", "z", "nx", "ny", "nz", *dc, *rest, *FIELDS[6:]]
    row = dict(zip(names, struct.unpack("<26f", data), strict=True))
    assert row["f_rest_1"] == one.harmonics[0, 2, 0]  # channel by channel: second coefficient of red
    assert row["f_rest_3"] == one.harmonics[0, 1, 1]
    assert row["opacity"] == one.opacities[0]
    assert row["rot_0"] == one.quats[0, 0]


def test_no_gaussians_and_infinite_opacity(tmp_path, gaussians) -> None:
    assert len(read_ply(write_ply(tmp_path / "none.ply", gaussians(0, 2)))) == 0
    opaque = gaussians(2).replace(opacities=torch.tensor([torch.inf, -torch.inf]))
    assert read_ply(write_ply(tmp_path / "a.ply", opaque)).opacities.equal(opaque.opacities)


@pytest.mark.parametrize("order", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("kind", ["float", "double", "float32"])
def test_foreign_files(tmp_path, gaussians, same, order, kind) -> None:
    """Another element first, more properties, another order of them, no normals, no f_rest."""
    wanted = gaussians(7)
    columns = {
        name: value
        for names, values in [
            (FIELDS[:3], wanted.means),
            (FIELDS[3:6], wanted.harmonics[:, 0]),
            (FIELDS[6:7], wanted.opacities[:, None]),
            (FIELDS[7:10], wanted.scales),
            (FIELDS[10:], wanted.quats),
        ]
        for name, value in zip(names, values.T.numpy(), strict=True)
    }
    fields = [*sorted(columns), "weight"]
    table = np.stack([*(columns[name] for name in fields[:-1]), np.arange(7)], 1)
    top = header(order, 7, fields, kind, before="element extra 2\nproperty uchar a\nproperty short b")
    if order == "ascii":
        rows = [" ".join(repr(float(x)) for x in row) for row in table]
        content = (top + "1 2\n3 4\n" + "\n".join(rows) + "\n\n").replace("\n", "\r\n").encode()
    else:
        mark = "<" if "little" in order else ">"
        content = top.encode() + bytes(6) + table.astype(f"{mark}f{8 if kind == 'double' else 4}").tobytes()
    path = tmp_path / "foreign.ply"
    path.write_bytes(content + b"trailing elements are passed over")
    assert same(read_ply(path), wanted)


@pytest.mark.parametrize(("kind", "white"), [("uchar", 255), ("ushort", 65535), ("float", 1.0)])
def test_plain_points_become_gaussians(tmp_path, caplog, kind, white) -> None:
    fields = "".join(f"property {kind} {name}\n" for name in ("red", "green", "blue"))
    top = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    path = tmp_path / "points.ply"
    path.write_text(f"{top}{fields}end_header\n0 0 0 {white} 0 0\n0.1 0 0 0 {white} 0\n0 0.1 0 0 0 {white}\n")
    with caplog.at_level(logging.WARNING):
        cloud = read_ply(path)
    assert cloud.colors.allclose(torch.eye(3), atol=1e-6)
    assert cloud.scales.exp()[0].allclose(torch.tensor(0.05))  # half the distance to the others
    assert "3 plain points became round Gaussians" in caplog.text
    assert read_ply(path, size=0.2).scales.exp().allclose(torch.tensor(0.2))


def test_one_point(tmp_path) -> None:
    path = tmp_path / "point.ply"
    path.write_text(header("ascii", 1, ["x", "y", "z", "r", "g", "b"]) + "1 2 3 128 128 128\n")
    assert read_ply(path).scales.exp().allclose(torch.tensor(0.01))


BAD = {
    "magic": (b"glTF" + bytes(20), "expected a file that begins with 'ply', got b'glTF"),
    "empty": (b"", "expected a file that begins with 'ply', got b''"),
    "no end": (b"ply\nformat ascii 1.0\n", "expected a header that ends with end_header, got none"),
    "no format": (b"ply\nelement vertex 0\nend_header\n", "expected one of the formats ascii"),
    "odd line": (b"ply\nformat ascii 1.0\nproperty half x\nend_header\n", "got the header line 'property half x'"),
    "no vertex": (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "expected an element vertex, got face"),
    "no fields": (
        b"ply\nformat ascii 1.0\nelement vertex 2\nend_header\n",
        "missing x, y, z, f_dc_0, f_dc_1, f_dc_2, opacity",
    ),
    "uncoloured": (
        header("ascii", 1, ["x", "y", "z"]).encode() + b"0 0 0\n",
        "or x y z red green blue of points; missing f_dc_0",
    ),
    "two scales": (
        header("ascii", 1, [f for f in FIELDS if f not in ("scale_2", "rot_3")]).encode() + b"0 " * 12,
        r"missing scale_2, rot_3$",
    ),
    "cut binary": (
        header("binary_little_endian", 3, FIELDS).encode() + bytes(14 * 4 * 2 + 5),
        "expected 3 vertices as the header says, got 2; the file is cut off",
    ),
    "cut text": (header("ascii", 3, FIELDS).encode() + b"0 " * 14, "expected 3 vertices .* got 1; the file is cut"),
    "cut before": (
        header("binary_little_endian", 3, FIELDS, before="element a 99\nproperty double b").encode(),
        "expected 3 vertices as the header says, got 0",
    ),
    "words": (header("ascii", 1, FIELDS).encode() + b"zero " * 14, "expected 1 lines of 14 numbers"),
    "ragged": (header("ascii", 2, FIELDS).encode() + b"0 " * 14 + b"\n0 0\n", "expected 2 lines of 14 numbers"),
    "nan": (
        header("ascii", 1, FIELDS).encode() + b"0 nan 0 " + b"0 " * 11,
        "expected finite numbers, got NaN or infinity in y of 1 vertices",
    ),
    "rest": (
        header("ascii", 1, [*FIELDS, "f_rest_0", "f_rest_1"]).encode() + b"0 " * 16,
        "expected 0, 9, 24 or 45 properties f_rest_0, f_rest_1 and so on, got 2",
    ),
    "compressed": (
        header("binary_little_endian", 1, ["packed_position", "packed_color"], "uint").encode() + bytes(8),
        "got a compressed PLY; export it uncompressed",
    ),
    "list": (
        header("ascii", 0, FIELDS).replace("end_header", "property list uchar int tags\nend_header").encode(),
        "expected numbers in the element vertex, got the list tags",
    ),
    "faces first": (
        header("binary_little_endian", 0, FIELDS, before="element face 1\nproperty list uchar int ids").encode(),
        "expected vertex before elements with lists, got face first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_sentence(tmp_path, case) -> None:
    content, sentence = BAD[case]
    path = tmp_path / "bad.ply"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_ply(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_every_cut_of_a_good_file_is_noticed(tmp_path, gaussians) -> None:
    whole = write_ply(tmp_path / "whole.ply", gaussians(2)).read_bytes()
    part = tmp_path / "part.ply"
    for end in range(0, len(whole), 7):
        part.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="part.ply: expected"):
            read_ply(part)


def test_missing_file_and_bad_numbers(tmp_path, gaussians) -> None:
    with pytest.raises(FileNotFoundError, match="expected a PLY file, found none"):
        read_ply(tmp_path / "absent.ply")
    broken = gaussians(3)
    broken.means[1, 2] = torch.nan
    with pytest.raises(ValueError, match="expected finite means, got NaN or infinity in 1 of 3 Gaussians"):
        write_ply(tmp_path / "a.ply", broken)
    assert list(tmp_path.iterdir()) == []


def test_sequence_comes_back_and_forgets_a_longer_one(tmp_path, scene, same) -> None:
    shots = scene(frames=4, degree=1)
    (tmp_path / "notes.ply.txt").write_text("mine")
    write_ply_sequence(tmp_path, shots, fps=12.5)
    paths = write_ply_sequence(tmp_path, shots[:3], fps=12.5)
    assert [path.name for path in paths] == [
        "frame_0000.ply", "frame_0001.ply", "frame_0002.ply", "playlist.json",
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(p.name for p in paths), "notes.ply.txt"])
    frames, fps = read_ply_sequence(tmp_path)
    assert fps == 12.5
    assert all(same(*pair) for pair in zip(frames, shots[:3], strict=True))


def test_frames_of_an_unfinished_longer_sequence_are_removed(tmp_path, scene) -> None:
    """Nobody would play them: neither a reader that goes by names nor one that has lost the playlist."""
    shots = scene(frames=4)
    write_ply_sequence(tmp_path, shots)
    (tmp_path / "playlist.json").write_text("{")  # damaged, as it may be after a crash
    for name in ("frame_10000.ply", "frame_1.ply", "frame_mine.ply"):
        (tmp_path / name).write_text("")
    write_ply_sequence(tmp_path, shots[:2])
    left = sorted(p.name for p in tmp_path.glob("*.ply"))
    assert left == ["frame_0000.ply", "frame_0001.ply", "frame_1.ply", "frame_mine.ply"]
    assert len(read_ply_sequence(tmp_path)[0]) == 2


def test_folder_without_playlist_goes_by_number(tmp_path, gaussians) -> None:
    for t in (10, 9, 100):
        write_ply(tmp_path / f"shot{t}.ply", gaussians(t))
    frames, fps = read_ply_sequence(tmp_path)
    assert ([len(frame) for frame in frames], fps) == ([9, 10, 100], 10.0)


def listing(**values: object) -> str:
    """A playlist as text."""
    return json.dumps({"format": "gaussians ply sequence", "fps": 1} | values)


@pytest.mark.parametrize(
    ("playlist", "sentence"),
    [
        ("{", "expected JSON, got broken text"),
        ("[]", "expected a playlist of format"),
        ('{"format": "other"}', "expected a playlist of format"),
        (listing(frames=["../a.ply"]), r"a list of .ply files in this folder, got '../a.ply'; write it again"),
        (listing(frames=["a.ply", ".."]), r"a list of .ply files in this folder, got '..'"),
        (listing(frames=["/etc/a.ply"]), r"a list of .ply files in this folder, got '/etc/a.ply'"),
        (listing(frames=["..\\a.ply"]), r"a list of .ply files in this folder"),
        (listing(frames=["a\0.ply"]), r"a list of .ply files in this folder"),
        (listing(frames=[""]), r"a list of .ply files in this folder, got ''"),
        (listing(frames=["notes.txt"]), r"a list of .ply files in this folder, got 'notes.txt'"),
        (listing(frames=[3]), r"a list of .ply files in this folder, got 3"),
        (listing(frames="a.ply"), r"a list of .ply files in this folder, got None"),
        (listing(fps=0, frames=["a.ply"]), r"playlist.json: fps: expected frames per second above 0, got 0"),
        (listing(fps=float("inf"), frames=["a.ply"]), "fps: expected frames per second above 0, got inf"),
        (listing(fps="10", frames=["a.ply"]), "fps: expected frames per second above 0, got '10'"),
        (listing(), r"a list of .ply files in this folder, got None"),
    ],
)  # fmt: skip
def test_bad_playlists(tmp_path, playlist, sentence) -> None:
    (tmp_path / "playlist.json").write_text(playlist)
    with pytest.raises(ValueError, match=sentence):
        read_ply_sequence(tmp_path)


def test_bad_sequences(tmp_path, gaussians) -> None:
    with pytest.raises(ValueError, match="frames: expected at least one frame"):
        write_ply_sequence(tmp_path, [])
    with pytest.raises(ValueError, match="fps: expected frames per second above 0, got 0"):
        write_ply_sequence(tmp_path, [gaussians(1)], fps=0)
    with pytest.raises(FileNotFoundError, match="expected playlist.json or .ply files, found none"):
        read_ply_sequence(tmp_path)
