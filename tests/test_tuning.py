"""The table of measured choices: what is recorded, measured, written, read, and refused; and that a choice is followed both ways."""

import json
import warnings

import pytest
import torch
from torch import nn

import bnfast
from bnfast import dispatch, dot, native, pointwise, tuning, winograd
from bnfast.cli import main

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The path of a table that is not there yet, and in force."""
    file = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("BNFAST_TUNING", str(file))
    for form in (winograd, pointwise, dot):
        monkeypatch.setattr(form, "mode", "")
    if native.cpu_capability() == "baseline":  # whose fixed rules have one way alone
        monkeypatch.setattr(native, "_capability", "avx2")
    tuning._refresh()
    yield file
    monkeypatch.undo()
    tuning._refresh()


def net() -> nn.Module:
    """One convolution of each kind that has a choice, and two that have none."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
    )  # fmt: skip


def images() -> torch.Tensor:
    return torch.randn(2, 3, 17, 17).contiguous(memory_format=torch.channels_last)


def forms(model: nn.Module) -> dict[str, set[str]]:
    """By path: the kinds of weights that are kept after one step from an empty cache."""
    bnfast.clear_cache()
    y = model(images())
    y.backward(torch.randn_like(y))
    return {entry.name: set(entry.forms) for entry in bnfast.explain(model).kept}


def rewritten(file, way_of) -> None:
    content = json.loads(file.read_text())
    for entry in content["entries"]:
        for row in entry["rows"]:
            row["way"] = way_of(row)
    file.write_text(json.dumps(content))
    tuning._refresh()


@pytest.mark.skipif(
    native.cpu_capability() not in ("avx512_bf16", "amx"),
    reason="the processor does not multiply bfloat16, or is not to",
)
def test_bfloat16_has_a_third_way(table):
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        forms(bnfast.convert(model))
    rows = bnfast.tune(model, images(), autocast=torch.bfloat16, rounds=1)
    assert [(row.shape.weight[:2], set(row.seconds)) for row in rows] == [
        ((32, 16), {"dot", "direct"}),
        ((24, 32), {"winograd", "dot", "direct"}),
    ]
    converted = bnfast.convert(model)
    for way, form in (("winograd", "winograd"), ("dot", "dot"), ("direct", "packed")):
        rewritten(table, lambda row, way=way: way if way in row["seconds"] else "dot")
        with torch.autocast("cpu", torch.bfloat16):
            kept = forms(converted)
        assert kept["6"] == {form}
        assert kept["3"] == {"packed" if way == "direct" else "dot"}


def test_tune_writes_what_later_steps_follow(table):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines = []
    rows = bnfast.tune(model, images(), rounds=1, say=lines.append)
    assert [(row.shape.weight[:2], set(row.seconds)) for row in rows] == [
        ((32, 16), {"product", "direct"}),
        ((24, 32), {"winograd", "direct"}),
    ]
    assert len(lines) == 2 and lines[0].startswith("cpu float32 16 -> 32, 1x1 stride 1x1, 8x8: ")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the model is not the tuner's to change"
    assert tuning.is_active and f"2 convolutions in {table}" == tuning.state()

    converted = bnfast.convert(model)
    rewritten(table, lambda row: "direct")
    direct = forms(converted)
    assert direct["3"] == {"packed"} and direct["6"] == {"packed"}
    rewritten(table, lambda row: "product" if row["shape"][2][2] == 1 else "winograd")
    ours = forms(converted)
    assert ours["3"] == {"pointwise"} and ours["6"] == {"winograd"}


def test_every_way_gives_the_same_results(table):
    model = bnfast.convert(net()).double().float()
    bnfast.tune(model, images(), rounds=1)
    x, results = images(), []
    for way in ("direct", "ours"):
        rewritten(
            table,
            lambda row, way=way: (
                way if way == "direct" else "product" if row["shape"][2][2] == 1 else "winograd"
            ),
        )
        torch.manual_seed(0)
        y = model(x)
        y.backward(torch.randn_like(y))
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * (1 + b.abs().max()))


def test_the_environment_comes_first(table, monkeypatch):
    model = bnfast.convert(net())
    bnfast.tune(model, images(), rounds=1)
    rewritten(table, lambda row: "direct")
    monkeypatch.setattr(winograd, "mode", "1")
    assert forms(model)["6"] == {"winograd"}
    rewritten(table, lambda row: "product" if row["shape"][2][2] == 1 else "winograd")
    monkeypatch.setattr(winograd, "mode", "0")
    assert forms(model)["6"] == {"packed"}


def test_a_way_has_to_gain(table, monkeypatch):
    """The fixed rule's way stays where another is within 3 %."""
    clock = iter([0.0])
    now = [0.0]
    per_way = {"winograd": 1.0, "product": 1.0, "direct": 0.98}

    def counted():
        now[0] += next(clock, 0) + per_way.get(tuning._state.forced, 0) / 2
        return now[0]

    monkeypatch.setattr(tuning.time, "perf_counter", counted)
    rows = bnfast.tune(net(), images(), rounds=2)
    assert [row.way for row in rows] == ["product", "winograd"]
    per_way["direct"] = 0.9
    assert [row.way for row in bnfast.tune(net(), images(), rounds=2)] == ["direct", "direct"]
    assert len(json.loads(table.read_text())["entries"][0]["rows"]) == 2, (
        "measured again, not twice"
    )


