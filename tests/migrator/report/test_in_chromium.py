"""The report in a real browser, headless Chromium."""

from __future__ import annotations

import struct

import pytest

from migrator.report.from_inspection import build_inspection_report
from migrator.report.page import write_report
from plans.mesh import Mesh
from runtime.inspecting.inspection import inspect_checkpoint
from tests.chromium import chromium, find_chromium
from tests.migrator.report.samples import HOSTILE, a_report

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed: run `make browser`")

TAB = ("Tab", 9)
CONTROLS = "document.querySelectorAll('a[href], summary, button, input, [tabindex=\"0\"]').length"
FOCUSED = "document.activeElement === document.body ? null : document.activeElement.outerHTML.slice(0, 120)"
WIDTHS = (360, 1600)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium(str(PROGRAM), tmp_path_factory.mktemp("chromium") / "profile") as tab:
        yield tab


@pytest.fixture(scope="module")
def real(tmp_path_factory, rank_folder):
    """The report of rank files for four ranks, with their placement on another mesh."""
    file = tmp_path_factory.mktemp("report") / "real.html"
    write_report(build_inspection_report(inspect_checkpoint(rank_folder("qwen3_moe", 4), Mesh(2, 4, 2), "tp_ep")), file)
    return file


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "hostile.html"
    write_report(a_report(HOSTILE, Mesh(tp=8, fsdp=16)), file)
    return file


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["real", "hostile"])
def test_it_fits_logs_nothing_and_fetches_nothing(page, request, which, scheme, width):
    file = request.getfixturevalue(which)
    page.open(file, width, scheme=scheme)
    page.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    assert (
        page.value("[...document.querySelectorAll('body *')].filter(one => one.scrollWidth > innerWidth).length") == 0
    )
    assert page.complaints == []
    assert page.requests == [file.as_uri()]
    assert page.value("document.title") != "owned"


def test_the_checks_can_fail(page, tmp_path):
    file = tmp_path / "bad.html"
    file.write_text("<title>x</title><p style='width:900px'>x</p><script>document.title='owned';oops()</script>")
    page.open(file, 360)
    assert not page.value("document.documentElement.scrollWidth <= innerWidth")
    assert page.value("document.title") == "owned"
    assert len(page.complaints) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_every_rank_and_gate_and_up_are_seen(page, real, width):
    page.open(real, width)
    shown = page.value("document.body.innerText")
    assert all(shown.count(f"rank {rank}") >= 10 for rank in range(4))
    packed = page.value(
        "[...document.querySelectorAll('.packed')].map(one => [one.querySelector('.part').innerText,"
        " ...[...one.querySelectorAll('li')].map(slice => slice.innerText.replace(/\\s+/g, ' '))])"
    )
    assert packed == [
        ["gate", "rank 0 [0:4]", "rank 1 [4:8]", "rank 2 [8:12]", "rank 3 [12:16]"],
        ["up", "rank 0 [16:20]", "rank 1 [20:24]", "rank 2 [24:28]", "rank 3 [28:32]"],
    ]
    hidden = page.value("[...document.querySelectorAll('.slice')].filter(one => one.offsetHeight < 12).length")
    assert hidden == 0


def test_ranks_are_distinguishable_without_colour(page, real):
    page.open(real, 1600)
    patterns = page.value(
        "[0, 1, 2, 3].map(rank => getComputedStyle(document.querySelector('.slice.p' + rank)).backgroundImage)"
    )
    assert len(set(patterns)) == 4
    gray = page.value("getComputedStyle(document.querySelector('.slice')).backgroundColor")
    assert len(gray.split(",")) >= 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_either_scheme(page, real, scheme):
    page.open(real, 1600, scheme=scheme)
    ink, paper = (
        [int(part) for part in page.value(f"getComputedStyle(document.body).{what}").strip("rgb()").split(",")]
        for what in ("color", "backgroundColor")
    )
    assert contrast(ink, paper) > 7
    assert (sum(paper) < sum(ink)) == (scheme == "dark")


def contrast(one, other):
    """Return the contrast of two colours as WCAG defines it."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour):
    linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["real", "hostile"])
def test_tab_reaches_every_control_and_gets_out_again(page, request, which, width):
    page.open(request.getfixturevalue(which), width)
    controls = page.value(CONTROLS)
    assert controls > 8
    reached = []
    for _ in range(controls + 2):
        page.press(*TAB)
        focused = page.value(FOCUSED)
        if focused is None or focused in reached:
            break
        outline = page.value("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", focused
        reached.append(focused)
    assert len(reached) == controls, reached


def test_the_keyboard_opens_details_and_follows_links(page, real):
    page.open(real, 1600)
    page.value("document.querySelector('summary').focus()")
    page.press("Enter", 13, "\r")
    assert page.value("document.querySelector('details').open")
    page.value("document.querySelector('nav a[href=\"#digests\"]').focus()")
    page.press("Enter", 13, "\r")
    assert page.value("location.hash") == "#digests"
    assert page.value("document.querySelector('#digests').getBoundingClientRect().top < innerHeight")


def test_a_table_stays_a_table_for_screen_readers(page, real):
    page.open(real, 360)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert roles.count("table") >= 4
    assert roles.count("rowheader") > 20
    assert roles.count("columnheader") > 10
    assert "meter" in roles


def test_a_screenshot_shows_it(page, real, tmp_path):
    page.open(real, 1600)
    page.screenshot(tmp_path / "report.png")
    picture = (tmp_path / "report.png").read_bytes()
    assert struct.unpack(">II", picture[16:24]) == (1600, 900)
    assert len(picture) > 20_000
