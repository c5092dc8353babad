"""The documents agree with the code and the records: snippets, commands, tables, figures, links."""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import figures
import pytest
import rooms
import tables
import torch
import torchvision
from PIL import Image

import fst_fast
from fst_fast.cli.main import build_parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples/README.md"])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
OPTIONAL = {"docs/own-loop.md": ("lightning", "transformers", "accelerate")}
CLASSES = 10


def blocks(name, language):
    """(line, text) of each block of code in this language."""
    text = (ROOT / name).read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M)
    return [(text[: m.start(2)].count("\n"), m[2]) for m in found if m[1] == language]


WITH_PYTHON = [name for name in NAMES if blocks(name, "python")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A suspect and clean images as the documents have them, and runs of one short epoch.

    The stand-ins have learnt no labels, so that ``check`` would stop a run of theirs.
    """
    monkeypatch.chdir(tmp_path)
    model = torchvision.models.resnet18(num_classes=CLASSES)
    torch.save(model.state_dict(), tmp_path / "suspect.pt")
    for label in range(CLASSES):
        folder = tmp_path / "clean" / f"{label}"
        folder.mkdir(parents=True)
        for at in range(2):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{at}.png")
    purify = fst_fast.purify

    def short(model, loader, **given):
        published = {} if "method" in given else {"alpha": 0.1}
        return purify(model, loader, **{"epochs": 1, "check": False, **published, **given})

    monkeypatch.setattr(fst_fast, "purify", short)
    few = functools.partial(fst_fast.search, classes=[0, 1], forms=["mask"])
    monkeypatch.setattr(fst_fast, "search", few)
    return tmp_path


def names_of_a_reader(name):
    """What a reader has by then; only the page on searching begins without imports."""
    namespace = {"__name__": "snippets"}
    if name != "docs/search.md":
        return namespace
    images, labels = (
        torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8),
        torch.arange(40) % 10,
    )
    make = functools.partial(fst_fast.DeviceLoader, images, labels, 20)
    model = fst_fast.lab.models.resnet8(num_classes=CLASSES, width=4)
    return {**namespace, "fst_fast": fst_fast, "model": model, "loader": make(), "test": make()}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_snippets_run_in_order(name, workplace):
    for package in OPTIONAL.get(name, ()):
        pytest.importorskip(package, reason=f"{name} shows {package}")
    namespace = names_of_a_reader(name)
    for line, code in blocks(name, "python"):
        # A traceback names the document and its line.
        exec(compile("\n" * line + code, str(ROOT / name), "exec"), namespace)


def command_lines():
    for name in NAMES:
        for _, block in blocks(name, ""):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("fst-fast "):
                    yield name, line.partition(" >")[0]


@pytest.mark.parametrize(("name", "line"), list(command_lines()))
def test_command_lines_parse(name, line):
    build_parser().parse_args(line.split()[1:])


def test_tables_and_figures_are_those_of_the_records_and_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 0


def test_a_changed_figure_or_table_is_found(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    monkeypatch.setitem(tables.TABLES, "heads", lambda: "| other |")
    other = figures.FIGURES["speed"]()
    other.text(0, 0, "other")
    monkeypatch.setitem(figures.FIGURES, "speed", lambda: other)
    said = tables.main()
    assert "docs/finding-head.md" in said
    assert "docs/figures/speed.svg" in said
    assert "make figures" in said


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_small_and_says_what_it_shows(name):
    path = ROOT / "docs" / "figures" / f"{name}.svg"
    root = ElementTree.fromstring(path.read_text())
    assert path.stat().st_size < 60_000
    assert len(root.findtext("{http://www.w3.org/2000/svg}title")) > 40
    assert f"figures/{name}.svg" in "".join(path.read_text() for path in DOCUMENTS)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_version_has_one_place():
    version = fst_fast.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    first = re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert first[1] == version


def test_counts_and_rooms_are_those_of_the_code():
    readme = (ROOT / "README.md").read_text()
    assert f"one of {len(fst_fast.triggers.ZOO)} published triggers" in readme
    table = (ROOT / "docs" / "architecture.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)/` \|", table, flags=re.M)) == rooms.ROOMS


def heading_of(text):
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def links(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.S | re.M)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def dead(name, link):
    """What is wrong with a link, or None; addresses of the web are taken for right."""
    if re.match(r"[a-z]+:", link):
        return None
    target, _, anchor = link.partition("#")
    path = (ROOT / name).parent / target if target else ROOT / name
    if not path.exists():
        return f"{name}: {link} does not exist"
    if anchor:
        headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
        if anchor not in map(heading_of, headings):
            return f"{name}: {link} has no such heading"
    return None


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    assert [said for link in links(name) if (said := dead(name, link))] == []


def test_a_dead_link_is_found():
    assert dead("README.md", "docs/none.md") == "README.md: docs/none.md does not exist"
    assert "no such heading" in dead("README.md", "docs/efficacy.md#none")
    assert dead("README.md", "docs/efficacy.md#what-comes-back") is None


@pytest.mark.timeout(180)
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs mkdocstrings")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "search" / "search_index.json").exists()
    assert "purify" in (tmp_path / "api.html").read_text()
    for page in tmp_path.rglob("*.html"):
        # Reading and searching need no network.
        assert not re.findall(r"<(?:script|img|iframe)[^>]*src=.?https?:", page.read_text()), page
