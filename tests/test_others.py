"""Models of other people's, read in every way: ``pytest --zoo``, with the packages of the extra ``zoo``."""

import functools

import pytest

from experiments.zoo import ENTRIES
from experiments.zoo.readings import READINGS

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


@functools.lru_cache(maxsize=1)
def built(entry):
    try:
        return entry.build()
    except ImportError as error:
        return error


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.package}: {entry.name}")
def test_reading(entry, reading):
    model = None if entry.missing() else built(entry)
    if model is None or isinstance(model, ImportError):
        pytest.skip(entry.missing() or f"{entry.package} cannot be imported here: {model}")
    READINGS[reading](model)
