"""What the README and the page of the studies say, against the project: links, code, rows, the table of objectives."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import templates

import data
from losses import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "tests/studies/README.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of all headings, as GitHub makes them; of equal ones the first alone."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    folder = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()) if not link.startswith("http")]
    assert len(links) > 20
    for link in links:
        name, _, anchor = link.partition("#")
        target = folder / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_example_prints_what_it_says():
    (example,) = [block for block in blocks("python") if block.startswith("from torch")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {})
    assert example.endswith(f"# {printed.getvalue()}")


def test_the_rows_are_pairs(tmp_path):
    (rows,) = blocks("json")
    (tmp_path / "mine.jsonl").write_text(rows)
    examples, report = data.load(str(tmp_path / "mine.jsonl"), templates.family("smollm2"))
    assert report.kept == len(examples) == 3 and report.dropped == {}
    assert examples[2].margin == pytest.approx(0.9 - 0.2)
    assert [e.asked for e in examples] == ["Name a metal.", "Is 91 prime?", json.loads(rows.splitlines()[2])["prompt"]]


def test_the_table_has_every_objective_in_its_docstrings_words():
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*) \|", README, re.MULTILINE))
    assert rows == {name: loss.__doc__.strip().splitlines()[0] for name, loss in OBJECTIVES.items()}
