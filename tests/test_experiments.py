import argparse
import importlib

import pytest

from experiments import run as experiments


def test_half_a_line_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    assert experiments.read_lines(tmp_path / "metrics.jsonl") == [dict(step=0)]


def test_interval_by_hand():
    interval = experiments.interval
    assert interval([1, 2, 3]) == "2.00 ± 2.48"         # sd 1, t(2 degrees of freedom) 4.303 / sqrt(3)
    assert interval([0.5, -0.25], 3, "+") == "+0.125 ± 4.766"
    assert interval([0.7]) == "0.70" and interval([]) == "never"


def test_commands_of_the_experiments():
    """Scripts understand every command of the tables. On the toy a name has one command."""
    commands = list(experiments.MODELS.values())
    on_the_toy = {}
    for experiment, (_, runs) in experiments.EXPERIMENTS.items():
        commands += runs.values()
        for run, command in runs.items():
            assert experiment in experiments.MADE or on_the_toy.setdefault(run, command) == command, run
    names = {name: "out" for name in experiments.MODELS}
    for command in commands:
        script, *flags = command.format(root="out", **names).split()
        stage = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        stage.parse_args(flags)


def test_models_of_a_command():
    assert experiments.models_of(experiments.PPO + " --critic-from gvm") == ["gvm", "rm"]
    assert experiments.models_of("dvpo.py --tau-pairs 0") == []


def test_folders():
    assert experiments.folder_of("kl", "DVPO, from 0.05", 11) == "out/seeds/11/runs/dvpo_from_0_05"
    assert experiments.folder_of("smollm2", "DVPO", 1) == "out/smollm2/dvpo"            # as `make` names it
    assert experiments.folder_of("smollm2", "DVPO --lora", 2) == "out/smollm2/dvpo_lora_2"


def test_page_of_an_experiment_by_hand():
    """Two seeds: PPO goes from 0 to 1 in steps of 0.1, DVPO is there at once."""
    def run(gold, late, fresh, kl, ended, step_seconds):
        return dict(gold=gold, late=dict(gold=late, kl=kl, ended=ended), step_seconds=step_seconds,
                    fresh=dict(gold=fresh, kl=kl, ended=ended, length=8.0),
                    distinct=0.5, samples=[], peak_mb=99.0)

    slow = [i / 10 for i in range(11)]
    fast = [run([1.0] * 11, late, 0.5, 1.0, 0.75, 0.25) for late in (1.0, 0.5)]
    runs = {"DVPO": dict(enumerate(fast)), "PPO": dict(enumerate([run(slow, 1.0, 0.25, 2.0, 1.0, 0.5)] * 2))}
    gvm = dict(updates=9, seconds=10.0, q_std=0.5, mean=0.75, last=0.875, v0=1.0, penalty=0.5, truth=0.5)
    models = {"gvm": [gvm] * 2, "rm": [dict(updates=9, seconds=20.0, last=0.5)] * 2}
    about = dict(title="By hand", command="c", commit="x", machine="m", commands=dict(DVPO="d"))
    page = "\n".join(experiments.page(dict(about, runs=runs, models=models, before=dict(gold=0.125))))
    assert "| before RL |  | 0.125 |  | 0.00 |  |  |  |  |  |" in page
    # A quarter of the answers pays the penalty of 0.5
    assert "| DVPO | 2 | 0.500 | 0.375 | 1.00 | 0.75 | 8.0 | 0.50 | 0.25 | 99 |" in page
    # 12.71 * 0.3536 / sqrt(2)
    assert "| DVPO | 0.750 ± 3.178 | 1.00 ± 0.00 | 0.500 ± 0.000 | 1.00 ± 0.00 |  | 5 ± 0 |" in page
    # Means of five steps reach 0.8 at the steps 0.6 to 1.0, the eleventh
    assert "| 0.250 ± 0.000 | 2.00 ± 0.00 | +0.250 ± 3.178 | 11 ± 0 |" in page
    assert "| `gvm` | 9 ± 0 | 10 ± 0 | 0.500 ± 0.000 | 0.750 ± 0.000 | 0.875 ± 0.000 |" in page
    assert "| `rm` | 9 ± 0 | 20 ± 0 |  |  | 0.500 ± 0.000 |  |  |" in page


def test_a_stopped_stage_is_not_done(tmp_path, monkeypatch):
    """A stage that was told to stop exits with 0, too: it counts only once it has measured itself."""
    calls = []

    def run(words, **_):
        calls.append(words)
        return argparse.Namespace(returncode=failure, stdout="")

    failure = 0
    monkeypatch.setattr(experiments, "commit", lambda: "x")
    monkeypatch.setattr(experiments.subprocess, "run", run)
    out = str(tmp_path / "run")
    with pytest.raises(SystemExit, match="was stopped"):
        experiments.train("methods", 3, out, "dvpo.py --gvm {gvm} --lr 1")
    assert "--gvm out/seeds/3/gvm/model --lr 1 --seed 3" in " ".join(calls[0])
    failure = 1
    with pytest.raises(SystemExit, match="dvpo.py failed; see .*run.log"):
        experiments.train("methods", 3, out, "dvpo.py --gvm {gvm} --lr 1")
    (tmp_path / "run" / "summary.json").write_text("{}")
    experiments.train("methods", 3, out, "dvpo.py --gvm {gvm} --lr 1")
    assert len(calls) == 2
    with pytest.raises(SystemExit, match="holds another run"):
        experiments.train("methods", 3, out, "dvpo.py --gvm {gvm} --lr 2")


def test_pages_name_their_numbers(tmp_path, monkeypatch):
    """A wrong table and a number that no page has are both found."""
    import pages

    (tmp_path / "results").mkdir()
    (tmp_path / "results/a.md").write_text("# A\n\n## Runs\n\n| x |\n| --- |\n| 0.123 |\n\nmore\n")
    monkeypatch.setattr(pages, "ROOT", str(tmp_path))
    text = "## S\n\n<!-- a.md: Runs -->\n| x |\n| --- |\n| 0.124 |\n\nIt is 0.123, in a.md, not 0.99.\n"
    assert "| 0.123 |\n\nIt" in pages.with_tables(text)
    assert pages.strangers(pages.with_tables(text)) == ["0.99"]
    with pytest.raises(SystemExit, match="no heading"):
        pages.source_table("a.md", "Other")
