"""Small runs survive injected faults: ``pytest -m faults``, or ``python -m tests.faults`` for a table."""

import pytest

from tests.faults.__main__ import ROWS


@pytest.mark.faults
@pytest.mark.parametrize("risk", ROWS)
def test_small_run_survives(risk, tmp_path):
    failures = [description for description, passed in ROWS[risk](tmp_path) if not passed]
    assert not failures, "\n".join(failures)
