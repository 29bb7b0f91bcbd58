"""The README is true: its tree exists, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGES = ["registry", "adapters", "compression", "delta", "controller", "model_worker", "webui"]


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    assert found, f"the README has no section {title!r}"
    return found.group(1)


def tree_paths() -> list[str]:
    """Paths in the annotated tree, whose lines are `indent name  annotation`, two spaces a level."""
    block = re.search(r"```\n(.*?)```", section("The tree"), flags=re.DOTALL)
    assert block
    paths, parents = [], []
    for line in block.group(1).splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name.rstrip("/")]
        paths.append("/".join(parents))
    return paths


def commands() -> list[list[str]]:
    """Every `python -m package [verb]` and `scripts/...` of the README's shell blocks, with the flags it is given."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            words = line.split()
            if line.startswith(("python -m ", "scripts/")):
                found.append(words)
    return found


@cache
def help_of(*command: str) -> str:
    """What it prints; once, because some commands begin by importing for seconds."""
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_the_tree_exists() -> None:
    paths = tree_paths()
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_tree_names_every_package_and_every_part_of_the_engine() -> None:
    paths = set(tree_paths())
    assert set(PACKAGES) <= paths
    engine = {f"model_worker/engine/{p.name}" for p in (ROOT / "model_worker/engine").iterdir() if p.is_dir()}
    assert {path for path in engine if not path.endswith("__pycache__")} <= paths


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_paths_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    roots = "|".join(["tests", "docs", "scripts", "benchmarks", *PACKAGES])
    paths = re.findall(rf"`((?:{roots})/[\w./-]*)`", text)
    assert len(paths) > 10
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_flag_of_a_command_is_in_its_help(words: list[str]) -> None:
    if words[0].startswith("scripts/"):
        command = [sys.executable, str(ROOT / words[0])]
        verb: list[str] = []
    else:
        command = [sys.executable, "-m", words[2]]
        verb = [word for word in words[3:4] if re.fullmatch(r"[a-z]+", word)]
    shown = help_of(*command, *verb)
    for flag in (word for word in words if word.startswith("--")):
        assert re.search(rf"{flag}\b", shown), f"{' '.join(words)}: no {flag} in the help"


@pytest.mark.parametrize("package", [p for p in PACKAGES if (ROOT / p / "__main__.py").exists()])
def test_a_wrong_flag_is_a_usage_error(package: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", package, "--no-such-flag"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr
    assert "--no-such-flag" in shown.stderr or "required" in shown.stderr
