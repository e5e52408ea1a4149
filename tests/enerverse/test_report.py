import io
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataengine.charts import svg_bars, svg_curve
from enerverse.media import encode_mp4, encode_png
from enerverse.prose import to_html
from enerverse.report import Report

SVG = "{http://www.w3.org/2000/svg}"


def moving_square(frames: int = 6, height: int = 17, width: int = 31) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of a red square on grey, sides odd on purpose."""
    video = np.full((frames, height, width, 3), 180, np.uint8)
    for index in range(frames):
        video[index, 4:10, 2 + 3 * index : 8 + 3 * index] = (210, 40, 30)
    return video


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


class Tags(HTMLParser):
    """Collects tags with their attributes and checks that they close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def full_report() -> Report:
    return (
        Report("Lift & <Push>")
        .text("## Result\nIt **works**.")
        .table(
            [["Lift", 23, 0.76666], {"task": "Push", "kept": True}], ["task", "kept", "rate"], "Closed loop"
        )
        .figure(moving_square()[0], "a frame")
        .figure('<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"></svg>')
        .video(moving_square(), 10, "an episode")
        .curve({"a": [3, 2, 1]}, "step", "loss")
        .bars([("a", 0.5, 0.4, 0.6)], "rate")
    )


def test_report_is_one_well_formed_file(tmp_path) -> None:
    page = full_report().write(tmp_path / "runs" / "report.html").read_text()
    tags = Tags(page)
    assert tags.open == []
    assert "<h1>Lift &amp; &lt;Push&gt;</h1>" in page
    assert "script" not in {tag for tag, _ in tags.seen}
    sources = [attributes["src"] for _, attributes in tags.seen if "src" in attributes]
    assert [source.split(";")[0] for source in sources] == ["data:image/png", "data:video/mp4"]
    assert not re.search(r"(href|url\(|@import)\W*http", page)


def test_video_loops_silently_at_a_whole_multiple_of_its_size() -> None:
    page = Report("x").video(moving_square(), 10).html()
    attributes = next(attributes for tag, attributes in Tags(page).seen if tag == "video")
    assert {"autoplay", "loop", "muted", "playsinline"} <= attributes.keys()
    assert attributes["width"] == str(12 * 31)
    assert attributes["class"] == "pixels"


def test_table_cells() -> None:
    rows = [["<a>", 1234567, 0.123456, True, math.nan], {"name": "b", "count": 2}]
    page = Report("x").table(rows, ["name", "count", "rate", "passed", "gap"]).html()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert cells == ["&lt;a&gt;", "1,234,567", "0.1235", "yes", "nan", "b", "2", "", "", ""]
    assert '<th class="number">count</th>' in page


def test_same_parts_give_the_same_bytes() -> None:
    assert full_report().html() == full_report().html()


def test_mp4_holds_the_frames() -> None:
    frames = moving_square()
    with av.open(io.BytesIO(encode_mp4(frames, 12.5))) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 12.5
        decoded = np.stack(
            [
                frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
                for frame in container.decode(video=0)
            ]
        )
    assert decoded.shape == (6, 34, 62, 3)
    error = decoded[:, ::2, ::2].astype(float) - frames
    assert np.sqrt((error**2).mean()) < 6  # of 255; colours survive the half-size colour planes


