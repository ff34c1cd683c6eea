"""Write ``report.html``, which shows the pictures and texts of a run folder on one page. Nothing is
computed: the pictures and texts are those that other commands wrote."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment

from pyro_vae.cli import output
from pyro_vae.cli.runs import GENERATOR, RESULT_FOLDERS, Run
from pyro_vae.files import is_file, is_folder, read_bytes, write_whole

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
"""
    + GENERATOR
    + """
<title>{{ name }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem;
         margin: 2rem auto; padding: 0 1rem }
  pre { font-size: 13px; background: #f5f5f5; padding: 1rem; overflow-x: auto }
  img { max-width: 100%; max-height: 36rem }
  td { padding-right: 2rem }
</style>
<h1>{{ name }}</h1>
<p>{{ summary }}</p>
<p>{{ objective }}</p>
{% for title, texts, pictures in sections %}
<h2>{{ title }}</h2>
{% for text in texts %}
<pre>{{ text }}</pre>
{% endfor %}
{% for picture in pictures %}
<figure><img src="{{ picture | urlencode }}" alt="{{ picture }}">
<figcaption>{{ picture }}</figcaption></figure>
{% endfor %}
{% endfor %}
<h2>configuration</h2>
<table>
{% for key, value in config.items() if value is not none %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
</html>
"""
)


def write_report(run: Run, changed: Path | None = None) -> Path | None:
    """Write ``report.html`` and return its path. A failure prints a warning and returns ``None``.

    :param changed: the folder with new results. If it is not in the run folder, nothing is written.
    """
    if changed is not None and changed.resolve().parent != run.path.resolve():
        return None
    try:
        name, sections = run.path.resolve().name, list(_sections(run.path))
        page = _PAGE.render(
            name=name,
            summary=run.summary(),
            objective=run.objective(),
            config=asdict(run.config),
            sections=sections,
        )
        write_whole(run.path / "report.html", page.encode("utf-8", "replace"))
        return run.path / "report.html"
    except (OSError, ValueError) as error:
        output.print_progress(f"{run.path}: report.html was not written: {error}")
        return None


def _sections(run: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Title, texts and pictures of each result folder of a run, if it has texts or pictures. Symbolic links
    are ignored."""
    for kind in RESULT_FOLDERS:
        folders = [
            entry
            for entry in run.iterdir()
            if re.fullmatch(rf"{kind}(-\d+)?", entry.name) and is_folder(entry)
        ]
        for folder in sorted(folders, key=_folder_number):
            files = [file for file in sorted(folder.iterdir()) if is_file(file)]
            texts = [_read_or_error(file) for file in files if file.suffix == ".txt"]
            pictures = [f"{folder.name}/{file.name}" for file in files if file.suffix == ".png"]
            if texts or pictures:
                yield folder.name, texts, pictures


def _read_or_error(file: Path) -> str:
    """The text of a file, or the error text if it is too large."""
    try:
        return read_bytes(file, max_bytes=2**20).decode("utf-8", "replace").rstrip()
    except ValueError as error:
        return str(error)


def _folder_number(path: Path) -> int:
    """The number at the end of a name: 10 for ``plots-10``, 1 for ``plots``."""
    match = re.search(r"-(\d+)$", path.name)
    return int(match[1]) if match else 1
