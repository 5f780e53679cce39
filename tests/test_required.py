"""The rule of tests/conftest.py: under PELLUCID_REQUIRE_ALL what skips has failed, but for GPU tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest
@pytest.fixture
def absent(): pytest.skip("no such component")
def test_fixture(absent): pass
def test_inside(): pytest.importorskip("no_such_module")
@pytest.mark.skipif(True, reason="marked")
def test_marked(): pass
@pytest.mark.gpu
def test_gpu(): pytest.skip("no GPU")
@pytest.mark.xfail(reason="known")
def test_known(): assert False
def test_fine(): pass
"""
WHOLE_FILE = 'import pytest\npytest.importorskip("no_such_module")\ndef test_never(): pass\n'


@pytest.mark.parametrize(("required", "outcome"), [
    ("", "1 passed, 5 skipped, 1 xfailed"), ("1", "1 failed, 1 passed, 1 skipped, 1 xfailed, 3 errors"),
])
def test_what_skips_fails_where_everything_is_required(tmp_path, required, outcome):
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "test_whole.py").write_text(WHOLE_FILE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PELLUCID_REQUIRE_ALL": required}, capture_output=True, text=True)
    assert outcome in done.stdout, done.stdout