@pytest.mark.parametrize("change", ["threads", "versions", "device"])
def test_a_table_of_another_machine_or_version_does_not_count(table, change):
    bnfast.tune(net(), images(), rounds=1)
    content = json.loads(table.read_text())
    entry = content["entries"][0]
    entry[change] = {"threads": 99, "versions": {"bnfast": "0"}, "device": "another"}[change]
    for row in entry["rows"]:
        row["way"] = "direct"
    table.write_text(json.dumps(content))
    tuning._refresh()
    assert forms(bnfast.convert(net()))["6"] == {"winograd"}
    bnfast.tune(net(), images(), rounds=1)
    assert len(json.loads(table.read_text())["entries"]) == 2, "the other's rows stay"


@pytest.mark.parametrize(
    "content, why",
    [
        ("{", "cannot be read"),
        ("[]", "is no tuning table"),
        ('{"format": 9}', "is no tuning table"),
        ('{"format": 1, "entries": [{"device": "x"}]}', "is damaged"),
        (
            '{"format": 1, "entries": [{"device": "x", "threads": 1, "versions": {}, "rows": '
            '[{"shape": ["cpu", "float32", [1, 1, 1, 1], [1, 1], [8, 8]], "way": "magic"}]}]}',
            "magic",
        ),
    ],
)
def test_a_damaged_table_is_named_and_left(table, content, why):
    table.parent.mkdir()
    table.write_text(content)
    tuning._refresh()
    with pytest.warns(UserWarning, match=why):
        forms(bnfast.convert(net()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forms(bnfast.convert(net()))  # said once
    assert why in tuning.state()
    with pytest.raises(ValueError, match=why):
        bnfast.tune(net(), images(), rounds=1)
    assert table.read_text() == content


def test_bad_arguments(table, monkeypatch):
    with pytest.raises(ValueError, match=r"x is torch.float32 of shape \(3, 8\)"):
        bnfast.tune(net(), torch.randn(3, 8))
    with pytest.raises(ValueError, match="rounds is 0"):
        bnfast.tune(net(), images(), rounds=0)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        bnfast.tune(net(), images(), backend="fast")
    monkeypatch.setenv("BNFAST_TUNING", "0")
    with pytest.raises(ValueError, match="there is no table to write to"):
        bnfast.tune(net(), images())
    assert not table.parent.exists()


def test_a_folder_that_is_not_ours_is_no_error(tmp_path, monkeypatch):
    """Not at the import, nor at a step: no home, or one that may not be looked into."""
    monkeypatch.delenv("BNFAST_TUNING")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuning.Path, "home", homeless)
    tuning._refresh()
    assert not tuning.is_active and tuning.path() is None
    assert tuning.state().startswith("none")

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tuning.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(tuning.Path, "is_file", forbidden)
    tuning._refresh()
    assert not tuning.is_active
    monkeypatch.undo()
    tuning._refresh()


def test_another_spelling_of_the_path_is_the_same_table(table, monkeypatch):
    bnfast.tune(net(), images(), rounds=1)
    rewritten(table, lambda row: "direct")
    model = bnfast.convert(net())
    assert forms(model)["6"] == {"packed"}
    monkeypatch.chdir(table.parent.parent)
    per_way = {"winograd": 1.0, "product": 1.0, "direct": 5.0}
    now = [0.0]

    def counted():
        now[0] += per_way.get(tuning._state.forced, 0) / 2
        return now[0]

    monkeypatch.setattr(tuning.time, "perf_counter", counted)
    bnfast.tune(net(), images(), rounds=1, file="cache/tuning.json")
    assert forms(model)["6"] == {"winograd"}


def test_without_a_table_nobody_asks(table, monkeypatch):
    monkeypatch.setattr(tuning, "choice", None)
    assert not tuning.is_active
    forms(bnfast.convert(net()))


def test_command(table, capsys):
    options = ["--batch", "2", "--size", "12", "--rounds", "1"]
    assert main(["tune", "--model", "resnet8", *options]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"6 convolutions in {table}" and len(out) == 7
    assert main(["doctor"]) == 0
    assert f"6 convolutions in {table}" in capsys.readouterr().out
    assert main(["tune", "--model", "resnet8", "--rounds", "0"]) == 2
    assert "--rounds is 0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["tune", "--model", "resnet8", "--device", "cuda"]) == 2
        assert "PyTorch sees no GPU" in capsys.readouterr().err


@pytest.mark.skipif(
    dispatch.backends()["triton"] is not True, reason=str(dispatch.backends()["triton"])
)
def test_triton_follows_the_table(table, monkeypatch):
    conv = dispatch.module("triton").conv
    monkeypatch.setattr(conv, "route", None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = bnfast.convert(net()[3:9], backend="triton").to(device)
    x = torch.randn(1, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    rows = bnfast.tune(model, x, backend="triton", rounds=1)
    assert [set(row.seconds) for row in rows] == [{"cudnn", "fused"}] * 2
    launched = []
    for name in ("launch_conv", "launch_dgrad"):
        original = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *a, f=original, n=name: launched.append(n) or f(*a))
    for way, expected in (("cudnn", []), ("fused", ["launch_conv"] * 2 + ["launch_dgrad"])):
        rewritten(table, lambda row, way=way: way)
        launched.clear()
        y = model(x)
        y.backward(torch.randn_like(y))
        assert launched == expected
