"""What happens to large runs, done to small ones: ``pytest -m faults``, or as a table ``python -m tests.faults``."""

import pytest

from tests.faults.__main__ import ROWS


@pytest.mark.faults
@pytest.mark.parametrize("risk", ROWS)
def test_a_small_run_survives(risk, tmp_path):
    lost = [what for what, fine in ROWS[risk](tmp_path) if not fine]
    assert not lost, "\n".join(lost)
