"""Every code block of the site runs, and every method has its page."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest

import errata
from errata.cli import main, settings

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [p for p in sorted(DOCS.glob("*.md")) if "```" in p.read_text()]
METHODS = sorted(errata.methods())
ELSEWHERE = ("pip install ", "transformers serve ", "curl ")
"""Commands that are not errata's; serving is tested in test_export.py."""
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)


def run(page: Path) -> int:
    """Run all blocks of a page, one after the other; how many they were."""
    space, count = {"__name__": page.stem}, 0
    for kind, code in BLOCK.findall(page.read_text()):
        if kind == "python":
            exec(compile(code, f"{page.name}, block {count + 1}", "exec", dont_inherit=True), space)  # noqa: S102 - a page of ours
        elif kind == "sh":
            for line in code.splitlines():
                shell(line)
        else:
            assert kind in ("text", "toml", "yaml"), f"{page.name}: a block of {kind} is not run"
        count += kind in ("python", "sh")
    return count


def shell(line: str) -> None:
    if line.startswith(ELSEWHERE):
        return
    program, *args = shlex.split(line)
    assert program == "errata", line
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert run(page) > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_whose_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = DOCS / "methods" / f"{name}.md"
    assert page.is_file(), f"docs/methods/{name}.md is missing"
    text = page.read_text()
    for part in ("## Idea", "## When to use it", "<!-- facts -->", "<!-- settings -->", "<!-- measured -->"):
        assert part in text
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no published settings")
        assert run(page) > 0


def test_the_readme_has_the_sites_figures_of_every_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(DOCS)
    import tables  # pyright: ignore[reportMissingImports] - of the site

    text = (DOCS.parent / "README.md").read_text()
    for model in tables.MODELS:
        assert tables.in_readme(text, model) == text


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_says_what_it_is(name: str):
    """The table of a method's page is made of the docstring lines under its fields."""
    assert [s["name"] for s in settings.describe(errata.methods()[name]) if not s["about"]] == []
