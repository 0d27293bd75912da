"""Fixtures and reporting hooks of the benches."""

from __future__ import annotations

import pytest
import torch

from bench import report, timing


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the benches run; see `timing.default_device`."""
    return timing.default_device()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Adds our own environment line; the host's name says nothing about the numbers and is left out."""
    machine_info.pop("node", None)
    machine_info["bnfast"] = timing.environment()


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Prints the report's tables under pytest-benchmark's own."""
    session = getattr(config, "_benchmarksession", None)
    entries = (
        [{"extra_info": b.extra_info} for b in session.benchmarks if b.extra_info]
        if session
        else []
    )
    if entries:
        terminalreporter.write_line("")
        terminalreporter.write(report.markdown(report.rows_of(entries)))
