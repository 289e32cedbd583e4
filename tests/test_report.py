"""Reports: what they say, that nothing in them is anybody's code, and how a real browser shows them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scripts.makers import runs
from streamconv.batch.settings import settings
from streamconv.options import Phase, Progress, Result, RunOptions
from streamconv.report import charts
from streamconv.report.conversion import by_layer, convert_reported, write_report
from streamconv.report.overview import write_overview
from streamconv.report.throughput import rates
from streamconv.report.timeline import Sample, Timeline

HOSTILE = "</script><script>document.title='owned'</script>&\"'"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (apt-get install chromium)"
)


def make_output(folder: Path, tensors: int = 30) -> Path:
    """A folder with a manifest as ours are; pages are written from these alone."""
    folder.mkdir(parents=True)
    entries = {
        f"model.layers.{i // 10}.part_{i % 10}.weight": {
            "file": f"model-{i % 3}.safetensors",
            "dtype": "BF16" if i % 10 else "F32",
            "shape": [64, 32],
            "xxh3_128": f"{i:032x}",
            "sources": [f"fsdp.{i}.weight"]
            if i % 7 == 0
            else [f"model.layers.{i // 10}.part_{i % 10}.weight"],
        }
        for i in range(tensors)
    }
    entries["lm_head.weight"] = {
        "file": "model-0.safetensors", "dtype": "BF16", "shape": [100, 32], "xxh3_128": "f" * 32,
        "sources": ["model.embed_tokens.weight"],
    }  # fmt: skip
    manifest = runs.manifest(
        {f"model-{i}.safetensors": 5 for i in range(3)},
        notices=[HOSTILE],
        skipped=[["optim.pt", "optimizer state"]],
        tensors=entries,
        run={"source": "/runs/x/actor"},
    )
    (folder / "streamconv.json").write_text(json.dumps(manifest))
    return folder


def result(output: Path) -> Result:
    return Result(
        "done", output, seconds=2.0, read_bytes=10**6, peak_bytes=3 * 10**8, budget_bytes=10**9
    )


def report(tmp_path: Path, tensors: int = 30) -> Path:
    timeline = Timeline()
    timeline.samples = [Sample(i / 10, 10**8 + i * 10**6, i * 10**5) for i in range(40)]
    timeline.phases = [(0.0, "plan"), (1.5, "write"), (3.8, "publish")]
    path = tmp_path / "pages/report.html"
    write_report(path, result(make_output(tmp_path / "model", tensors)), timeline)
    return path


class Page(HTMLParser):
    """What a page consists of, as a browser takes it apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.scripts if self.tags[-1:] and self.tags[-1][0] == "script" else self.text).append(
            data
        )


def test_a_page_says_what_was_made(tmp_path):
    page = Page(report(tmp_path))
    text = " ".join(page.text)
    for words in (
        "/runs/x/actor",
        "31",
        "optim.pt",
        "optimizer state",
        "model.layers",
        "lm_head",
        "ab" * 16,
    ):
        assert words in text
    data = json.loads(page.scripts[0])
    assert len(data["rows"]) == 31
    assert data["rows"][1] == [
        "model.layers.0.part_1.weight",
        1,
        [64, 32],
        4096,
        1,
        f"{1:032x}",
        0,
        "",
        0,
    ]
    assert data["rows"][7][6] == ["fsdp.7.weight"]
    assert (data["dtypes"], data["files"][1]) == (["F32", "BF16"], "model-1.safetensors")


def test_a_page_needs_nothing_from_anywhere(tmp_path):
    path = report(tmp_path)
    for tag, attributes in Page(path).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        for name in ("src", "href"):
            assert not (attributes.get(name) or "").startswith(("http", "//"))
    assert "default-src 'none'" in path.read_text()
    assert not re.search(r"@import|url\(", path.read_text())


