"""The report: what stands on the page, what does not, and that nobody's words act on it."""

import itertools
import re

import numpy as np
import pytest
from report_cases import Page, manifest, measured

from fst_fast.measure import report
from fst_fast.measure.report import svg
from fst_fast.measure.report.manifest import parse
from fst_fast.measure.report.page import render
from fst_fast.measure.report.text import interval

pytest.importorskip("matplotlib")

MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"


def page(raw=None, found=None, names=None):
    source = render(parse(raw or manifest()), found, names)
    return source, Page(source)


@pytest.fixture(scope="module")
def full():
    return page(manifest(), measured(), ["ant", "bee", "cat", "dog"])


@pytest.fixture(scope="module")
def bare():
    return page()


def test_everything_of_the_run_is_there(full):
    _, read = full
    settings = dict(read.tables["Settings of the run"])
    assert settings == {"method": "fst", "alpha": "0.07", "epochs": "3", "seed": "31", "head": "fc"}
    origin = dict(read.tables["Files and origin"])
    assert origin["parent.sha256"] == "ab12" * 16
    assert origin["sha256"] == "cd34" * 16
    assert dict(read.tables["Versions"]) == {"torch": "2.99.1", "python": "3.14.7"}
    assert dict(read.tables["Settings of the measurement"])["trigger.size"] == "2"
    assert "3 epochs in 4.3 s" in read.text
    epochs = read.tables["Every epoch"]
    assert epochs[1] == ["1", "1.25", "50.0 %", "0.01", "0.000", "2.5", "0.0"]
    assert epochs[3] == ["3", "0.748", "74.6 %", "0.003333", f"{MINUS}0.210", "2.5", "1.4"]


def test_numbers_of_each_class(full):
    _, read = full
    found, shift = measured(), manifest()["head_shift"]
    for k, name in enumerate(["ant", "bee", "cat", "dog"]):
        own = found.after.labels == k
        before, after = (
            100 * np.mean(o.clean[own] == k).item() for o in (found.before, found.after)
        )
        taken = [
            f"{100 * np.mean(o.triggered[own] == 1):.1f} %" for o in (found.before, found.after)
        ]
        row = read.tables["Every class"][k + 1]
        ratio = shift["class_norms"][k] / shift["class_original_norms"][k]
        assert row == [
            *(str(k), f"{name} target" if k == 1 else name, str(own.sum())),
            *(f"{before:.1f} %", f"{after:.1f} %"),
            f"{after - before:+.1f}".replace("-", MINUS) if after != before else "0.0",
            *((NOTHING, NOTHING) if k == 1 else taken),
            f"{shift['class_cosines'][k]:.2f}".replace("-", MINUS),
            f"{ratio:.2f}",
        ]


def test_confusion(full):
    _, read = full
    rows = read.tables["The purified model"]
    found = measured().after
    for k, name in enumerate(["ant", "bee", "cat", "dog"]):
        counts = [int(np.sum((found.labels == k) & (found.clean == j))) for j in range(4)]
        assert rows[k + 1] == [f"{name} {k}", *(str(n or "") for n in counts)]


def test_attack_in_words(full):
    _, read = full
    found = measured().after
    others = found.labels != 1
    taken, total = int(np.sum(found.triggered[others] == 1)), int(others.sum())
    assert f"it takes {taken} of {total} images of other classes for the target class bee" in (
        read.text
    )
    assert f"attack success {100 * taken / total:.1f} %" in read.text
    right = int(np.sum(found.triggered[others] == found.labels[others]))
    assert f"{100 * right / total:.1f} % as their label (robust accuracy)" in read.text
    assert "Another pattern, place, strength or target may still succeed" in read.text
    assert "not measured" not in read.text


def test_interval():
    # Agresti & Coull 1998: Wilson's interval of 9 in 10.
    assert interval(9, 10) == pytest.approx((0.596, 0.982), abs=5e-4)
    assert interval(0, 360)[0] == 0


def test_without_a_trigger_nothing_is_claimed():
    _, read = page(manifest(), measured(trigger=False, suspect=False))
    assert "Attack success was not measured: no trigger was given" in read.text
    assert "The suspect model was not measured" in read.text
    assert "Taken for target" not in read.text
    assert not re.search(r"(is|model|now) (clean|safe)\b|backdoor (was|is) removed", read.text)


def test_from_the_manifest_alone(bare):
    _, read = bare
    assert "Attack success was not measured: no trigger was given" in read.text
    assert "Not measured: no test images were given" in read.text
    assert len(read.tables["Every class"]) == 5
    assert "The purified model" not in read.tables


def test_old_and_stopped_runs():
    raw = manifest(stopped="interrupted at epoch 1, step 3", history=[])
    raw["head_shift"] = {"cosine": 0.5, "norm": 1.0, "original_norm": 1.0}
    _, read = page(raw)
    assert "The run ended early: interrupted at epoch 1, step 3" in read.text
    assert "No epoch was finished" in read.text
    assert "not recorded in this manifest" in read.text


def test_many_classes_are_cut_to_those_that_changed():
    source, read = page(manifest(classes=700), measured(classes=700, images=4000))
    rows = read.tables["200 of 700 classes, those that changed most"]
    assert len(rows) == 201
    assert "1" in [row[0] for row in rows]
    assert len(read.tables["The purified model's commonest confusions"]) == 21
    assert len(source) < 1_000_000


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</svg></style><script>alert(1)</script>",
    "$x^{$ \\frac{ {{ 7*7 }} {% raw %}\x00\u202e\ud800" + "a" * 5000,
]


