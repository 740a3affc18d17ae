"""The README promises nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moeviz.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_of_the_readme_exists() -> None:
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    named = set(re.findall(r"^moeviz ([a-z]+)", blocks, flags=re.MULTILINE))
    named |= set(re.findall(r"`moeviz ([a-z]+)", README))
    assert len(named) >= 8
    assert named <= {command.name for command in COMMANDS}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).stat().st_size > 0


def test_readme_opens_with_a_picture_and_names_both_commands() -> None:
    first = README.split("\n\n")[1]
    assert first.startswith("![")
    assert "./dev demo" in README
    assert "./dev test" in README
    assert {"demo)", "test)"} <= set((ROOT / "dev").read_text().split())


def test_the_extras_of_the_readme_are_declared() -> None:
    declared = (
        (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    )
    line = next(line for line in README.splitlines() if line.startswith("Extras:"))
    extras = re.findall(r"`([a-z]+)`", line)
    assert extras
    for extra in extras:
        assert re.search(rf"^{extra} = ", declared, flags=re.MULTILINE), extra


def test_top_level_folders_of_the_tree_exist() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    folders = re.findall(r"^(\S+/) ", tree, flags=re.MULTILINE)
    assert {"moeviz/", "model/", "trainer/", "dashboards/", "tui/", "tests/"} <= set(folders)
    assert all((ROOT / folder).is_dir() for folder in folders)
