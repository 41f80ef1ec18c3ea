import os
import re
import shlex
import sys

from helpers import HERE, script


def test_readme():
    """Commands have the files and flags they name, the table its lines, and numbers come from results/."""

    text = open(os.path.join(HERE, "README.md")).read()
    commands = [
        shlex.split(line, comments=True)
        for line in re.findall(r"^    ((?:python|deepspeed|torchrun) .+)$", text, re.M)
    ]
    assert len(commands) > 12
    for words in commands:
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        assert "&&" not in words
        source = open(os.path.join(HERE, words[at])).read()
        for flag in (w for w in words[at + 1:] if w.startswith("--")):
            assert f'"{flag}"' in source + open(os.path.join(HERE, "common.py")).read(), words
        if "/" not in words[at]:
            __import__(words[at][:-3]).parse_args(words[at + 1:])
    files = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M)
    assert len(files) == 5
    for name, lines in files:
        assert len(open(os.path.join(HERE, name)).read().splitlines()) == int(lines), name
    done = script(sys.executable, "experiments/results_check.py")
    assert done.returncode == 0, done.stderr