def test_what_a_checkpoint_says_is_text(tmp_path):
    folder = make_output(tmp_path / HOSTILE.replace("/", "_"))
    manifest = json.loads((folder / "streamconv.json").read_text())
    first = next(iter(manifest["tensors"].values()))
    manifest["tensors"] = {f"{HOSTILE}.{i}.weight": first for i in range(2)}
    manifest["files"][0]["name"] = HOSTILE
    manifest["job"]["options"][HOSTILE] = [HOSTILE]
    (folder / "streamconv.json").write_text(json.dumps(manifest))
    path = tmp_path / "report.html"
    write_report(path, result(folder), Timeline())
    page = Page(path)
    assert [t for t, _ in page.tags].count("script") == 2
    assert HOSTILE in " ".join(page.text)
    assert json.loads(page.scripts[0])["rows"][0][0] == f"{HOSTILE}.0.weight"
    assert not any("owned" in script for script in page.scripts[1:])


def test_a_conversion_is_watched_while_it_runs(tmp_path):
    output = make_output(tmp_path / "model")
    heard = []

    def convert(run: RunOptions) -> Result:
        run.on_event(Phase("write"))
        run.on_event(Progress(5, 10, 0, 1.0, 1, 1, "model.safetensors"))
        return result(output)

    path = tmp_path / "report.html"
    made = convert_reported(path, convert, RunOptions(on_event=heard.append))
    assert made.status == "done"
    assert [type(e) for e in heard] == [Phase, Progress]
    assert "<svg" in path.read_text()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["report.html"]


def test_a_timeline_of_a_long_run_keeps_a_bounded_number_of_samples(monkeypatch):
    monkeypatch.setattr("streamconv.report.timeline._MAX_SAMPLES", 50)
    timeline = Timeline()
    for _ in range(1000):
        timeline._take()
    assert 25 <= len(timeline.samples) <= 50
    seconds = [s.seconds for s in timeline.samples]
    assert seconds == sorted(seconds)


# Charts


def svg(markup: str) -> ET.Element:
    return ET.fromstring(markup)


def test_charts_are_whole_and_inside_their_frame():
    markup = charts.line_chart(
        [(0, 0), (5, 2e9), (10, 1e9)],
        title="<&>",
        value_text=str,
        limit=charts.Limit(3e9, "a<b"),
        phases=[(0, "one"), (4, "two<")],
    )
    root = svg(markup)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    points = next(e for e in root if e.tag == "polyline").attrib["points"].split()
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= width
        assert 0 <= y <= height
    assert "a<b" in [e.text for e in root]


@pytest.mark.parametrize("points", [[], [(0.0, 0.0)], [(0.0, 5.0), (0.0, 5.0)]])
def test_charts_of_almost_nothing(points):
    svg(charts.line_chart(points, title="t", value_text=str))
    svg(charts.bar_chart([], title="t", value_text=str))
    svg(charts.gantt([], title="t"))


def test_bars_are_as_high_as_they_are_worth():
    root = svg(charts.bar_chart([("0", 10), ("1", 5)], title="t", value_text=str))
    first, second = (float(e.attrib["height"]) for e in root if e.attrib.get("class") == "bar")
    assert first == pytest.approx(2 * second, abs=0.2)


def test_jobs_that_overlap_lie_in_different_lanes():
    spans = [
        charts.Span(0, 10, "a", "done"),
        charts.Span(2, 4, "b", "done"),
        charts.Span(5, 6, "c", "x"),
    ]
    assert [[s.name for s in row] for row in charts.lanes(spans)] == [["a"], ["b", "c"]]


@pytest.mark.parametrize(
    ("end", "ticks"),
    [(0.4, [0, 0.1, 0.2, 0.3, 0.4]), (9, [0, 2, 4, 6, 8]), (7200, [0, 1800, 3600, 5400, 7200])],
)
def test_time_is_cut_into_round_pieces(end, ticks):
    assert charts.time_ticks(end, 5) == pytest.approx(ticks)


