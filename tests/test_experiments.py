import importlib

import pytest


def test_interval_by_hand():
    from experiments.shared import interval

    assert interval([1, 2, 3]) == "2.00 ± 2.48"         # sd 1, t(2 degrees of freedom) 4.303 / sqrt(3)
    assert interval([0.5, -0.25], 3, "+") == "+0.125 ± 4.766"
    assert interval([0.7]) == "0.70" and interval([]) == "never"


def test_commands_of_the_experiments():
    """Every command of the toy's and of SmolLM2's tables is one that its script understands."""
    from experiments import smollm2
    from experiments import toy as toy_runs

    commands = [command for _, runs in toy_runs.EXPERIMENTS.values() for command in runs.values()]
    commands += [*toy_runs.MODELS.values(), *(command for _, command, _ in smollm2.RUNS.values())]
    names = {name: "out" for name in toy_runs.MODELS}
    for command in commands:
        script, *flags = command.format(root="out", **names).split()
        importlib.import_module(script_name(script)).parse_args(flags)


def script_name(path):
    return path.removesuffix(".py").replace("/", ".")


def test_models_of_a_command():
    from experiments import toy as toy_runs

    assert toy_runs.models_of(toy_runs.PPO + " --critic-from gvm") == ["gvm", "rm"]
    assert toy_runs.models_of("dvpo.py --tau-pairs 0") == []


def test_page_of_an_experiment_by_hand():
    """Two seeds: PPO goes from 0 to 1 in steps of 0.1, DVPO is there at once."""
    from experiments import toy as toy_runs

    slow = [i / 10 for i in range(11)]
    dvpo_run = dict(heldout=0.5, kl=1.0, step_seconds=0.25, gold=[1.0] * 11)
    runs = {"DVPO": [dict(dvpo_run, final=1.0), dict(dvpo_run, final=0.5)],
            "PPO": [dict(first=0.0, final=1.0, heldout=0.25, kl=2.0, step_seconds=0.5, gold=slow)] * 2}
    models = {"gvm": [dict(seconds=10.0, accuracy=0.75, correlation=0.5)] * 2,
              "rm": [dict(seconds=20.0, accuracy=0.5)] * 2}
    about = dict(title="By hand", seeds=[1, 2], command="c", commit="x", machine="m", commands=dict(DVPO="d"))
    page = "\n".join(toy_runs.page(dict(about, runs=runs, models=models)))
    # 12.71 * 0.3536 / sqrt(2)
    assert "| DVPO | 0.750 ± 3.178 | 0.500 ± 0.000 | 1.00 ± 0.00 |  | 5 ± 0 | 0.25 ± 0.00 |" in page
    # Means of five steps reach 0.8 at the steps 0.6 to 1.0, the eleventh
    assert "| PPO | 1.000 ± 0.000 | 0.250 ± 0.000 | 2.00 ± 0.00 | +0.250 ± 3.178 | 11 ± 0 |" in page
    assert "| `gvm` | 10 ± 0 | 0.750 ± 0.000 | 0.500 ± 0.000 |" in page
    assert "| `rm` | 20 ± 0 | 0.500 ± 0.000 |  |" in page


def test_a_stopped_stage_is_not_done(tmp_path, monkeypatch):
    """A stage that was told to stop exits with 0, too: it counts only once it has measured itself."""
    from experiments import shared

    monkeypatch.setattr(shared.subprocess, "run", lambda *_, **__: None)
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match="was stopped"):
        shared.stage("dvpo.py", str(out), "--lr", 1)
    (out / "summary.json").write_text("{}")
    shared.stage("dvpo.py", str(out), "--lr", 1)
    assert (out / "done").read_text() == "--lr 1"
    with pytest.raises(SystemExit, match="other flags"):
        shared.stage("dvpo.py", str(out), "--lr", 2)


def test_pages_name_their_numbers(tmp_path, monkeypatch):
    """A wrong table and a number that no page has are both found."""
    from experiments import pages

    (tmp_path / "results").mkdir()
    (tmp_path / "results/a.md").write_text("# A\n\n## Runs\n\n| x |\n| --- |\n| 0.123 |\n\nmore\n")
    monkeypatch.setattr(pages, "ROOT", str(tmp_path))
    text = "## S\n\n<!-- a.md: Runs -->\n| x |\n| --- |\n| 0.124 |\n\nIt is 0.123, in a.md, not 0.99.\n"
    assert "| 0.123 |\n\nIt" in pages.with_tables(text)
    assert pages.strangers(pages.with_tables(text)) == ["0.99"]
    with pytest.raises(SystemExit, match="no heading"):
        pages.source_table("a.md", "Other")
