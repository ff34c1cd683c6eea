"""Inject faults into small runs and print how many runs survive: ``python -m tests.faults [ROW …]``."""

import argparse
import sys
import tempfile
import time

from tests.faults import damage, interruptions, processes, received

# name of a row in the table -> generator of (description of a trial, whether the run survived)
ROWS = {
    "exact resume": interruptions.exact_resume,
    "crash during a save": interruptions.crash_during_save,
    "SIGTERM, SIGINT": interruptions.signals,
    "corruption": damage.corruption,
    "untrusted pickle": damage.untrusted_pickle,
    "disk full": damage.disk_full,
    "out of memory": damage.out_of_memory,
    "NaN or infinity in data": damage.data_not_finite,
    "NaN gradient": damage.gradient_not_finite,
    "values outside the support": damage.grey_pixels,
    "param-store leakage": interruptions.two_fits,
    "version mismatch": damage.versions,
    "dataset integrity": damage.dataset_integrity,
    "bombs": damage.bombs,
    "received folders": received.received_folders,
    "started at once": received.started_at_once,
    "reproducibility": interruptions.reproducibility,
    "one process and several": processes.one_and_several,
    "death of a worker": processes.death,
}


def main(names):
    print("| risk | tried | survived | seconds |\n|---|---|---|---|", flush=True)
    failures = []
    for name in names or ROWS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            trials = list(ROWS[name](folder))
        survived = sum(bool(passed) for _, passed in trials)
        print(f"| {name} | {len(trials)} | {survived} | {time.perf_counter() - start:.0f} |", flush=True)
        failures += [f"{name}: {description}" for description, passed in trials if not passed]
    print(*failures, sep="\n", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of {', '.join(ROWS)}; by default all")
    rows = parser.parse_args().rows
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"rows: expected some of {', '.join(ROWS)} but got {unknown[0]!r}")
    sys.exit(main(rows))
