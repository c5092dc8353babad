"""What a sweep's YAML file may say, and the words for what it may not."""

import re
import time
from pathlib import Path

import pytest
from sweep_cases import read_yaml, write_sweep, write_yaml

from fst_fast import methods
from fst_fast.cli.main import main
from fst_fast.sweep.config import normalization_of, read_config
from fst_fast.sweep.run import cells_of

PAGE = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()


def refused(path, *texts):
    with pytest.raises(ValueError, match="sweep") as caught:
        cells_of(read_config(path))
    message = str(caught.value)
    for text in (*texts, "; "):
        assert text in message, message


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"out": None}, ["out must be given, got nothing; add `out: sweep`"]),
        ({"data": None}, ["data must be given"]),
        ({"arch": None}, ["checkpoints[0].arch must be given", "add `arch: resnet18`"]),
        ({"normalize": None}, ["normalize must be given"]),
        ({"sedes": [1]}, ["sedes must be one of the keys", "did you mean seeds?"]),
        ({"xyz": 1}, ["xyz must be one of the keys", "leave it out"]),
        ({"checkpoints": []}, ["checkpoints must be a list of at least one, got []"]),
        ({"seeds": []}, ["seeds must be a list of at least one, got []"]),
        ({"methods": []}, ["methods must be a list of at least one, got []"]),
        ({"methods": "fst"}, ["methods must be a list, got the text 'fst'; write [fst]"]),
        (
            {"methods": ["fts"]},
            ["methods must be a list, each one of", "fe, fst", "did you mean ft?"],
        ),
        (
            {"methods": ["ft", "ft"]},
            ["methods must be a list with nothing twice (the text 'ft' is)"],
        ),
        ({"seeds": [1, 1]}, ["seeds must be a list with nothing twice (1 is)"]),
        ({"seeds": [-1]}, ["whole number >= 0 (number 1 is -1)"]),
        ({"seeds": [True]}, ["whole number >= 0 (number 1 is True)"]),
        ({"alphas": ["much"]}, ["alphas must be a list, each a finite number >= 0 or auto"]),
        ({"alphas": [-0.1]}, ["alphas must be a list, each a finite number >= 0 or auto"]),
        (
            {"methods": ["ft", "lp"]},
            ["alphas must be left out where no method takes one (ft, lp do not), got [0.1]"],
        ),
        (
            {"methods": ["fst", "trigger_unlearning"], "alphas": ["auto"]},
            [
                "must make different cells, got fst with alpha auto and trigger_unlearning with "
                "alpha None"
            ],
        ),
        (
            {"methods": [{"name": "d3", "lam": 2.0}], "alphas": None},
            [
                "methods[0] must be",
                "d3 has no setting lam; its own are fit, project, slack, and those of the run are "
                "epochs, lr, momentum)",
            ],
        ),
        (
            {"methods": ["ft", {"name": "d3", "fit": -1}], "alphas": None},
            ["methods[1] must be", "d3: fit must be a number >= 0, got -1"],
        ),
        (
            {"methods": [{"name": "d3", "epochs": 1.5}], "alphas": None},
            ["methods[0] must be", "epochs must be a whole number >= 1, got 1.5"],
        ),
        (
            {"methods": [{"name": "dd3"}], "alphas": None},
            ["methods[0] must be one of", "did you mean d3?"],
        ),
        (
            {"methods": [{"fit": 1.0}], "alphas": None},
            ["methods[0] must be a method's name, or a mapping with one", "add `name: d3`"],
        ),
        (
            {"methods": ["ft", {"name": "ft", "epochs": 2}], "alphas": None, "epochs": 2},
            ["must make different cells, got ft with alpha None and ft with alpha None"],
        ),
        ({"epochs": 0}, ["epochs must be a whole number >= 1, got 0"]),
        ({"epochs": 1.5}, ["epochs must be a whole number >= 1, got 1.5"]),
        (
            {"lr": "0.001"},
            ["lr must be a finite number > 0, got the text '0.001'; write it without quotes"],
        ),
        ({"lr": 0}, ["lr must be a finite number > 0, got 0"]),
        ({"lr": float("inf")}, ["lr must be a finite number > 0, got inf"]),
        ({"momentum": 1}, ["momentum must be a number in [0, 1), got 1"]),
        ({"weights": "yes"}, ["weights must be true or false, got the text 'yes'"]),
        ({"results": "xlsx"}, ["results must be one of csv, parquet, got the text 'xlsx'"]),
        ({"augment": "flip"}, ["augment must be one of none, cifar"]),
        ({"normalize": "cifar"}, ["normalize must be one of none, cifar10", "[[means]"]),
        ({"normalize": [[0.5], [0]]}, ["normalize must be one of", "each > 0"]),
        ({"normalize": [[0.5], [True]]}, ["normalize must be one of", "each > 0"]),
        ({"normalize": [["a", 0.5], [0.2, 0.2]]}, ["normalize must be one of", "write numbers"]),
        ({"arch_options": [4]}, ["arch_options must be a mapping of names to values, got [4]"]),
        (
            {"checkpoints": ["a.pt", "./a.pt"]},
            ["checkpoints must be different files, got the text './a.pt' as number 2"],
        ),
        ({"checkpoints": [3]}, ["checkpoints[0] must be a mapping of keys to values, got 3"]),
        ({"checkpoints": [{"trigger": "badnets"}]}, ["checkpoints[0].path must be given"]),
        (
            {"checkpoints": [{"path": "a.pt", "trigger": "badnet"}]},
            ["checkpoints[0].trigger must be one of adaptive", "did you mean badnets?"],
        ),
        (
            {"checkpoints": [{"path": "a.pt", "trigger": "badnets", "trigger_options": {"x": 1}}]},
            ["checkpoints[0].trigger_options must be such as fit badnets", "got {'x': 1}"],
        ),
        (
            {"checkpoints": [{"path": "a.pt", "trigger_options": {"size": 1}}]},
            ["checkpoints[0].trigger must be given"],
        ),
        (
            {"checkpoints": [{"path": "a.pt", "target": "cat"}]},
            ["checkpoints[0].target must be a whole number >= 0, got the text 'cat'"],
        ),
        ({"checkpoints": [{"path": "a.pt", "taget": 1}]}, ["checkpoints[0].taget", "mean target?"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_values_are_told(tmp_path, changes, texts):
    given = changes.get("checkpoints")
    path = write_sweep(tmp_path, 1, **{k: v for k, v in changes.items() if k != "checkpoints"})
    if given is not None:
        content = read_yaml(path)
        write_yaml(path, {**content, "checkpoints": given})
    refused(path, *texts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file must be a mapping of keys to values, got None"),
        ("- 1", "the file must be a mapping of keys to values, got [1]"),
        ("out: [", "must be YAML"),
        ("out: " + "[" * 31 + "]" * 31, "brackets nested more than 30 deep"),
        ("out: !!python/object/apply:os.system ['true']", "must be YAML"),
        ("out: a\nlr: 0.1\nout: b", "line 3: out must be given once, got it twice"),
        ("checkpoints:\n- {path: a, path: b}", "line 2: checkpoints[0].path must be given once"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, expected):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    refused(path, expected)


def test_numbers_are_read_as_yaml_1_2_has_them(tmp_path):
    path = write_sweep(tmp_path, 1)
    text = "".join(line for line in path.open() if not line.startswith(("epochs", "threads")))
    path.write_text(text + "lr: 1e-3\nmomentum: 0\nepochs: 0o17\naugment: none\n")
    config = read_config(path)
    assert (config.lr, config.momentum, config.epochs, config.augment) == (0.001, 0.0, 15, "none")


def test_all_faults_are_told_at_once_each_with_its_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "out: a\ncheckpoints:\n- a.pt\n- {path: b.pt, taget: 1}\narch: resnet18\ndata: d\n"
        "lr: 0\nseeds: [0, -1]\nalphas: [x]\nlr: 0.1\n"
    )
    with pytest.raises(ValueError, match="must have no faults, got 6") as caught:
        read_config(path)
    found = [line.split(" must ")[0] for line in str(caught.value).splitlines()[1:]]
    assert found == [
        "  line 4: checkpoints[1].taget",
        "  line 8: seeds",
        "  line 9: alphas",
        "  line 10: lr",
        "  line 10: lr",
        "  normalize",
    ]


def test_a_configuration_that_is_not_there(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 1
    assert "must be a readable file, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"data": "nowhere"}, ["data must be a folder", "nowhere"]),
        ({"test": "nowhere.npz"}, ["test must be a folder", "nowhere.npz"]),
        ({"arch": "resnet99"}, ["arch must be buildable, got 'resnet99' for s0.pt"]),
        ({"arch_options": {"wide": 1}}, ["arch must be buildable", "wide"]),
        ({"device": "cuda:77"}, ["device must be one that this machine has, got 'cuda:77'"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_it_names_is_looked_at_before_any_work(tmp_path, capsys, changes, texts):
    assert main(["sweep", str(write_sweep(tmp_path, 1, **changes))]) == 1
    message = capsys.readouterr().err
    for text in texts:
        assert text in message, message
    assert not (tmp_path / "out").exists()


def test_absent_checkpoints_and_triggers_that_do_not_fit(tmp_path, capsys):
    path = write_sweep(tmp_path, 2)
    for name, texts in {
        "s1.pt": ["checkpoints must be files, got 1 that are not there: gone.pt"],
        "size: 2": ["trigger must fit the images, got BadNets for s1.pt"],
    }.items():
        broken = tmp_path / "broken.yaml"
        other = {"s1.pt": "gone.pt", "size: 2": "size: 50"}[name]
        broken.write_text(path.read_text().replace(name, other))
        assert main(["sweep", str(broken)]) == 1
        message = capsys.readouterr().err
        for text in texts:
            assert text in message, message
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path, capsys):
    path = write_sweep(tmp_path, 1)
    (tmp_path / "out").write_text("")
    assert main(["sweep", str(path)]) == 1
    assert "out must be a folder, got the file" in capsys.readouterr().err


def test_a_checkpoint_may_differ_from_the_others(tmp_path):
    path = write_sweep(tmp_path, 1)
    content = read_yaml(path)
    other = {"path": "x y.pt", "arch": "resnet18", "arch_options": {}, "num_classes": 7}
    content["checkpoints"] = ["s0.pt", other]
    write_yaml(path, content)
    first, second = read_config(path).checkpoints
    assert (first.arch_options, first.num_classes) == ({"width": 8}, 3)
    assert (second.arch, second.arch_options, second.num_classes) == ("resnet18", {}, 7)
    assert second.name == "1-x_y"


def test_alphas_go_to_the_methods_that_take_one(tmp_path):
    path = write_sweep(tmp_path, 1, methods=["ft", "fst"], alphas=["auto", 0.2, 0])
    chosen = [cell.choice for cell in cells_of(read_config(path))]
    found = [(choice.name, choice.alpha, choice.method().name) for choice in chosen]
    assert found == [
        ("ft", None, "ft"),
        ("fst", "auto", "trigger_unlearning"),
        ("fst", 0.2, "fst"),
        ("fst", 0.0, "fst"),
    ]


def test_settings_of_a_method_stand_with_its_name(tmp_path):
    entries = [
        "d3",
        {"name": "d3", "fit": 2.0, "epochs": 3},
        {"name": "d3", "fit": 2.0},
        {"name": "anp", "lr": 0.5, "momentum": 0.5},
        {"name": "trigger_unlearning", "forms": ["mask", "wave"]},
        {"name": "fst", "alpha": 0.3},
        {"name": "fst", "project": False},
    ]
    path = write_sweep(tmp_path, 1, methods=entries, alphas=[0.1, 0.2])
    chosen = [cell.choice for cell in cells_of(read_config(path))]
    assert [(choice.method(), choice.of_run()) for choice in chosen] == [
        (methods.get("d3"), {}),
        (methods.get("d3", fit=2.0), {"epochs": 3}),
        (methods.get("d3", fit=2.0), {}),
        # A name that both have is the method's own.
        (methods.get("anp", lr=0.5), {"momentum": 0.5}),
        (methods.get("trigger_unlearning", forms=("mask", "wave")), {}),
        (methods.get("fst", alpha=0.3), {}),
        (methods.get("fst", alpha=0.1, project=False), {}),
        (methods.get("fst", alpha=0.2, project=False), {}),
    ]
    names = [cell.name for cell in cells_of(read_config(path))]
    assert len(set(names)) == len(names)


def test_settings_that_an_alpha_does_not_take_are_told(tmp_path, monkeypatch):
    """Under alpha "auto" the method is another one, which may have other settings."""
    auto = methods.METHODS["trigger_unlearning"]
    fewer = {k: v for k, v in auto.__dataclass_fields__.items() if k != "project"}
    monkeypatch.setattr(auto, "__dataclass_fields__", fewer)
    entry = {"name": "fst", "project": False}
    assert len(cells_of(read_config(write_sweep(tmp_path, 1, methods=[entry], alphas=[0.1])))) == 1
    path = write_sweep(tmp_path, 1, methods=[entry], alphas=["auto", 0.1])
    refused(path, "must take their settings under every alpha", "with alpha auto: purify: method")


def test_normalization_by_name_and_by_numbers(tmp_path):
    path = write_sweep(tmp_path, 1, normalize=[[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]])
    assert normalization_of(read_config(path).normalize) == ([0.5] * 3, [0.2] * 3)
    assert normalization_of("none") is None


def test_the_documents_example_is_a_configuration(tmp_path):
    (example,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.S | re.M)
    path = tmp_path / "sweep.yaml"
    path.write_text(example)
    assert len(cells_of(read_config(path))) == 16


@pytest.mark.parametrize(
    "text",
    [
        "[" * 20_000,
        "out: " + "[" * 5_000 + "]",
        "out: !!bool maybe",
        "out: !!int ''",
        "out: 2001-99-99",
        "\n".join(
            [
                "a: &a [x]",
                *(
                    f"{c}: &{c} [*{p}, *{p}]"
                    for p, c in zip("abcdefghijkl" * 3, "bcdefghijklm" * 3, strict=True)
                ),
            ]
        ),
    ],
    ids=["deep", "deep within", "bool", "int", "date", "aliases of aliases"],
)
def test_hostile_yaml_is_one_error(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(ValueError, match=r"^sweep: "):
        read_config(path)
    assert time.process_time() - started < 2
