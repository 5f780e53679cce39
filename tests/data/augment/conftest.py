"""What these tests share: text with structure, and components that may be absent."""

from pathlib import Path

import pytest

PROSE = """The committee will announce its final decision about the budget on Monday morning. She quickly closed the
door because the noise of the street was unbearable.

Scientists at Harvard discovered 12 new species of frog in the rainforest last year, and they did
not expect to find so many. Dr. Smith said: "It is a remarkable result." THE PHYSICIAN bought an automobile.

  - a list item, with  two spaces
    def f(x):\treturn x
"""


def _need(path: str, package: str) -> str:
    """The path of a system component; without it the test skips."""
    if not Path(path).exists():
        pytest.skip(f"{path} is missing: apt-get install {package}")
    return path


@pytest.fixture(scope="session")
def need():
    return _need


@pytest.fixture(scope="session")
def wordnet():
    from pellucid.data.augment.lexicons import open_source

    return open_source("wordnet", _need("/usr/share/wordnet", "wordnet-base"))


@pytest.fixture
def prose() -> str:
    return PROSE
