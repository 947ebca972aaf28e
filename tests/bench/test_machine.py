"""The machine's state, read from files laid out as the kernel lays them out."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import asdict, replace

import pytest

from rkd_deploy.bench.machine import (
    available_bytes,
    device_used_bytes,
    machine_state,
    reset_peak,
    resident_bytes,
    resident_peak_bytes,
)
from rkd_deploy.report.conditions import condition_lines

CPU = "sys/devices/system/cpu"
KERNEL = {
    f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "2400000",
    f"{CPU}/cpu1/cpufreq/scaling_cur_freq": "3100500",
    f"{CPU}/cpu0/cpufreq/scaling_min_freq": "800000",
    f"{CPU}/cpu1/cpufreq/scaling_min_freq": "800000",
    f"{CPU}/cpu0/cpufreq/scaling_max_freq": "3500000",
    f"{CPU}/cpu1/cpufreq/scaling_max_freq": "3500000",
    f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave",
    f"{CPU}/cpu1/cpufreq/scaling_governor": "performance",
    f"{CPU}/intel_pstate/no_turbo": "1",
    "sys/class/powercap/intel-rapl:0/constraint_0_power_limit_uw": "125000000",
    "sys/class/thermal/thermal_zone0/temp": "27800",
    "sys/class/thermal/thermal_zone1/temp": "61000",
    "sys/fs/cgroup/cpu.max": "150000 100000",
    "proc/stat": "cpu  1 2 3 4 5 6 7 800 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10",
    "proc/self/task/1/status": "Name:\tx\nnonvoluntary_ctxt_switches:\t4",
    "proc/self/task/2/status": "Name:\tx\nnonvoluntary_ctxt_switches:\t38",
}


@pytest.fixture
def machine(tmp_path):
    for name, text in KERNEL.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    return tmp_path


def test_what_the_kernel_tells_is_read(machine):
    state = machine_state(machine)
    assert state.clock_mhz == (2400, 3100.5)
    assert state.clock_limits_mhz == (800, 3500)
    assert state.governor == "performance, powersave"
    assert state.turbo is False
    assert state.power_limit_w == 125
    assert state.temperature_c == 61
    assert state.quota_cores == 1.5
    assert state.steal_s == 800 / os.sysconf("SC_CLK_TCK")
    assert state.preempted == 42


def test_what_changed_is_told_from_to(machine):
    before = machine_state(machine)
    (machine / f"{CPU}/cpu1/cpufreq/scaling_cur_freq").write_text("2400000")
    (machine / "proc/self/task/2/status").write_text("nonvoluntary_ctxt_switches:\t58")
    gpu = {"name": "NVIDIA H200", "clocks.sm": "1980 MHz", "power.limit": "700.00 W"}
    after = machine_state(machine)
    (cpu, card) = condition_lines(replace(before, gpus=[gpu]), replace(after, gpus=[gpu | {"clocks.sm": "345 MHz"}]))
    for fact in (
        "clock 2400-3100 MHz to 2400 MHz",
        "allowed 800-3500 MHz",
        "governor performance, powersave",
        "turbo off",
        "power limit 125 W",
        "temperature 61 C",
        "quota 1.5 cores",
        "stolen 0 s",
        "preempted 20 times",
    ):
        assert fact in cpu
    assert card == "GPU 0 NVIDIA H200: clocks.sm 1980 MHz to 345 MHz, power.limit 700.00 W"


def test_a_clock_without_cpufreq_comes_from_cpuinfo(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: x\ncpu MHz\t\t: 2499.998\n")
    (tmp_path / CPU / "cpufreq").mkdir(parents=True)
    (tmp_path / CPU / "cpufreq/boost").write_text("1\n")
    state = machine_state(tmp_path)
    assert state.clock_mhz == (2499.998, 2499.998)
    assert state.turbo is True
    assert state.governor is state.temperature_c is state.steal_s is None
    assert condition_lines(state, state)[0].startswith("CPU: clock 2500 MHz, turbo on, load ")


def test_this_machine_tells_something_that_is_json():
    state = json.loads(json.dumps(asdict(machine_state()), allow_nan=False))
    assert state["load_1min"] >= 0
    assert state["preempted"] >= 0


_CPUS = os.cpu_count() or 1
_UNSETTLED = 3 * _CPUS * max(32, 2 * _CPUS) * os.sysconf("SC_PAGE_SIZE")
"""Bytes by which what the kernel tells may lag (`proc(5)` calls VmRSS inaccurate): it adds up three kinds of pages,
counted by each CPU in batches of that many (lib/percpu_counter.c). So a peak may read below a size read before it."""


def test_memory_grows_and_its_peak_stays_until_it_is_reset():
    before = resident_bytes()
    with mmap.mmap(-1, 64 << 20) as held:  # a bytearray's pages may stay with the C library that freed them
        held.write(os.urandom(1 << 20) * 64)
        grown = resident_bytes()
    assert grown - before > 50 << 20
    assert resident_bytes() < grown - (50 << 20)
    assert resident_peak_bytes() >= grown - _UNSETTLED
    assert reset_peak()
    assert resident_peak_bytes() < grown - (30 << 20)
    assert available_bytes() > 1 << 20


def test_a_gpus_memory_comes_from_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\nfor used in 3 512; do echo "NVIDIA H200, 575, 143771 MiB, $used MiB, 1, 2, 3, 4, 5, 6, P0"; done\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert device_used_bytes("cuda:1") == 512 << 20
    assert device_used_bytes("cuda") == 3 << 20
    assert device_used_bytes("cuda:2") is None
    assert device_used_bytes("cpu") is None
