"""Examples in docstrings write their files elsewhere."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run docstrings in a folder of their own."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("example"))
        yield
