import os
import re

import pytest

from benchmarks.machine import describe_setting, hardware_name, read_core_seconds, read_process_seconds, result_path


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        ("AMD EPYC", "epyc-2c"),
        ("AMD EPYC 7763 64-Core Processor", "epyc-7763-2c"),
        ("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "xeon-platinum-8370c-2c"),
        ("AMD Ryzen 7 5800U with Radeon Graphics", "ryzen-7-5800u-2c"),
    ],
)
def test_hardware_has_a_short_name(processor: str, name: str) -> None:
    assert hardware_name(processor, 2) == name


def test_a_result_is_named_by_subject_hardware_and_month() -> None:
    assert re.fullmatch(r"serving_[a-z0-9-]+-\d+c_\d{6}\.md", result_path("serving").name)


def test_a_setting_names_command_commit_machine_and_versions() -> None:
    text = describe_setting("python -m benchmarks")
    for fact in ("Command: `python -m benchmarks`", "Commit: ", "Machine: ", "Python 3.", "torch ", "fastapi "):
        assert fact in text


def test_cpu_time_grows_with_work() -> None:
    process, machine = read_process_seconds(os.getpid()), read_core_seconds().busy
    while read_process_seconds(os.getpid()) < process + 0.05:
        sum(range(10_000))
    assert read_core_seconds().busy > machine
