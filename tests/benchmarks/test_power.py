"""Joules, from a driver and counters that are made up."""

from __future__ import annotations

import threading
import time

import pytest

from mi2rage_benchmarks.power import EnergyMeter, integral_j


def test_power_is_integrated_between_readings_and_held_beyond_them():
    readings = [(1.0, 100.0), (2.0, 200.0), (4.0, 200.0)]
    assert integral_j(readings, 1.0, 2.0) == pytest.approx(150.0)
    assert integral_j(readings, 1.5, 3.0) == pytest.approx(175 / 2 + 200)
    assert integral_j(readings, 0.0, 1.0) == pytest.approx(100.0)
    assert integral_j(readings, 3.0, 6.0) == pytest.approx(600.0)
    assert integral_j([(5.0, 70.0)], 0.0, 10.0) == pytest.approx(700.0)


def rapl(home, name, microjoules, wrap):
    home.mkdir(parents=True)
    for file, content in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", wrap)):
        (home / file).write_text(f"{content}\n")
    return home / "energy_uj"


def test_counters_of_packages_are_summed_over_their_wrap(tmp_path):
    first = rapl(tmp_path / "intel-rapl:0", "package-0", 9_000_000, 10_000_000)
    second = rapl(tmp_path / "intel-rapl:1", "package-1", 1_000_000, 10_000_000)
    rapl(tmp_path / "intel-rapl:0:0", "core", 0, 10_000_000)  # a part of the first
    with EnergyMeter(tmp_path, "no-such-program") as meter:
        first.write_text("2000000\n")
        second.write_text("1500000\n")
    assert meter.energy.joules == pytest.approx({"CPU package-0 (RAPL)": 3.0, "CPU package-1 (RAPL)": 0.5})
    assert meter.energy.total_j == pytest.approx(3.5)
    assert meter.energy.missing is None


def program(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_gpus_power_is_read_while_the_block_runs(tmp_path):
    command = program(tmp_path / "fake-smi", "while :; do echo 250.00; sleep 0.02; done")
    with EnergyMeter(tmp_path, command) as meter:
        start = time.perf_counter()
        time.sleep(0.3)
        passed = time.perf_counter() - start
    (name,) = meter.energy.joules
    assert name == "GPU 0 (fake-smi)"
    assert 250 * passed <= meter.energy.joules[name] < 250 * (passed + 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu-power"], "the program was ended"


def test_where_nothing_can_be_read_the_reason_is_told(tmp_path):
    with EnergyMeter(tmp_path / "none", "no-such-program") as meter:
        pass
    assert meter.energy.total_j is None
    assert "no-such-program is not there" in meter.energy.missing
    assert "RAPL" in meter.energy.missing
    command = program(tmp_path / "mute-smi", "echo '[N/A]'")
    with EnergyMeter(tmp_path / "none", command) as meter:
        pass
    assert meter.energy.joules == {}
    assert "tells no power" in meter.energy.missing
