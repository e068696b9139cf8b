"""The page as text: well-formed for any tensor names, bounded for any number of tensors."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from migrator.report.content import Report
from migrator.report.from_inspection import build_inspection_report
from migrator.report.from_reshard import build_reshard_report
from migrator.report.from_validation import build_validation_report
from migrator.report.markup import element
from migrator.report.page import render_report, write_report
from migrator.report.shard_map import format_ranks
from plans.errors import DestinationError
from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.inspecting.inspection import inspect_checkpoint
from tests.calls import count_calls
from tests.migrator.report.samples import HOSTILE, a_report, lossy

ALLOWED = frozenset(
    {"html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "a", "p", "div", "span"}
    | {"b", "strong", "code", "h1", "h2", "dl", "dt", "dd", "ul", "ol", "li", "figure", "figcaption", "details"}
    | {"summary", "meter", "table", "caption", "thead", "tbody", "tr", "th", "td"}
)


class Reader(HTMLParser):
    """Parses a page, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def check_harmless(reader: Reader) -> None:
    assert {tag for tag, _ in reader.elements} <= ALLOWED
    for _, attributes in reader.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "action")]
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("style") or "flex-grow:1").startswith("flex-grow:")


def test_hostile_names_stay_text():
    page = render_report(a_report(HOSTILE))
    reader = read(page)
    check_harmless(reader)
    assert "<script>document.title = 'owned'</script>" in reader.text
    assert "\\x1b[31m\\u202e" in reader.text
    assert page.encode()  # which half a surrogate pair cannot be
    assert "n" * 400 not in page
    check_harmless(read(render_report(build_inspection_report(lossy(HOSTILE)))))


def test_the_check_for_harm_can_fail():
    with pytest.raises(AssertionError):
        check_harmless(read("<p onclick='x'></p>"))
    with pytest.raises(AssertionError):
        check_harmless(read("<script></script>"))


def test_fifty_thousand_tensors_fit_on_a_page():
    report = a_report(tuple(f"a.tensor_{number}" for number in range(50_000)))
    with count_calls() as calls:
        page = render_report(report)
    assert calls() < 100 * 50_000
    assert len(page) < 1_000_000
    assert "and 49,750 more, by group" in page


def test_ids_are_unique_and_links_lead_somewhere():
    elements = read(render_report(a_report(("a", "b", "c")))).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    links = [attributes["href"] for tag, attributes in elements if tag == "a"]
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in links} == set(ids)


def test_every_rank_of_a_large_mesh_is_there():
    page = render_report(a_report(("model.gate_up_proj", "b", "c"), Mesh(tp=8, fsdp=32)))
    assert all(f"<span>rank {rank}</span>" in page for rank in range(256))
    assert "gate</p>" in page
    assert "up</p>" in page


@pytest.mark.parametrize(
    ("ranks", "world", "words"),
    [
        ((0,), 1, "rank 0"),
        ((0, 1), 2, "every rank"),
        ((3,), 8, "rank 3"),
        ((0, 1, 2, 5), 8, "ranks 0–2, 5"),
        ((0, 2), 4, "ranks 0, 2"),
    ],
)
def test_ranks_in_words(ranks, world, words):
    assert format_ranks(ranks, world) == words


def test_attributes_are_escaped():
    assert element("a", "<b>", title='"><x>').text == '<a title="&quot;&gt;&lt;x&gt;">&lt;b&gt;</a>'


def test_an_empty_report_is_a_page():
    reader = read(render_report(Report("empty", "nothing to say")))
    assert [tag for tag, _ in reader.elements].count("section") == 0


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(DestinationError, match="No such file"):
        write_report(Report("a", "b"), tmp_path / "none" / "report.html")


def test_the_report_of_a_reshard(rank_folder, hub_folder, tmp_path):
    plan = plan_reshard(rank_folder("qwen3_moe", 2), Mesh(tp=4))
    dry = build_reshard_report(plan)
    assert [view.title for view in dry.views] == ["in the source", "planned for the result"]
    assert (dry.ok, list(dry.timings)) == (None, ["planning"])
    done = build_reshard_report(plan, execute_reshard(plan, tmp_path / "out"))
    assert [len(view.rank_bytes) for view in done.views] == [2, 4]
    assert list(done.timings) == ["planning", "copying", "syncing"]
    assert (done.ok, len(done.digests)) == (True, 36)
    check_harmless(read(render_report(done)))
    from_hub = build_reshard_report(plan_reshard(hub_folder("qwen3_moe"), Mesh(tp=2)))
    assert [view.title for view in from_hub.views] == ["planned for the result"]


def test_the_report_of_a_validation(rank_folder):
    part = {"checked": 36, "mismatches": []}
    wrong = {"name": "model.norm.weight", "rank": 1, "expected": "digest 1", "found": "digest 2"}
    checks = {"structure": part, "content": part, "skipped": {"backward": "not asked for"}, "failed": {}}
    answer = {"ok": True, "verdict": "proven", "world_size": 2, **checks, "unexercised": []}
    found = inspect_checkpoint(rank_folder("qwen3_moe", 2))
    good = build_validation_report(found, answer)
    assert (good.ok, good.facts["structure"]) == (True, "checked 36")
    assert [one.severity for one in good.findings] == ["note"]
    bad = build_validation_report(found, {**answer, "ok": False, "content": {"checked": 36, "mismatches": [wrong]}})
    assert bad.findings[0].text == "content on rank 1: expected digest 1, found digest 2"
    assert "✗ not ok" in render_report(bad)
    gap = {"name": "model.vision.weight", "reason": "no gradient", "ranks": [1], "allowed": False}
    partly = build_validation_report(
        found, {**answer, "ok": False, "verdict": "not fully proven", "unexercised": [gap]}
    )
    assert partly.title.endswith(": not fully proven")
    assert (partly.findings[0].severity, partly.findings[0].subject) == ("warning", gap["name"])
    assert "not exercised on rank 1: no gradient" in render_report(partly)
    failed = build_validation_report(found, {**answer, "ok": False, "failed": {"forward": "rank 0: IndexError"}})
    assert "the model did not run: rank 0: IndexError" in render_report(failed)