def test_png_holds_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    decoded = cv2.imdecode(np.frombuffer(encode_png(pixels), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert np.array_equal(decoded[..., ::-1], pixels)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: encode_mp4(np.zeros((2, 4, 4, 3)), 10),
            "frames: expected uint8 [T, H, W, 3], got float64 [2, 4, 4, 3]",
        ),
        (
            lambda: encode_mp4(np.zeros((0, 4, 4, 3), np.uint8), 10),
            "frames: expected uint8 [T, H, W, 3], got uint8 [0, 4, 4, 3]",
        ),
        (
            lambda: encode_mp4(moving_square(), 0),
            "fps: expected a positive number of frames per second, got 0",
        ),
        (
            lambda: encode_png(np.zeros((4, 4), np.uint8)),
            "pixels: expected uint8 [H, W, 3], got uint8 [4, 4]",
        ),
        (
            lambda: Report("x").figure(b"GIF89a"),
            "picture: expected SVG text, PNG bytes or uint8 pixels [H, W, 3], got 'GIF89a'",
        ),
        (
            lambda: Report("x").table([[1, 2]], ["a"]),
            "rows: expected 1 cells, one per column, got 2: [1, 2]",
        ),
        (
            lambda: svg_curve({}, "x", "y"),
            "series: expected at least one finite point to draw, got none",
        ),
        (
            lambda: svg_curve({"a": [0, -1]}, "x", "y", log_y=True),
            "series: expected at least one finite point to draw, got none",
        ),
        (
            lambda: svg_curve({"a": ([1, 2], [1])}, "x", "y"),
            "series['a']: expected x and y of one length, got shapes (2,) and (1,)",
        ),
        (
            lambda: svg_bars([]),
            "rows: expected one or more bars with finite values, got 0 bars and []",
        ),
        (
            lambda: svg_bars([("a", math.nan)]),
            "rows: expected one or more bars with finite values, got 1 bars and [nan]",
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()


def test_curve_places_points_on_its_axes() -> None:
    svg = svg_curve({"a": ([0, 5, 10], [0.0, 1.0, 0.5])}, "step", "loss", width=640, height=320)
    line = ElementTree.fromstring(svg).find(f"{SVG}polyline")
    assert line is not None
    places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    assert [x for x, _ in places] == [56.0, 340.0, 624.0]
    bottom, top, middle = (y for _, y in places)
    assert middle == pytest.approx((top + bottom) / 2)
    assert texts(svg)[-1] == "step"
    assert {"loss", "0.0", "0.2", "1.0", "0", "10"} <= set(texts(svg))


def test_curve_breaks_where_there_is_no_value() -> None:
    svg = ElementTree.fromstring(svg_curve({"a": [1, 2, math.nan, 3, math.inf, 4, 5]}, "x", "y"))
    assert len(svg.findall(f"{SVG}polyline")) == 2
    assert len(svg.findall(f"{SVG}circle")) == 1


def test_legend_names_several_series_and_keeps_one_quiet() -> None:
    assert {"a & b", "c"} <= set(texts(svg_curve({"a & b": [1, 2], "c": [2, 1]}, "x", "y")))
    assert "alone" not in texts(svg_curve({"alone": [1, 2]}, "x", "y"))


def test_log_axis_has_powers_of_ten() -> None:
    assert {"1000", "1", "0.001"} <= set(texts(svg_curve({"a": [1e-3, 1e3]}, "x", "y", log_y=True)))
    assert {"1", "2", "5", "10"} <= set(texts(svg_curve({"a": [1.5, 7]}, "x", "y", log_y=True)))


def test_bars_draw_values_intervals_and_reference() -> None:
    rows = [("dense", 0.5, 0.4, 0.6, "dense"), ("sparse", 1.0, None, None, "sparse"), ("loss", -0.5)]
    svg = svg_bars(rows, "rate", reference=("chance", 0.25))
    assert {"0.5 [0.4, 0.6]", "1", "-0.5", "chance 0.25", "rate", "dense"} <= set(texts(svg))
    root = ElementTree.fromstring(svg)
    widths = [float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect") if bar.attrib["height"] == "16"]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(widths[0], abs=0.2)
    assert len([line for line in root.iter(f"{SVG}line") if line.attrib["class"] == "mark"]) == 4


values = st.floats(-1e12, 1e12) | st.sampled_from([math.nan, math.inf, 0.0, 1e-12, 5e-324])


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text('a<&"é ', max_size=9), st.lists(values, max_size=9), max_size=9), st.booleans()
)
def test_any_series_gives_finite_well_formed_svg(series: dict[str, list[float]], log_y: bool) -> None:
    drawable = [v for line in series.values() for v in line if math.isfinite(v) and (v > 0 or not log_y)]
    if not drawable:
        with pytest.raises(ValueError, match="expected at least one finite point"):
            svg_curve(series, "x", "y", log_y=log_y)
        return
    root = ElementTree.fromstring(svg_curve(series, "x<", "y&", log_y=log_y))
    for element in root.iter():
        for name in ("x", "y", "x1", "y1", "cx", "cy"):
            if name in element.attrib:
                assert -1 <= float(element.attrib[name]) <= 800
        for place in element.attrib.get("points", "").split():
            assert all(0 <= float(number) <= 640 for number in place.split(","))


def test_prose() -> None:
    source = (
        "# Title\nA *b* **c** `d*e*` <f> [g](docs/a.md)\n\n- one\n- two\n  more\n\n```bash\n- <x>\n```\nend"
    )
    assert to_html(source).split("\n", 2)[0] == "<h2>Title</h2>"
    assert (
        '<p>A <em>b</em> <strong>c</strong> <code>d*e*</code> &lt;f&gt; <a href="docs/a.md">g</a></p>'
        in to_html(source)
    )
    assert "<ul><li>one</li><li>two\n  more</li></ul>" in to_html(source)
    assert "<pre><code>- &lt;x&gt;\n</code></pre>\n<p>end</p>" in to_html(source)


def test_prose_makes_no_script_links() -> None:
    assert "href" not in to_html("[x](javascript:alert(1)) [y](data:text/html,z)")


marks = st.sampled_from(
    ["*", "**", "`", "[a](b.md)", "[", "](c/d)", "<b>", "a", "é", " ", "\n", "- ", "# ", "```\n"]
)


@settings(max_examples=400)
@given(st.lists(marks, max_size=12).map("".join))
def test_any_prose_is_well_formed(source: str) -> None:
    assert Tags(to_html(source)).open == []