def test_rates_add_up_to_what_was_written():
    samples = [Sample(i / 4, 0, (i // 3) * 3000) for i in range(41)]
    curve = rates(samples)
    written = sum((b[0] - a[0]) * a[1] for a, b in zip(curve[::2], curve[1::2], strict=True))
    assert written == pytest.approx(samples[-1].done_bytes)


def test_layers_are_told_from_the_rest():
    sizes = {
        "model.layers.0.a": 1,
        "model.layers.0.b": 2,
        "model.layers.10.a": 4,
        "v.blocks.3.x": 8,
    }
    sizes |= {"lm_head.weight": 16, "model.norm.weight": 32, "alone": 64}
    layers, others = by_layer(sizes)
    assert layers == [("v.blocks", [("3", 8.0)]), ("model.layers", [("0", 3.0), ("10", 4.0)])]
    assert others == [("alone", 64), ("model.norm", 32), ("lm_head", 16)]


# The batch's page


def overview(tmp_path: Path) -> Path:
    from streamconv.batch.state import Record

    records = [
        Record(f"step_{i}", f"/out/step_{i}", step=i, state="done", write_bytes=10**9, seconds=70.0)
        for i in range(3)
    ]
    records.append(
        Record("step_9", "/out/step_9", step=9, state="failed", reason=HOSTILE, attempts=2)
    )
    path = tmp_path / "batch.html"
    timeline = Timeline()
    timeline.samples = [Sample(i, 10**8 * (i % 5 + 1), i * 10**7) for i in range(100)]
    write_overview(
        path,
        outputs=["/out"],
        records=[r.to_json() for r in records],
        spans=[charts.Span(0, 30, "step_0", "done"), charts.Span(10, 99, "step_1", "done")],
        timeline=timeline,
        budget_bytes=10**9,
        peak_bytes=5 * 10**8,
        seconds=99.0,
        problems=[],
        removals=["would remove output /out/step_0"],
        links={"/out/step_0": "batch/out/step_0.html"},
    )
    return path


def test_the_page_of_a_batch(tmp_path):
    page = Page(overview(tmp_path))
    text = " ".join(page.text)
    assert HOSTILE in text
    for words in ("3 done", "1 failed", "failed ×2", "3.00 GB", "would remove output /out/step_0"):
        assert words in text
    assert ("a", {"href": "batch/out/step_0.html"}) in page.tags


def test_a_batch_writes_its_page_and_one_for_each_output(tmp_path):
    from scripts.makers import runs
    from tests.scenes import Scene

    scene = Scene(tmp_path, runs.rank_file(tmp_path / runs.RANK_FILE))
    scene.step(10)
    page = tmp_path / "pages/report.html"
    scene.round(fake=False, shared={"report": str(page)})
    assert "global_step_10" in page.read_text()
    single = tmp_path / "pages/report/out/global_step_10.html"
    assert "layer.weight" in single.read_text()
    tags = Page(page).tags
    assert ("a", {"href": "report/out/global_step_10.html"}) in tags
    # A column's head stands above its numbers.
    heads, cells = (
        ["number" in a.get("class", "") for t, a in tags if t == k] for k in ("th", "td")
    )
    assert heads == cells
    # A round with nothing to do writes it anew, and still knows the page of the output.
    page.unlink()
    assert scene.round(shared={"report": str(page)}).counts == {"done": 1}
    assert 'href="report/out/global_step_10.html"' in page.read_text()
    assert settings({"run": [{"root": "a", "output": "b"}], "report": "x.html"}).report == Path(
        "x.html"
    )


# In a real browser


def browse(path: Path, tmp_path: Path, fragment: str = "") -> str:
    """Return the document as it is once the scripts have run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1280,1000", "--dump-dom", f"file://{path}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_chromium
def test_a_browser_shows_fifty_thousand_tensors_and_finds_one(tmp_path):
    path = report(tmp_path, tensors=50_000)
    document = browse(path, tmp_path)
    assert "50,001 tensors" in document
    shown = document.count('class="row"')
    assert 15 < shown < 60  # only those that can be seen exist
    assert "model.layers.0.part_0.weight" in document
    found = browse(path, tmp_path, "#q=layers.4321. part_7 bf16")
    assert "1 of 50,001 tensors" in found
    assert found.count('class="row"') == 1
    assert "model.layers.4321.part_7.weight</span>" in found


@needs_chromium
def test_a_browser_runs_nothing_of_a_checkpoint(tmp_path):
    folder = make_output(tmp_path / "model")
    text = (folder / "streamconv.json").read_text()
    (folder / "streamconv.json").write_text(text.replace("lm_head", json.dumps(HOSTILE)[1:-1]))
    path = tmp_path / "report.html"
    write_report(path, result(folder), Timeline())
    document = browse(path, tmp_path)
    assert "<title>model · streamconv</title>" in document
    assert "31 tensors" in document
