"""The benches collect, their gates catch wrong results, and a micro case runs from gate to report."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import (
    cases,
    classifiers,
    engine,
    gate,
    growth,
    memory,
    peers,
    report,
    roofline,
    steps,
    timing,
)

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
MICRO = [
    "--models",
    "resnet20",
    "--batch",
    "4",
    "--size",
    "16",
    "--rounds",
    "1",
    "--warmup",
    "0",
    "--no-compile",
]


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def first_batch_norm(model: nn.Module) -> nn.BatchNorm2d:
    return next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_suites_collect():
    environment = {**os.environ, "BNFAST_BENCH_QUICK": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for case in (
        "test_step[resnet20-f32]",
        "test_phase[resnet50-f32-add+relu-C256-H56]",
        "test_memory[resnet20-bf16]",
    ):
        assert case in result.stdout


def test_units_are_read_off_the_network():
    found = cases.units("resnet50")
    kinds = [unit.kind for unit in found]
    assert (kinds.count("relu"), kinds.count("add+relu"), kinds.count("identity")) == (33, 16, 4)
    assert all(unit.conv is not None for unit in found)
    assert found[0] == cases.Unit((3, 7, 2, 1), 64, 112, 112, "relu", False)
    counts = {(row.channels, row.height, row.kind): row.count for row in cases.phases("resnet50")}
    assert sum(counts.values()) == 53
    assert counts[256, 14, "relu"] == 11 and counts[1024, 14, "add+relu"] == 6
    mobile = [unit.kind for unit in cases.units("mobilenet_v2")]
    assert (mobile.count("relu6"), mobile.count("add"), mobile.count("identity")) == (35, 10, 7)


def test_order_rotates_and_budget_ends_after_a_whole_round():
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleave(sides, rounds=3, warmup=1, device=CPU)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(values) == 3 for values in times.values())
    times = timing.interleave(sides, rounds=9, warmup=0, budget_s=0, device=CPU)
    assert all(len(values) == 1 for values in times.values())
    with pytest.raises(ValueError, match="rounds is 0"):
        timing.interleave(sides, rounds=0)


def test_micro_step_with_bnfast(capsys):
    assert steps.main(MICRO) == 0
    assert "against eager" in capsys.readouterr().out


def other_eps(model: nn.Module) -> nn.Module:
    first_batch_norm(model).eps *= 2
    return channels_last(model)


def not_a_number(model: nn.Module) -> nn.Module:
    first_batch_norm(model).bias.data[0] = float("nan")
    return channels_last(model)


def other_momentum(model: nn.Module) -> nn.Module:
    first_batch_norm(model).momentum = 0.2
    return channels_last(model)


def no_gradient(model: nn.Module) -> nn.Module:
    first_batch_norm(model).weight.requires_grad_(False)
    return channels_last(model)


@pytest.mark.parametrize("wrong", [other_eps, not_a_number, other_momentum, no_gradient])
def test_red_gate_prints_no_number(wrong, capsys):
    assert steps.main(MICRO, convert=wrong) == 1
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.startswith("resnet20-f32 batch 4 size 16: gate failed: resnet20")


@pytest.mark.parametrize(
    "network, products", [("resnet18", 1.814e9), ("resnet50", 4.089e9), ("mobilenet_v2", 0.3008e9)]
)
def test_roofline_counts_what_the_networks_are_known_for(network, products):
    convolutions = roofline.convolutions(network, 224)
    assert sum(c.products for c in convolutions) == pytest.approx(products, rel=2e-3)
    rates = roofline.Rates(flops=1e12, bytes=1e30)
    case = cases.step(network, "f32", 4)
    ideal = roofline.seconds(case, rates)
    direct = 4 * 2 * 2 * products / 1e12
    assert (
        ideal < direct if network.startswith("resnet") else ideal == pytest.approx(direct, rel=0.1)
    )
    assert roofline.seconds(case, rates, training=False) < 0.55 * ideal + 1e-3
    bound = roofline.seconds(case, roofline.Rates(flops=1e30, bytes=1e9))
    assert bound > roofline.seconds(cases.step(network, "bf16", 4), roofline.Rates(1e30, 1e9)) * 1.9


def test_engine_table(tmp_path, monkeypatch, capsys):
    """A micro row of each kind, gate to page."""
    rows = (
        engine.Row("resnet20", "f32", 2, 0.0, 1.0),
        engine.Row("resnet20", "f32", 2, 1e9, 1.0, False),
    )
    monkeypatch.setattr(engine, "ROWS", rows)
    output = tmp_path / "engine.md"
    assert engine.main(["--rounds", "1", "--no-compile", "--output", str(output)]) == 0
    lines = [line for line in output.read_text().splitlines() if line.startswith("| resnet20")]
    assert len(lines) == 2 and " *" not in lines[0] and " *" in lines[1]
    found = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert [row["id"] for row in found] == ["resnet20-f32", "resnet20-eval"]
    assert all(row["ideal"] > 0 and row["roofline"] > 0 for row in found)
    with pytest.raises(SystemExit) as error:
        engine.main(["--rows", "resnet21-f32"])
    assert error.value.code == 2
    assert "resnet21-f32" in capsys.readouterr().err


def test_growth_and_its_cliffs(tmp_path):
    points = [
        {"x": x, "seconds": {timing.OURS: s, peers.EAGER: 2 * s}}
        for x, s in ((1, 4.0), (2, 3.0), (4, 3.6), (8, 4.6))
    ]
    assert growth.cliffs(points) == ["from 4 to 8: 1.28 times"]
    assert growth.cliffs(points, power=1) == []
    output = tmp_path / "growth.md"
    options = ["--rounds", "1", "--no-compile", "--batches", "2,3", "--widths", "1"]
    growth.main([*options, "--output", str(output)])
    assert "| 3 | " in output.read_text() and "Cliffs: " in output.read_text()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads(output.with_suffix(".json").read_text())["curves"]
    assert [p["x"] for p in curves["batch"]] == [2, 3]


def test_classifiers(tmp_path, monkeypatch, capsys):
    output = tmp_path / "classifiers.md"
    options = ["--only", "resnet18", "--size", "64", "--rounds", "1", "--no-compile"]
    monkeypatch.setattr(classifiers, "LEAST", 0.0)
    assert classifiers.main([*options, "--output", str(output)]) == 0
    assert "| resnet18 | 64 | " in output.read_text()
    monkeypatch.setattr(classifiers, "LEAST", 1e9)
    assert classifiers.main(options) == 1
    assert "resnet18: " in capsys.readouterr().err


def test_other_networks_have_cases_too():
    assert cases.network("wrn20_8").source == "bnfast.models"
    assert cases.network("inception_v3").size == 299
    with pytest.raises(ValueError, match="network is 'lenet'"):
        cases.network("lenet")


def test_inference_gate_sees_a_wrong_number():
    case = cases.step("resnet20", "f32", 2)
    sides = peers.inference(case, CPU, compiled=False)
    gate.check_inference(case, sides)
    ours = sides[timing.OURS]
    sides[timing.OURS] = lambda: ours() * 1.01
    with pytest.raises(gate.GateError, match="evaluation"):
        gate.check_inference(case, sides)


def scaled_output(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    return out if out.dtype == torch.float64 else out * 1.5


def scaled_gradient(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
    if out.dtype != torch.float64 and out.requires_grad:
        out.register_hook(lambda gradient: gradient * 0.1)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("fault", [scaled_output, scaled_gradient])
def test_full_size_check_sees_a_wrong_kernel(dtype, fault):
    def wrong_in_low_precision(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(fault)
        return channels_last(model)

    case = cases.step("resnet20", dtype, batch=8, size=16)
    gate.check_model(case, CPU, wrong_in_low_precision)
    sides = peers.training_steps(case, CPU, compiled=False, convert=channels_last)
    gate.check_first_step(case, sides)
    sides = peers.training_steps(case, CPU, compiled=False, convert=wrong_in_low_precision)
    with pytest.raises(gate.GateError, match="full size"):
        gate.check_first_step(case, sides)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    "act, residual", [("relu", True), ("relu6", False), ("silu", False), ("identity", True)]
)
def test_micro_phase_gate(dtype, act, residual):
    case = cases.Phase("micro", dtype, 3, 7, 9, 5, act, residual, 1)
    data = peers.phase_data(case, CPU)
    gate.avoid_kinks(case, data)
    gate.check_phase(case, data, peers.phase_steps(case, data, compiled=False))

    def wrong(channels: int, act: str) -> nn.BatchNorm2d:
        module = peers.StockBatchNormAct(channels, act)
        module.register_forward_hook(lambda module, args, out: out * 1.02)
        return module

    with pytest.raises(gate.GateError):
        gate.check_phase(case, data, peers.phase_steps(case, data, compiled=False, make=wrong))


def test_peak_memory_is_measured():
    peak = memory.peak_bytes(lambda: torch.ones(10_000_000), CPU)
    assert peak is None or 39e6 < peak < 60e6


def entry(suite: str, ours: float, **details: object) -> dict[str, object]:
    mine, found = {"min": ours, "median": ours}, {peers.EAGER: {"min": 0.010, "median": 0.012}}
    environment = {"machine": "Some CPU, 2 threads", "torch": "2.x", "commit": "abc<def>"}
    common = {
        "suite": suite,
        "network": "resnet20",
        "dtype": "f32",
        "batch": 4,
        "size": 32,
        "environment": environment,
    }
    timed = {"ours": mine, "peers": found, **timing.compare(mine, found)}
    return {"extra_info": {**common, **timed, **details}}


def test_report_shows_wins_and_losses(tmp_path, capsys):
    phase = {"kind": "relu", "shape": [4, 16, 32, 32], "count": 3}
    entries = [
        entry(
            "step",
            0.005,
            fused=21,
            left=0,
            saved_bytes={timing.OURS: 5_000_000, peers.EAGER: 10_000_000},
        ),
        entry("phase", 0.002, **{**phase, "kind": "relu, NCHW"}),
        entry("phase", 0.020, **phase),
        entry("phase", 0.005, **{**phase, "shape": [4, 32, 16, 16], "count": 2}),
    ]
    results = tmp_path / "latest.json"
    results.write_text(json.dumps({"benchmarks": [*entries, {"extra_info": {}}]}))
    assert report.main([str(results), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Some CPU, 2 threads; torch 2.x; commit abc<def>" in text
    assert "2.00x, 2.40x" in text and "0.50x (slower)" in text
    assert "| 70.00 | 50.00 (0.71x) | 0.71x (slower) |" in text
    assert "all with an activation, NCHW" in text and "| 6.00 | 30.00 (5.00x) | 5.00x |" in text
    assert "| 1.25 | 2.50 | 0.50x | 0.50x |" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3 and "abc&lt;def&gt;" in page and "src=" not in page

    results.write_text("")
    capsys.readouterr()
    assert report.main([str(results)]) == 2
    assert "not the JSON of a finished" in capsys.readouterr().err


def test_entries_are_plain_data():
    assert dataclasses.asdict(cases.step("resnet20")) == {
        "network": "resnet20",
        "dtype": "f32",
        "batch": 128,
        "size": 32,
    }
    with pytest.raises(ValueError, match="network is 'resnet7'; allowed: resnet20"):
        cases.step("resnet7")
    with pytest.raises(ValueError, match="dtype is 'f64'"):
        cases.step("resnet20", "f64")


def test_a_deep_network_is_trained_beside_plain_pytorch():
    pytest.importorskip("sklearn")
    from bench import deep

    torch.set_num_threads(1)
    text = deep.run("resnet14", "digits", None, batch_size=32, steps=12)
    assert text.startswith("# resnet14: 12 steps") and "15 BatchNorms, 1,120 of" in text
    assert "convert() took" in text and text.count("\n| ") > 12
    side = deep.Side(nn.Sequential(nn.BatchNorm2d(1)))
    for losses, healthy in (([2.0, 1.0], True), ([1.0, 2.0], False), ([2.0, float("nan")], False)):
        side.losses = losses
        assert side.is_healthy() is healthy
