"""Several processes train as one, on data of every form, and divide the rows of evaluation among them."""

import pytest
import torch

from tests.faults import small
from tests.faults.processes import run_group
from tests.support import ranks
from tests.support.ranks import FORMS

pytestmark = pytest.mark.slow
SIZES = (2,)  # pytest -m faults tries three processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each rank, by the number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    assert small.run(ranks.compute, folder, output=folder / "log") == 0, (folder / "log").read_text()
    assert all(run_group(size, ranks.compute, folder) for size in SIZES)
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in (1, *SIZES)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_several_processes_train_as_one(results, size, form):
    """Parameters after gradient descent agree to 1e-12, ELBOs to 1e-6."""
    one = results[1][0]["forms"][form]
    for rank in results[size]:
        for name, value in rank["forms"][form].items():
            tolerance = 1e-6 if name == "elbos" else 1e-12
            torch.testing.assert_close(value, one[name], rtol=tolerance, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_each_row_of_a_shuffled_loader_is_used_once_in_an_epoch(results, size):
    epochs = [rank["shuffled"]["loader"] for rank in results[size]]
    in_order = []
    for shares in zip(*epochs, strict=True):
        # the first row of the last minibatch is loaded by all ranks, of which one counts it
        loaded = [row for rows in shares for row in rows]
        assert {*loaded} == {*range(61)}
        assert len(loaded) == 61 + size - 1
        in_order.append(shares[0])
    assert in_order[0] != in_order[1]


@pytest.mark.parametrize("size", SIZES)
def test_a_distributed_sampler_has_a_new_order_in_each_epoch(results, size):
    epochs = [rank["shuffled"]["DistributedSampler"] for rank in results[size]]
    for shares in zip(*epochs, strict=True):
        assert {row for rows in shares for row in rows} == {*range(61)}
    assert epochs[0][0] != epochs[0][1]


@pytest.mark.parametrize("size", SIZES)
def test_results_per_datum_do_not_depend_on_the_number_of_processes(results, size):
    one = results[1][0]["divided"]
    for rank in results[size]:
        for name, value in rank["divided"].items():
            assert torch.equal(value, one[name]), name
    assert torch.equal(one["importance"], one["importance alone"])
    assert len(one["evaluate"]) == 131


MESSAGES = {
    "same stream": "same first batch in each of the {size} processes",
    "same endless stream": "same first batch in each of the {size} processes",
    "rows of a rank": "all rows must be passed in each of the {size} processes",
    "parts of equal size": "different data; expected all rows, in order, in each of the {size} processes",
    "loader of a part": "different data; expected all rows, in order, in each of the {size} processes",
    "sampler of a part": "the loader's sampler has other items on rank 1 than on rank 0",
    "batches of a part": "the loader's sampler has other items on rank 1 than on rank 0",
    "endless batch sampler": "expected 61 rows in an epoch, by the loader's length, but got more",
    "no rows on a rank": "the stream has no batches on rank",
    "evaluate more rows": "different data; expected all rows, in order, in each of the {size} processes",
    "evaluate another pair": "different parameters or buffers",
    "importance of another pair": "different parameters or buffers",
    "ais of another pair": "different parameters or buffers",
    "other sampler": "process has rank {rank} of {size}",
    "evaluate": "different data; expected all rows, in order, in each of the {size} processes",
}


@pytest.mark.parametrize("case", MESSAGES)
@pytest.mark.parametrize("size", SIZES)
def test_data_that_the_ranks_cannot_divide_raise(results, size, case):
    for rank, result in enumerate(results[size]):
        assert MESSAGES[case].format(rank=rank, size=size) in result["errors"][case]


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_have_the_same_parameters_buffers_and_beta(results, size):
    for rank in results[size]:
        for name, value in rank["equal"].items():
            assert torch.equal(value, results[size][0]["equal"][name]), name


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_of_a_stream_may_drop_its_last_batch(results, size):
    for rank in results[size]:
        assert rank["drop_last"]["elbos"].isfinite().all()


@pytest.mark.parametrize("size", [1, 3])
def test_a_fit_resumes_on_another_number_of_processes(tmp_path, size):
    """It continues after the last step, and says once that its random numbers are new."""
    assert run_group(2, ranks.begin, tmp_path)
    assert run_group(size, ranks.resume, tmp_path)
    found = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
    first = found[0]
    assert [len(rank["warnings"]) for rank in found] == [1] + [0] * (size - 1)
    assert f"{size} processes continue a fit of 2" in first["warnings"][0]
    assert first["num_epochs"] == 3
    for rank in found:
        for name, value in rank["params"].items():
            assert torch.equal(value, first["params"][name])
    # without noise and shuffling the result is that of one process
    torch.testing.assert_close(first["params"], first["uninterrupted"], rtol=1e-12, atol=0)
