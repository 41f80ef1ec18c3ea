"""The documents: commands that exist, line counts that are right, numbers that come from results/."""
import glob
import importlib
import os
import re
import shlex
import sys

import pytest
from helpers import HERE, script


def text(name):
    with open(os.path.join(HERE, name)) as f:
        return f.read()


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(glob.glob("docs/*.md", root_dir=HERE))]


def commands(page):
    lines = re.findall(r"^    ((?:python|deepspeed|torchrun) .+)$", text(page), re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_commands(page):
    """Files and flags are there; a stage's parser takes the flags."""
    for words in commands(page):
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        source = text(words[at]) + text("runtime/flags.py")
        flags = words[at + 1:]
        assert all(f'"{flag}"' in source for flag in flags if flag.startswith("--")), words
        if "/" not in words[at]:
            importlib.import_module(words[at][:-3]).parse_args(flags)


def test_readme_has_commands_and_right_line_counts():
    assert len(commands("README.md")) >= 5 and sum(len(commands(page)) for page in PAGES) > 12
    files = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text("README.md"), re.M)
    assert len(files) == 5
    for name, lines in files:
        assert len(text(name).splitlines()) == int(lines), name


def test_numbers_come_from_results():
    done = script(sys.executable, "tests/pages.py")
    assert done.returncode == 0, done.stderr
