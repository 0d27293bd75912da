"""Sweeps, analysis and reports."""

import html.parser
import json
import shutil

import pytest
import torch
from torch import nn

import bnfast
from bnfast import analysis, paper, results, sweep
from bnfast.cli import main
from bnfast.models import create
from bnfast.recipes import TrainConfig
from bnfast.training import train

FILE = """
[options]
data = "fake"
epochs = 2
analyse = true
compare = "steps"

[[runs]]
model = ["resnet8", "wrn8_2"]
seed = [0, 1]

[[runs]]
model = "resnet8"
config = ["all", "random2"]

[[runs]]
model = "resnet8"
convert = false
"""
NAMES = [
    "resnet8-bn-seed0",
    "resnet8-bn-seed1",
    "wrn8_2-bn-seed0",
    "wrn8_2-bn-seed1",
    "resnet8-all-seed0",
    "resnet8-random2-seed0",
    "resnet8-bn-convert=False-seed0",
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture
def sweep_file(tmp_path):
    path = tmp_path / "file.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs of a sweep in the test's process: starting one of its own takes seconds."""

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            self.target, self.args = target, args

        def start(self):
            try:
                self.target(*self.args)
            except SystemExit:
                self.exitcode = 1

        def join(self):
            pass

    class Context:
        pass

    Context.Process = Process
    monkeypatch.setattr("multiprocessing.get_context", lambda method: Context)


def test_a_sweep_file_is_every_combination(sweep_file):
    planned = sweep.read(sweep_file)
    assert [run.name for run in planned] == NAMES
    assert [run.config.model for run in planned[:4]] == ["resnet8", "resnet8", "wrn8_2", "wrn8_2"]
    assert [run.config.convert for run in planned] == [True] * 6 + [False]
    assert all(run.config.epochs == 2 for run in planned)


def test_the_committed_sweep_files_can_be_read(request):
    for path in (request.config.rootpath / "experiments").glob("*.toml"):
        planned = sweep.read(path)
        assert len({run.name for run in planned}) == len(planned) > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = [", "is no TOML"),
        ("[options]\nlr = 1.0", r"must hold \[options\] and \[\[runs\]\]"),
        ("[other]\n[[runs]]\nseed = 1", "not other"),
        ("[[runs]]\nspeed = 1", "no option 'speed'"),
        ("[[runs]]\nseed = [1, 1]", "names the run 'resnet14-bn-seed1' twice"),
        ("[[runs]]\nout = 'x'", "out is for the sweep to say"),
        ("[[runs]]\nlr = -1.0", "lr must be a finite number and not negative"),
    ],
)
def test_sweep_files_that_make_no_sense(tmp_path, content, message):
    (tmp_path / "file.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        sweep.read(tmp_path / "file.toml")


def test_a_sweep_runs_what_is_left_and_its_report_shows_all(
    tmp_path, capsys, sweep_file, in_this_process
):
    assert main(["sweep", str(sweep_file), "--quiet"]) == 0
    first = capsys.readouterr().out
    assert first.count("starts") == 7 and "all 7 runs are finished" in first
    folder = tmp_path / "runs" / "file"
    before = {name: (folder / name / "result.json").read_bytes() for name in NAMES}
    shutil.rmtree(folder / NAMES[2])
    (folder / NAMES[4] / "result.json").unlink()
    assert main(["sweep", str(sweep_file), "--list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("finished") == 5 and "to do" in listed and "begun" in listed
    assert main(["sweep", str(sweep_file), "--quiet"]) == 0
    again = capsys.readouterr().out
    assert again.count("finished, test accuracy") == 5
    assert "[3/7] wrn8_2-bn-seed0: starts" in again and "[5/7] resnet8-all-seed0: goes on" in again
    unchanged = [n for n in NAMES if (folder / n / "result.json").read_bytes() == before[n]]
    assert len(unchanged) == 5

    sweep_file.write_text(FILE.replace("epochs = 2", "epochs = 3"))
    assert main(["sweep", str(sweep_file)]) == 2
    assert "holds a run with epochs 2, not 3" in capsys.readouterr().err

    assert main(["report", str(folder)]) == 0
    page = (folder / "report" / "report.html").read_text()
    check_page(page)
    for wanted in ("holds", "random weights per channel: 2", "plain PyTorch", "&lt; 0.01"):
        assert wanted in page
    pictures = sorted(path.stem for path in (folder / "report" / "plots").iterdir())
    assert pictures == [
        "accuracy",
        "betas",
        "clamped",
        "curves",
        "dead_relus",
        "gammas",
        "small_gammas",
    ]
    assert page.count("data:image/png;base64,") == 7

    # From the small files that a report keeps it can be rendered again, and a second report does not count the first.
    assert (
        main(["report", str(folder / "report" / "records"), "--output", str(tmp_path / "again")])
        == 0
    )
    assert (tmp_path / "again" / "report.html").read_text() == page
    assert main(["report", str(folder)]) == 0
    assert (folder / "report" / "report.html").read_text() == page

    # What only a person can tell; and runs whose times are not to be compared.
    result = folder / NAMES[3] / "result.json"
    other = json.loads(result.read_text()) | {"machine": "1st of all, 1 threads"}
    result.write_text(json.dumps(other))
    assert main(["report", str(folder), "--note", "Beside <other> work."]) == 0
    told = (folder / "report" / "report.html").read_text()
    check_page(told)
    assert "<p>Beside &lt;other&gt; work.</p>" in told and "(1) 1st of all, 1 threads" in told
    assert f"{NAMES[3]} (1)" in told and f"{NAMES[0]} (2)" in told


def test_runs_by_other_recipes_or_data_are_apart(tmp_path, capsys):
    for name, options in {"a": {}, "b": {"epochs": 2}, "c": {"seed": 1}}.items():
        train(
            TrainConfig("resnet8", "fake", progress=False, out=tmp_path / "runs" / name, **options)
        )
    assert main(["report", "runs", "--output", "page"]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    check_page(page)
    assert page.count("<section>") == 2
    assert "2 runs on fake: 1 epoch," in page and "1 run on fake: 2 epochs," in page
    names = {path.name for path in (tmp_path / "page" / "plots").iterdir()}
    assert {"1-accuracy.png", "2-accuracy.png"} <= names


def check_page(page):
    """Well-formed, and nothing is loaded from elsewhere."""
    opened = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            values = dict(attributes)
            assert values.get("src", "data:").startswith("data:") and "href" not in values
            if tag not in ("meta", "img", "br"):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Parser().feed(page)
    assert not opened


def test_a_run_that_fails_does_not_stop_the_sweep(tmp_path, capsys, in_this_process):
    content = '[options]\ndata = "fake"\nmodel = "resnet8"\n[[runs]]\ninit_beta = [3e38, 0.0]'
    (tmp_path / "file.toml").write_text(content)
    assert main(["sweep", "file.toml", "--quiet"]) == 1
    printed = capsys.readouterr()
    assert "1 of 2 runs failed: resnet8-bn-init_beta=3e+38-seed0" in printed.err
    assert "[2/2] resnet8-bn-init_beta=0.0-seed0: " in printed.out


def test_a_sweep_in_processes_of_its_own(tmp_path, capsys):
    content = '[options]\ndata = "fake"\n[[runs]]\nmodel = "resnet8"'
    (tmp_path / "file.toml").write_text(content)
    assert main(["sweep", "file.toml", "--quiet", "--out", "elsewhere"]) == 0
    assert (tmp_path / "elsewhere" / "resnet8-bn-seed0" / "result.json").exists()


def test_reports_of_nothing(tmp_path, capsys, monkeypatch):
    assert main(["report", "nowhere"]) == 2
    assert "no folder 'nowhere'" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", "empty"]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    train(TrainConfig("resnet8", "fake", progress=False, out="run"))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["report", "run"]) == 2
    assert "pip install 'bnfast[report]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report").exists()
    (tmp_path / "run" / "result.json").write_text("{")
    assert main(["report", "run"]) == 2
    assert "is damaged" in capsys.readouterr().err


# ---- claims ----------------------------------------------------------------------------------------------------------


def group(model, config, *accuracies, small=0.2):
    """A group as it would be read from files, with one seed per accuracy."""
    options = TrainConfig(model, "fake", config).resolved().decides()
    runs = [
        results.RunRecord(
            f"{model}-{config}-{seed}",
            {"options": options | {"seed": seed}, "test_accuracy": accuracy / 100},
            {"small_gammas": {"0.01": [("bn", round(100 * small), 100)]}},
            [],
        )
        for seed, accuracy in enumerate(accuracies)
    ]
    return results.Group(tuple(runs))


def verdicts(*groups):
    found = results.claims(list(groups))
    words = ("depth", "width", "random", "everything is", "untrained", "Shortcuts", "near 0")
    assert all(word in claim.text for word, claim in zip(words, found, strict=True))
    return [claim.holds for claim in found]


def test_claims_hold_or_do_not():
    bn = group("resnet14", "bn", 48, 50)
    assert verdicts(bn) == [None] * 7
    ordered = [
        bn,
        group("resnet32", "bn", 57),
        group("wrn14_2", "bn", 53),
        group("resnet14", "random2", 20, 30),
        group("resnet14", "all", 90, small=0.1),
        group("resnet14", "none", 10),
        group("resnet14", "bn+shortcut+output", 63),
    ]
    assert verdicts(*ordered) == [True] * 7
    upset = [
        bn,
        group("resnet32", "bn", 49),
        group("wrn14_2", "bn", 40),
        group("resnet14", "random2", 20, 44),
        group("resnet14", "all", 90, 49, small=0.3),
        group("resnet14", "none", 48),
        group("resnet14", "bn+shortcut+output", 49),
    ]
    assert verdicts(*upset) == [False] * 7


def test_the_papers_figures_stand_beside_their_runs_alone():
    assert group("resnet14", "bn", 1).paper() == (48.1, "hidden")
    assert group("wrn14_4", "all", 1).paper() == (94.1, "figure")
    assert group("resnet866", "bn", 1).paper() == (82.0, "abstract")
    assert group("resnet14", "random2", 1).paper() is None
    assert group("resnet20", "bn", 1).paper() is None
    assert all(figure.tag in paper.TAGS for figure in paper.ACCURACY.values())


@pytest.mark.parametrize("model", paper.BATCHNORM_PARAMETERS)
def test_batchnorm_parameters_of_the_papers_networks(model):
    with torch.device("meta"):
        assert bnfast.models.count_parameters(create(model)).bn == paper.BATCHNORM_PARAMETERS[model]


# ---- analysis --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["plain", "converted"])
def model(request):
    model = create("resnet8")
    with torch.no_grad():
        model.bn.weight[:4] = torch.tensor([0.0, -0.004, 0.02, -0.02])
        model.bn.weight[4:] = 1.0
        model.segments[0][0].bn1.weight[:8] = 0.0
        model.segments[0][0].bn1.bias[:8] = -1.0
    return bnfast.convert(model) if request.param else model


@pytest.fixture
def loader():
    gen = torch.Generator().manual_seed(1)
    images = torch.randn(24, 3, 16, 16, generator=gen)
    labels = torch.randint(10, (24,), generator=gen)
    return list(zip(images.split(10), labels.split(10), strict=True))


def test_small_gammas_are_counted_per_layer(model):
    shares = analysis.small_gamma_share(model, 0.01)
    assert shares[0] == ("bn", 2, 16) and shares[0].share == 0.125
    by_layer = {share.layer: share for share in shares}
    assert len(shares) == 9 and by_layer["segments.0.0.bn1"].count >= 8
    assert analysis.small_gamma_share(model, 0.1)[0].count == 4


def test_dead_relus_are_those_that_never_fire(model, loader):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kind = type(model.bn)
    shares = {
        layer: (count, total) for layer, count, total in analysis.dead_relu_share(model, loader)
    }
    assert shares["segments.0.0.relu"] == (8, 16)  # gamma 0 and beta -1
    assert shares["segments.2.0.relu#2"][1] == 64 and len(shares) == 7
    assert shares["relu"] == (1, 16)  # gamma 0 and beta 0
    assert type(model.bn) is kind
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_channel_that_fires_once_is_alive():
    images = torch.full((3, 2, 4, 4), -1.0)
    images[0, 0, 2, 1] = 0.5
    batches = [(image[None], torch.zeros(1)) for image in images]
    assert analysis.dead_relu_share(nn.Sequential(nn.ReLU()), batches) == [("0", 1, 2)]


def test_zeroing_small_gammas(model, loader):
    # The model's own answers as labels, so that it is right about all of them.
    for _ in range(40):
        model.train()(torch.cat([x for x, _ in loader]))
    model.eval()
    loader = [(x, model(x).argmax(1)) for x, _ in loader]
    assert len(set(torch.cat([y for _, y in loader]).tolist())) > 1
    rows = analysis.accuracy_without_small_gammas(model, loader, (0.01, 2.0))
    total = sum(len(gamma) for gamma in analysis.gammas(model).values())
    assert [row.threshold for row in rows] == [0.0, 0.01, 2.0]
    assert rows[0].zeroed == 0 and rows[2].zeroed == 1
    small = sum(share.count for share in analysis.small_gamma_share(model, 0.01))
    assert rows[1].zeroed == pytest.approx(small / total)
    assert rows[0].accuracy == 1
    # Without any gamma all images look the same: one class.
    constant = max(sum(int((y == label).sum()) for _, y in loader) for label in range(10))
    assert rows[2].accuracy <= constant / 24 < 1
    assert model.bn.weight[2].item() == pytest.approx(0.02)


def test_histograms_count_everything(model):
    counts, edges = analysis.histogram(analysis.gammas(model), bins=7)
    assert sum(counts) == 336 and len(edges) == 8
    assert edges[0] == pytest.approx(-0.02) and edges[-1] == pytest.approx(1.0, abs=0.01)


def test_the_analysis_is_plain_values(model, loader):
    values = analysis.analyse(model, loader)
    assert json.loads(json.dumps(values))["clamped"][0][:2] == [0.0, 0.0]
    assert set(values) == {"gamma", "beta", "small_gammas", "dead_relus", "clamped"}
    assert analysis.analyse(nn.Sequential(nn.Conv2d(3, 10, 1)), loader) == {}
