"""`pytest suites/`: every cell of every suite is a test."""

from harness.pytest_suites import pytest_collect_file as pytest_collect_file
