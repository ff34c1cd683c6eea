"""Folders that someone sent, and processes that start at once: nothing runs, nothing outside the folder is touched or shown."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from tests.faults import small

SECRET = "the secret of another folder"


def received_folders(folder):
    """A run folder with something hostile in it, opened by the command line: one line, and an exit code of a refusal."""
    place = Path(folder)
    whole, outside, ran = place / "whole", place / "outside", place / "it ran"
    assert small.run(small.command, "train", "ring", "-n", 1, "--out", whole) == 0
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    payload = f"open({str(ran)!r}, 'w')\ndef make(): pass\n"
    (place / "payload.py").write_text(payload)
    for name, (words, change, codes) in _hostile(outside).items():
        run = place / "run"
        shutil.copytree(whole, run)
        (run / "payload.py").write_text(payload)
        change(run)
        before = _contents(outside)
        said = place / "said"
        start = time.perf_counter()
        code = small.run(_in_folder, place, [words[0], run, *words[1:]], said=str(said), timeout=60)
        took = time.perf_counter() - start
        page = run / "report.html"
        shown = page.is_file() and SECRET in page.read_text(errors="replace")
        fine = code in codes and not ran.exists() and _contents(outside) == before and not shown
        fine = fine and "Traceback" not in said.read_text(errors="replace") and len(said.read_text(errors="replace")) < 10_000
        yield f"{name}: exit code {code} after {took:.0f} s: {said.read_text(errors='replace')[-300:]}", fine
        shutil.rmtree(run)


def _contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _in_folder(place, words):
    import resource

    os.chdir(place)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + 2**30, resource.RLIM_INFINITY))  # a bomb is an error, not an end
    small.command("train", "--out", *words[1:]) if words[0] == "train" else small.command(*words)


def config(**changes):
    def change(run):
        file = run / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def text(name, content):
    return lambda run: (run / name).write_bytes(content.encode() if isinstance(content, str) else content)


def link(name, target):
    def change(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target)

    return change


def moved_out(name, outside):
    """A part of the run that is elsewhere, with a link in its place."""

    def change(run):
        shutil.copytree(run / name, outside / name, dirs_exist_ok=True)
        link(name, outside / name)(run)

    return change


def pipe(name):
    def change(run):
        (run / name).unlink()
        os.mkfifo(run / name)

    return change


def manifest(**changes):
    """A manifest that says something else, with a sum that is right."""

    def change(run):
        file = run / "weights" / "manifest.json"
        record = json.loads(file.read_text())["manifest"] | changes
        total = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps({"manifest": record, "sha256": total}))

    return change


def sparse(run):
    sparse_file(run / "weights")


def sparse_file(folder):
    (file,) = folder.glob("*.safetensors")
    os.truncate(file, 2**36)


def evidence_link(outside):
    def change(run):
        (run / ".evidence").symlink_to(outside)

    return change


def _hostile(outside):
    deep = '{"schema": ' + "[" * 100_000 + "]" * 100_000 + "}"
    refused, fine = (65, 78), (0,)
    sample, evaluate = ("sample", "-n", 3), ("evaluate", "--estimator", "elbo", "--num-particles", 2, "--data", "test[:5]")
    resume = ("train", "ring", "-n", 2, "--resume", "last")
    digits = "1" * 6000
    found = {
        f"a pair that is {pair!r}, {words[0]}": (words, config(pair=pair), (78,))
        for pair in ("payload:make", "payload.py:make", "os:abort")
        for words in (sample, evaluate, ("diagnose",), ("plot",), ("reconstruct",), resume)
    }
    return found | {
        "nested config": (sample, text("config.json", deep), refused),
        "NaN in config": (sample, text("config.json", '{"schema": NaN}'), refused),
        "huge number in config": (sample, text("config.json", f'{{"schema": {digits}}}'), refused),
        "huge latent_dim": (sample, config(latent_dim=2**30), refused),
        "huge hidden": (sample, config(hidden=[2**20, 2**20]), refused),
        "many hidden": (sample, config(hidden=[1] * 10**5), refused),
        "huge event_shape": (sample, config(event_shape=[2**15, 2**15]), refused),
        "another event_shape": (evaluate, config(event_shape=[3]), refused),
        "words in hidden": (sample, config(hidden=["a"]), refused),
        "nested metrics": (("plot",), text("metrics.jsonl", "[" * 100_000), refused),
        "huge number in metrics": (("plot",), text("metrics.jsonl", digits), refused),
        "no text": (("plot",), text("metrics.jsonl", b"\xff\xfe"), refused),
        "a pipe as config": (sample, pipe("config.json"), refused),
        "a pipe as metrics": (("plot",), pipe("metrics.jsonl"), refused),
        "a device as config": (sample, link("config.json", "/dev/zero"), refused),
        "config a link": (sample, link("config.json", outside / "secret.txt"), refused),
        "metrics a link": (("plot",), link("metrics.jsonl", outside / "secret.txt"), refused),
        "a text a link": (sample, link("plots/note.txt", outside / "secret.txt"), fine),
        "pictures a link": (sample, link("plots", outside), fine),
        "report a link": (sample, link("report.html", outside / "secret.txt"), fine),
        "weights a link": (sample, moved_out("weights", outside), refused),
        "checkpoints a link": (resume, moved_out("checkpoints", outside), refused),
        "weights a link, resumed": (resume, moved_out("weights", outside), refused),
        "weights a link, overwritten": (("train", "ring", "-n", 1, "--overwrite"), moved_out("weights", outside), (2, 65)),
        "the lock a link": (resume, link(".lock", outside / "secret.txt"), refused),
        "kept chunks a link": (evaluate, evidence_link(outside), refused),
        "a parent path": (sample, manifest(files={"../../outside/secret.txt": {"sha256": "", "bytes": 3}}), refused),
        "an absolute path": (sample, manifest(files={str(outside / "secret.txt"): {"sha256": "", "bytes": 3}}), refused),
        "64 GB of nothing": (sample, sparse, refused),
        "nested manifest": (sample, text("weights/manifest.json", "[" * 100_000), refused),
        "an epoch that is none": (("plot",), manifest(about={"epoch": [1, 2]}), refused),
    }  # fmt: skip


def started_at_once(folder):
    """Two and four processes at once: each has a run folder of its own, or says at the start who has it."""
    for size in (2, 4):
        place = Path(folder, str(size))
        place.mkdir()
        for rest, folders in (([], size), (["--out", "a"], 1), (["--out", "a", "--resume", "last"], 1)):
            words = ["train", "ring", "-n", 1 if "--resume" not in rest else 3, *rest]
            said = [place / f"said-{i}" for i in range(size)]
            processes = [
                small.CONTEXT.Process(target=small._quiet, args=(_at_once, (place, i, size, words), {"said": str(said[i])}))
                for i in range(size)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
            codes = [process.exitcode for process in processes]
            text = [file.read_text() for file in said]
            named = all(
                "is in use by process" in t or "exists already" in t for t, code in zip(text, codes, strict=True) if code
            )
            left = [str(file) for file in place.rglob(".lock")]
            well = codes.count(0) >= folders and set(codes) <= {0, 2, 74} and named and not left
            yield (
                f"{size} at once, {rest}: {codes}, {left}",
                well and (bool(rest) or len(list((place / "runs").iterdir())) == size),
            )
            for file in place.glob("ready-*"):
                file.unlink()


def _at_once(place, i, size, words):
    os.chdir(place)
    Path(f"ready-{i}").touch()
    while len(list(Path().glob("ready-*"))) < size:
        time.sleep(0.001)
    small.command(*words)
