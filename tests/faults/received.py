"""Malicious run folders: no code runs, and no file outside is read or written. Processes that start at
once."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from tests.faults import small

SECRET = "the secret of another folder"


def received_folders(folder):
    """Malicious run folders, opened by the command line: a short error, and the expected exit code."""
    folder = Path(folder)
    original, outside, marker = folder / "original", folder / "outside", folder / "marker"
    assert small.run(small.command, "train", "ring", "-n", 1, "--out", original) == 0
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    payload = f"open({str(marker)!r}, 'w')\ndef make(): pass\n"
    (folder / "payload.py").write_text(payload)
    for name, (words, change, expected_codes) in _changes(outside).items():
        run = folder / "run"
        shutil.copytree(original, run)
        (run / "payload.py").write_text(payload)
        change(run)
        contents = _contents(outside)
        log = folder / "log"
        start = time.perf_counter()
        code = small.run(_command_in_folder, folder, [words[0], run, *words[1:]], output=str(log), timeout=60)
        seconds = time.perf_counter() - start
        output = log.read_text(errors="replace")
        report = run / "report.html"
        is_disclosed = report.is_file() and SECRET in report.read_text(errors="replace")
        is_isolated = not marker.exists() and _contents(outside) == contents and not is_disclosed
        is_short = "Traceback" not in output and len(output) < 10_000
        passed = code in expected_codes and is_isolated and is_short
        yield f"{name}: exit code {code} after {seconds:.0f} s: {output[-300:]}", passed
        shutil.rmtree(run)


def _contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _command_in_folder(folder, words):
    import resource

    os.chdir(folder)
    current = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (current + 2**30, resource.RLIM_INFINITY))
    # "train" takes the run folder as an option, other commands as an argument
    small.command("train", "--out", *words[1:]) if words[0] == "train" else small.command(*words)


def change_config(**changes):
    def change(run):
        file = run / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def replace_file(name, content):
    return lambda run: (run / name).write_bytes(content.encode() if isinstance(content, str) else content)


def replace_by_link(name, target):
    def change(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target)

    return change


def move_outside(name, outside):
    """Copy a folder of the run to ``outside``, and replace it by a link."""

    def change(run):
        shutil.copytree(run / name, outside / name, dirs_exist_ok=True)
        replace_by_link(name, outside / name)(run)

    return change


def replace_by_pipe(name):
    def change(run):
        (run / name).unlink()
        os.mkfifo(run / name)

    return change


def change_manifest(**changes):
    """Change a manifest, and make its checksum valid."""

    def change(run):
        file = run / "weights" / "manifest.json"
        record = json.loads(file.read_text())["manifest"] | changes
        checksum = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps({"manifest": record, "sha256": checksum}))

    return change


def name_in_manifest(name):
    """Name another tensor file in the manifest."""
    return change_manifest(files={name: {"sha256": "", "bytes": 3}})


def extend_weights(run):
    extend_tensor_file(run / "weights")


def extend_tensor_file(folder):
    """Extend the tensor file of a folder to 64 GB, without use of disk space."""
    (file,) = folder.glob("*.safetensors")
    os.truncate(file, 2**36)


def add_evidence_link(outside):
    def change(run):
        (run / ".evidence").symlink_to(outside)

    return change


def _changes(outside):
    deep = '{"schema": ' + "[" * 100_000 + "]" * 100_000 + "}"
    refused, accepted = (65, 78), (0,)
    sample, evaluate = (
        ("sample", "-n", 3),
        ("evaluate", "--estimator", "elbo", "--num-particles", 2, "--data", "test[:5]"),
    )
    resume = ("train", "ring", "-n", 2, "--resume", "last")
    overwrite = ("train", "ring", "-n", 1, "--overwrite")
    digits = "1" * 6000
    pairs = {
        f"the pair {pair!r}, {words[0]}": (words, change_config(pair=pair), (78,))
        for pair in ("payload:make", "payload.py:make", "os:abort")
        for words in (sample, evaluate, ("diagnose",), ("plot",), ("reconstruct",), resume)
    }
    return pairs | {
        "nested config": (sample, replace_file("config.json", deep), refused),
        "NaN in config": (sample, replace_file("config.json", '{"schema": NaN}'), refused),
        "huge number in config": (sample, replace_file("config.json", f'{{"schema": {digits}}}'), refused),
        "huge latent_dim": (sample, change_config(latent_dim=2**30), refused),
        "huge hidden": (sample, change_config(hidden=[2**20, 2**20]), refused),
        "many hidden": (sample, change_config(hidden=[1] * 10**5), refused),
        "huge event_shape": (sample, change_config(event_shape=[2**15, 2**15]), refused),
        "another event_shape": (evaluate, change_config(event_shape=[3]), refused),
        "a string in hidden": (sample, change_config(hidden=["a"]), refused),
        "nested metrics": (("plot",), replace_file("metrics.jsonl", "[" * 100_000), refused),
        "huge number in metrics": (("plot",), replace_file("metrics.jsonl", digits), refused),
        "not UTF-8": (("plot",), replace_file("metrics.jsonl", b"\xff\xfe"), refused),
        "a pipe as config": (sample, replace_by_pipe("config.json"), refused),
        "a pipe as metrics": (("plot",), replace_by_pipe("metrics.jsonl"), refused),
        "a device as config": (sample, replace_by_link("config.json", "/dev/zero"), refused),
        "a link as config": (sample, replace_by_link("config.json", outside / "secret.txt"), refused),
        "a link as metrics": (("plot",), replace_by_link("metrics.jsonl", outside / "secret.txt"), refused),
        "a link as text": (sample, replace_by_link("plots/note.txt", outside / "secret.txt"), accepted),
        "a link as plots": (sample, replace_by_link("plots", outside), accepted),
        "a link as report": (sample, replace_by_link("report.html", outside / "secret.txt"), accepted),
        "a link as weights": (sample, move_outside("weights", outside), refused),
        "a link as checkpoints": (resume, move_outside("checkpoints", outside), refused),
        "a link as weights, resumed": (resume, move_outside("weights", outside), refused),
        "a link as weights, overwritten": (overwrite, move_outside("weights", outside), (2, 65)),
        "a link as lock": (resume, replace_by_link(".lock", outside / "secret.txt"), refused),
        "a link as evidence chunks": (evaluate, add_evidence_link(outside), refused),
        "a parent path": (sample, name_in_manifest("../../outside/secret.txt"), refused),
        "an absolute path": (sample, name_in_manifest(str(outside / "secret.txt")), refused),
        "64 GB of zeros": (sample, extend_weights, refused),
        "nested manifest": (sample, replace_file("weights/manifest.json", "[" * 100_000), refused),
        "an invalid epoch": (("plot",), change_manifest(about={"epoch": [1, 2]}), refused),
    }  # fmt: skip


def started_at_once(folder):
    """Two and four processes at once: each has its own run folder, or an error that names the other
    process."""
    for size in (2, 4):
        subfolder = Path(folder, str(size))
        subfolder.mkdir()
        for options, num_successes in (
            ([], size),
            (["--out", "a"], 1),
            (["--out", "a", "--resume", "last"], 1),
        ):
            words = ["train", "ring", "-n", 1 if "--resume" not in options else 3, *options]
            logs = [subfolder / f"log-{i}" for i in range(size)]
            processes = []
            for i, log in enumerate(logs):
                args = (_command_at_once, (subfolder, i, size, words), {"output": str(log)})
                processes.append(small.CONTEXT.Process(target=small.call_with_output, args=args))
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
            codes = [process.exitcode for process in processes]
            errors = [log.read_text() for log, code in zip(logs, codes, strict=True) if code]
            errors_are_clear = all("is in use by process" in e or "exists already" in e for e in errors)
            locks = [str(file) for file in subfolder.rglob(".lock")]
            codes_are_valid = codes.count(0) >= num_successes and set(codes) <= {0, 2, 74}
            runs_are_separate = bool(options) or len(list((subfolder / "runs").iterdir())) == size
            passed = codes_are_valid and errors_are_clear and not locks and runs_are_separate
            yield f"{size} at once, {options}: {codes}, {locks}", passed
            for file in subfolder.glob("ready-*"):
                file.unlink()


def _command_at_once(folder, i, size, words):
    """Run the command line when all ``size`` processes are ready."""
    os.chdir(folder)
    Path(f"ready-{i}").touch()
    while len(list(Path().glob("ready-*"))) < size:
        time.sleep(0.001)
    small.command(*words)