def test_foreign_words_are_inert():
    raw = manifest(
        stopped=HOSTILE[0],
        payload=HOSTILE[1],
        parent={"path": HOSTILE[2], HOSTILE[0]: HOSTILE[3]},
        clean_accuracy={"before": 0.9, "after": 0.8, "measured_on": HOSTILE[0]},
        versions={HOSTILE[1]: HOSTILE[2]},
        data={"classes": HOSTILE},
    )
    raw["settings"] |= {HOSTILE[0]: HOSTILE[1], "method": HOSTILE[2], "list": HOSTILE}
    found = measured()
    found.trigger.update({"name": HOSTILE[0], HOSTILE[1]: HOSTILE[2]})
    for parts, given in ((None, None), (found, HOSTILE)):
        source, read = page(raw, parts, given)
        assert read.wrong == []
        assert {tag for tag, _ in read.elements}.isdisjoint({"script", "iframe", "object"})
        for tag, attributes in read.elements:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
        assert "<script>alert(1)</script>" in read.text
        assert not re.search("[\x00\u202a-\u202e\ud800-\udfff]", source)
        assert "{{ 7*7 }}" in read.text
        assert len(source) < 300_000


@pytest.mark.parametrize("name", ["full", "bare"])
def test_the_page_needs_nothing_else(name, request):
    source, read = request.getfixturevalue(name)
    assert "://" not in source
    for _, attributes in read.elements:
        for attribute in ("src", "href", "xlink:href", "style", "clip-path"):
            value = attributes.get(attribute) or ""
            assert re.fullmatch(r"(data:image/png;base64,.*|#.*)?", value) or (
                attribute in ("style", "clip-path") and "url(" not in value.replace("url(#", "")
            )
    assert "default-src 'none'" in source
    assert "@import" not in source
    assert "url(" not in source.replace("url(#", "")
    assert len(source.encode()) < 1_000_000


@pytest.mark.parametrize("name", ["full", "bare"])
def test_the_page_is_sound_and_accessible(name, request):
    source, read = request.getfixturevalue(name)
    assert read.wrong == []
    ids = re.findall(r'\sid="([^"]*)"', source)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]*)', source)
    assert references
    assert set(references) <= set(ids)
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    tags = [tag for tag, _ in read.elements]
    assert tags.count("table") == tags.count("caption") > 0
    for tag, attributes in read.elements:
        if tag == "html":
            assert attributes["lang"] == "en"
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "img":
            assert attributes["alt"]


def colours(scheme):
    css = (report.page.FOLDER / "page.css").read_text()
    block = css.split("prefers-color-scheme: dark")[scheme == "dark"]
    return dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block.partition("* {")[0]))


def luminance(colour):
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(scheme):
    named = colours(scheme)
    for ink in ("ink", "muted", "before", "after", "wrong"):
        for paper in ("paper", "raised"):
            light, dark = sorted((luminance(named[ink]), luminance(named[paper])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([], "settings, history and head_shift"),
        ({"history": 3}, "list of epochs"),
        ({"history": [{"loss": "x"}]}, "number or null as loss"),
        ({"settings": "x"}, "named values as settings"),
        ({"head_shift": {"class_cosines": [1.0], "class_norms": []}}, "one cosine and two norms"),
        ({"head_shift": {"class_cosines": "abc"}}, "list as class_cosines"),
        ({"head_shift": {"cosine": True}}, "number or null as cosine"),
    ],
)
def test_other_manifests_are_refused(change, words, tmp_path):
    raw = manifest(**change) if isinstance(change, dict) else change
    with pytest.raises(ValueError, match=words):
        report.write(tmp_path / "x.html", raw)
    assert list(tmp_path.iterdir()) == []


def test_numbers_no_number_can_hold():
    raw = manifest()
    raw["history"][0] |= {"loss": float("nan"), "norm": 10**400, "lr": float("inf"), "cosine": None}
    raw["history"][1]["loss"] = 1e308
    _, read = page(raw)
    assert read.tables["Every epoch"][1] == [
        *("1", NOTHING, "50.0 %", NOTHING, NOTHING, NOTHING, "0.0")
    ]


def test_names_must_fit():
    with pytest.raises(ValueError, match="classes must name each of the 4 classes"):
        page(names=["ant", "bee"])
    # A wider model than the run's head.
    with pytest.raises(ValueError, match=r"classes in 0..1 like the run's head, got 3"):
        page(manifest(classes=2), measured(classes=4))


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    short = manifest(history=[], head_shift={})
    report.write(path, short)
    old = path.read_bytes()

    def refuse(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="full"):
        report.write(path, short | {"seconds": 9.0})
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"fst_fast\[lab\]"):
        report.check(tmp_path / "report.html")


@pytest.mark.parametrize("name", ["report.pdf", "nowhere/report.html"])
def test_paths(name, tmp_path):
    with pytest.raises(ValueError, match="report: path must"):
        report.check(tmp_path / name)


def test_every_colour_of_a_plot_follows_the_scheme(full):
    plots = re.findall(r"<svg.*?</svg>", full[0], flags=re.S)
    assert len(plots) == 8
    for plot in plots:
        assert not re.search("#[0-9a-fA-F]{6}", plot)
        assert set(re.findall(r"var\(--\w+\)", plot)) <= set(svg.COLOURS.values())
