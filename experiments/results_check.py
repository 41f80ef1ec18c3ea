"""Derives the numbers of README.md, docs/ and results/README.md from results/*.json once more.

    python experiments/results_check.py            make results-check

Every claim is a piece of these pages with its numbers put in from the files. The check fails if a claim is
not in the text, or if a number with two or more decimals is in no claim.
"""
import glob
import json
import os
import re
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from experiments import smollm2
from experiments.ablate import GVMS
from experiments.critic import RUNS as CRITIC_RUNS
from experiments.shared import interval, window_means
from experiments.side_by_side import EQUAL_KL, LABELS, METHODS, at_kl, curve

NOT_KEPT = "# Numbers whose runs are not kept"          # the last section of results/README.md has no files
KNOWN = [                                               # numbers that results/ does not hold
    r"Python 3\.11",
    r"TRL 1\.16",
    r"\d{4}\.\d{5}",                                    # arXiv
    r"0\.57 and 0\.66 of PPO's time and memory for its 3B",        # the paper's table 3
    r"0\.69 and 0\.77 for its 8B",
    r"kl_coef 0\.0\d",                                  # settings, here and below
    r"lambda 0\.95",
    r"accuracy of 0\.88 over all pairs was hoped for",
    r"above 0\.88 without a tau",
    r"at 0\.95 on the same",
    r"kl_step above 0\.006",
    r"entropy below 0\.02",                             # runtime/metrics.py, here and below
    r"at least 0\.05 lower",
    r"from 0\.05",                                      # settings of RL runs
    r"--kl-coef 0\.05",
    r"under 0\.15, where the inner epochs stop",
]


def read(name):
    with open(os.path.join(ROOT, "results", name)) as f:
        return json.load(f)


def spread(values):
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def demo():
    for r in read("demo.json"):
        keys = "steps_90", "seconds_90", "seconds"
        steps, there, seconds = (f"{r[key]:.0f}" if key in r else "" for key in keys)
        held, trained = f"{r['held']:,}", f"{r['trained']:,}"
        begin = [r["stage"], f"{r['gold']:.3f}", f"{r['kl']:.2f}", steps]
        yield row(*begin, there, seconds, held, trained)
    gold = {r["stage"]: f"{r['gold']:.3f}" for r in read("demo.json")}
    yield f"gold reward of {gold['DVPO']} (DVPO) and {gold['PPO']} (PPO), from {gold['SFT']} after SFT"


class Toy:
    """results/toy.json, by the name of a run."""

    def __init__(self):
        self.data = read("toy.json")
        self.seeds = self.data["seeds"]

    def values(self, name, key="final"):
        return [seed[name][key] for seed in self.seeds]

    def mean(self, name, key="final"):
        return float(np.mean(self.values(name, key)))

    def apart(self, name, other, sign="+"):
        return interval(np.subtract(self.values(name), self.values(other)), 3, sign)

    def reach(self, share, name, what):
        """Steps (what 0) or seconds (what 1) until `share` of PPO's gain, of PPO's."""
        both = [seed for seed in self.data["reach"][share] if seed[name] and seed["ppo"]]
        return interval([seed[name][what] / seed["ppo"][what] for seed in both])


def embedded_world():
    toy = Toy()
    sft = [seed["sft"]["gold"] for seed in toy.seeds]
    n, steps = len(toy.seeds), toy.seeds[0]["dvpo"]["steps"]
    yield f"{n} seeds that no setting was chosen on, {steps} steps"
    yield row("SFT", "", spread(sft), "0").replace("|  |", "| |")
    for name, label in ("dvpo", "DVPO"), ("dvpo_no_tau", "DVPO without a tau"), ("ppo", "PPO"):
        final, fresh = toy.values(name), toy.values(name, "heldout")
        yield row(label, spread(final), spread(fresh), f"{toy.mean(name, 'kl'):.2f}")
    yield f"DVPO ends {toy.apart('dvpo', 'ppo', '')} above PPO"
    yield f"To 80 % of PPO's gain DVPO takes {toy.reach('0.8', 'dvpo', 0)} times PPO's steps"
    there = sum(seed["dvpo"] is not None for seed in toy.data["reach"]["1.0"])
    yield f"It reaches PPO's whole final reward in {there} of {n} seeds"
    yield f"in {toy.reach('1.0', 'dvpo', 0)} times the steps"
    yield f"gold reward (SFT {np.mean(sft):.3f})"
    kl = toy.mean("dvpo_kl0.15", "kl")
    yield f"At kl_coef 0.15 DVPO ends at {toy.mean('dvpo_kl0.15'):.3f} with KL {kl:.2f}"
    yield f"{toy.apart('dvpo_kl0.15', 'ppo', '')} above PPO"


def gvm_cost():
    data = read("gvm_cost.json")
    for epochs in "0.5", "1", "1.5", "3":
        runs = data["gvm"][epochs]
        cells = [f"{np.mean([r['seconds'] for r in runs]):.0f}"]
        cells += [f"{np.mean(x):.3f}" for x in ([r["eval"]["accuracy"]["mean"] for r in runs],
                                                [r["eval"]["true_q"]["correlation"] for r in runs],
                                                [r["dvpo"]["final"] for r in runs])]
        yield row(f"GVM, {epochs} passes", *cells, f"{np.mean([r['dvpo']['kl'] for r in runs]):.2f}")
    for epochs in "1", "3":
        runs = data["rm"][epochs]
        numbers = [np.mean(x) for x in ([r["accuracy"] for r in runs], [r["ppo"]["final"] for r in runs])]
        cells = [f"{np.mean([r['seconds'] for r in runs]):.0f}", f"{numbers[0]:.3f}", "", f"{numbers[1]:.3f}"]
        yield row(f"reward model, {epochs} passes", *cells, f"{np.mean([r['ppo']['kl'] for r in runs]):.2f}")
    before, packed = (1000 * np.mean(data["timed"][name]) for name in ("before", "packed"))
    before, packed = before / 64, packed / 63           # rows per update
    yield f"{packed:.1f} ms per trained row, {before:.1f} with one tau per row"
    c = data["crossover"]
    yield f"{c['value']:.0f} seconds for the GVM, {c['reward']:.0f} for the reward model"
    yield f"{c['dvpo']:.2f} seconds per step of DVPO, {c['ppo']:.2f} of PPO"
    yield f"cheaper in all after {c['steps']:.0f} RL steps"


def comparators():
    data = read("comparators.json")
    for method, label in METHODS.items():
        runs, seconds = data["runs"][method], data["seconds"][method]
        gold, fresh, kl = ([r[key] for r in runs] for key in ("final", "heldout", "kl"))
        steps = [r["reach"] for r in runs if r["reach"]]
        there = [interval(steps, 0), f"{seconds * np.mean(steps):.1f}"] if steps else ["", ""]
        whole = f"{seconds * runs[0]['steps']:.0f}"
        yield row(label, interval(gold, 3), interval(fresh, 3), interval(kl), *there, whole)
        yield row(label, f"{np.mean(gold):.3f}", f"{np.mean(kl):.2f}")
    for method, points in data["curves"].items():
        by_kl = [at_kl(points, kl) for kl in EQUAL_KL]
        yield row(LABELS[method], *(f"{gold:.3f} at {kl:.2f}" for _, kl, gold in curve(points)), *by_kl)
    ahead, *others = (f"{LABELS[method]} {at_kl(data['curves'][method], EQUAL_KL[1])}"
                      for method in ("dvpo", "ppo", "dpo", "remax"))
    yield f"at {EQUAL_KL[1]} nats it has {ahead.split()[-1]}, {', '.join(others)}"


def earlier_draws():
    for name, label in ("dvpo", "DVPO ended"), ("ppo", "PPO"), ("dvpo_no_tau", "DVPO without a tau"):
        draws = [read(file)["seeds"] for file in ("toy_before.json", "toy_constant_lr.json")]
        before, after = (np.mean([seed[name]["final"] for seed in draw]) for draw in draws)
        yield f"{label} at {before:.3f} and {after:.3f}"


def gvm():
    toy, ceiling = Toy(), read("gvm_ceiling.json")["accuracy"]["mean"]
    found = [seed["gvm"] for seed in toy.seeds]
    yield f"by the mean token value, is {spread([g['accuracy']['mean'] for g in found])}"
    yield f"The exact values themselves score {ceiling:.3f}"
    correlations = [g["true_q"]["correlation"] for g in found]
    yield f"correlation with the exact Q is {spread(correlations)}"
    ranked = sum(g["v0_ranks_all_policies"] for g in found)
    yield f"puts the five behaviour policies in the right order in {ranked} of {len(found)} seeds"


def without_tau():
    toy = Toy()
    names = "dvpo", "dvpo_no_tau", "dvpo_no_tau_kl0.2"
    yield row("gold reward, last tenth of the steps", *(f"{toy.mean(name):.3f}" for name in names))
    yield row("KL, nats per response", *(f"{toy.mean(name, 'kl'):.2f}" for name in names))
    yield row("steps to 80 % of PPO's gain, PPO = 1", *(toy.reach("0.8", name, 0) for name in names))
    yield row("steps to PPO's final reward, PPO = 1", *(toy.reach("1.0", name, 0) for name in names))
    for group, key, label in (("true_q", "correlation", "correlation with the exact Q"),
                              ("accuracy", "mean", "pair accuracy")):
        tau = np.mean([seed["gvm"][group][key] for seed in toy.seeds])
        bare = np.mean([seed["gvm_no_tau"][group][key] for seed in toy.seeds])
        yield row(f"the GVM's {label}", f"{tau:.3f}", f"{bare:.3f}", f"{bare:.3f}")
    yield f"ends {toy.apart('dvpo_no_tau', 'dvpo')} from the run with tau"


def last_update():
    data = read("last_update.json")
    fresh = data["fresh"]
    for update, label in ("150", "150, the last"), ("151", "151"), ("152", "152"):
        yield row(label, f"{fresh[update]['gold']:.3f}", f"{fresh[update]['kl']:.2f}")
    yield f"took the KL from {data['steps'][4]['kl']:.2f} to {fresh['150']['kl']:.2f} nats per response"


def lr_decay():
    data = read("lr_decay.json")
    unseen = data["unseen"]
    for part, label in (data, "these five seeds"), (unseen, "four seeds that nobody had looked at"):
        spikes = []
        for kind in "constant", "decay":
            spikes.append(str(sum(run["spikes"] for kinds in part["runs"].values() for run in kinds[kind])))
        yield row(f"{label}, {3 * len(part['seeds'])} runs", *spikes)
    for name, label in ("dvpo", "for DVPO"), ("dvpo_no_tau", "without a tau"), ("ppo", "for PPO"):
        runs = unseen["runs"][name]
        change = [a["final"] - b["final"] for a, b in zip(runs["decay"], runs["constant"], strict=True)]
        yield f"{interval(change, 3, '+')} {label}"


def exact_values():
    data = read("exact.json")
    names = "dvpo", "dvpo_no_tau", "ppo"

    def ends(name, kind, key):
        return [run[key] for run in data["runs"][name][kind]]

    for kind, key, label, digits in (("learned", "final", "last tenth of the steps", 3),
                                     ("exact", "final", "last tenth of the steps", 3),
                                     ("exact", "heldout", "fresh answers", 3),
                                     ("exact", "kl", "KL, nats per response", 2)):
        yield row(f"{kind}: {label}", *(f"{np.mean(ends(name, kind, key)):.{digits}f}" for name in names))
    lead = np.subtract(ends("dvpo", "exact", "final"), ends("ppo", "exact", "final"))
    yield f"DVPO then leads PPO by {interval(lead, 3)}"


def head():
    heads = read("head.json")["heads"]
    plain, default = heads.values()
    for name, found in ("`--plain-head`, the paper's", plain), ("default", default):
        correlation = np.mean([gvm["true_q"]["correlation"] for gvm in found["gvm"]])
        values = [f"{np.mean([run[key] for run in found['dvpo']]):.3f}" for key in ("final", "heldout")]
        kl = np.mean([run["kl"] for run in found["dvpo"]])
        bare = np.mean([run["final"] for run in found["dvpo_no_tau"]])
        yield row(name, f"{correlation:.3f}", *values, f"{kl:.2f}", f"{bare:.3f}")
        if found is plain:
            yield row("DVPO, the paper's head", values[0], f"{kl:.2f}")
    change = np.subtract(*([run["final"] for run in found["dvpo"]] for found in (default, plain)))
    yield f"a KL of {np.mean([run['kl'] for run in default['dvpo']]):.2f} ([below]"
    yield f"The wider head is worth {interval(change, 3, '+')}"
    for word, label in (("unkind", "an unkind word"), ("broken", "a broken sentence"),
                        ("wrong noun", "a noun that nobody asked for"), ("early end", "an early end")):
        cells = [f"{np.mean([seed[word][2] for seed in plain['blunders with tau']]):+.2f}"]
        for found in plain, default:
            for name in "with tau", "without":
                cells.append(f"{np.mean([seed[word][1] for seed in found[f'blunders {name}']]):+.2f}")
        yield row(label, *cells)


def ablations():
    data = read("ablations.json")
    runs, base = data["runs"], data["runs"]["unchanged"]

    def mean(name, key):
        return np.mean([run[key] for run in runs[name]])

    yield f"{len(data['seeds'])} seeds, {data['gvm_steps']} steps per GVM"
    yield f"{data['steps']} rollout steps"
    yield f"ends at {mean('unchanged', 'heldout'):.3f} on average"
    yield f"with KL {mean('unchanged', 'heldout_kl'):.2f}"
    labels = {"td_lambda 0": "td_lambda 0, the paper's", "batch norm": "batch norm in the loss",
              "advantage q": "`--advantage q`", "tau 0": "no tau", "tau 1": "one pair in tau",
              "tau 3": "three pairs in tau", "tau 0, kl_coef 0.02": "kl_coef 0.02, no tau",
              "retrained, kl_coef 0.02": "kl_coef 0.02, retrained GVM"}
    for name in runs.keys() - {"unchanged"}:
        change = [run["heldout"] - same["heldout"] for run, same in zip(runs[name], base, strict=True)]
        yield row(labels.get(name, name), interval(change, 3, "+"), f"{mean(name, 'heldout_kl'):.2f}")
    moved = {name: np.mean(values) for name, values in data["moved_accuracy"].items()}
    yield f"the GVM has {moved['unchanged']:.3f} of pairs right, without tau {moved['tau 0']:.3f}"
    yield f"{moved['retrained']:.3f} where it was retrained"
    gvms = sum(len(values) for name, values in runs.items() if name in GVMS)
    yield f"over {gvms} runs, correlates {data['q_correlation_against_reward']:.2f} with the reward"


def theorem():
    data = read("theorem.json")
    sizes = sorted({run["n"] for run in data["gradients"] if run["n"]})

    def mean(n, signal, key):
        return np.mean([run[key] for run in data["gradients"] if (run["n"], run["signal"]) == (n, signal)])

    def cells(signal, key):
        return [f"{mean(n, signal, key):.3f}" for n in sizes]

    yield row("rows", *(f"{n:,}" for n in sizes))
    yield row("reward model and gold reward, cosine", *cells("reward model", "gold"))
    yield row("GVM and gold reward, cosine", *cells("GVM, delta", "gold"))
    yield row("GVM and reward model, cosine", *cells("GVM, delta", "reward_model"))
    found = []
    for n in sizes:
        found.append(f"{np.mean([run['correlation'] for run in data['read_back'] if run['n'] == n]):.3f}")
    yield row("reward read back from Q, correlation with the true one", *found)
    gold = np.mean([run["halves"] for run in data["gradients"] if run["signal"] == "gold"])
    yield f"{gold:.3f} for the gold reward and {mean(30000, 'GVM, delta', 'halves'):.3f} for the GVM"


def real_text():
    data = read("real_text.json")

    def cell(arm, key, k):
        return interval([run[key][k] for run in data["runs"] if run["arm"] == arm], 3)

    for k, part in enumerate(("all pairs", "left out")):
        columns = ("no tau", "mean"), ("tau", "mean"), ("tau", "v0")
        columns += ("pairs, +1 and -1", "mean"), ("pairs, Bradley-Terry", "last")
        yield row(part, *(cell(arm, key, k) for arm, key in columns))
        for title, found in data["gains"].items():
            gain = f"{found['mean'][k]:+.3f} ({found['low'][k]:+.3f} to {found['high'][k]:+.3f})"
            yield f"{title}: {gain} for all pairs" if k == 0 else f"{gain} for those left out"
            if title == "a tau" and k == 0:
                yield f"{gain} in the GVM's pair accuracy"
    for name, (every, left_out) in data["yardsticks"].items():
        of_all = data["yardsticks_of_all"][name]
        yield row(name, *(f"{x:.3f}" for x in (every, left_out, *of_all)))
    yield f"missed by {0.88 - float(cell('tau', 'mean', 0)[:5]):.3f}"
    yield f"the GVM on +1 and -1 is right in {cell('pairs, +1 and -1', 'last', 0)} of the pairs"
    gvms = [run for run in data["runs"] if not run["arm"].startswith("pairs")]
    yield f"right in {np.mean([run['last'][0] for run in gvms]):.2f} of the pairs"
    correlation = np.mean([run["v0_correlation"] for run in gvms if "v0_correlation" in run])
    yield f"V(s_0 | tau) correlates {correlation:.2f} with"


def cost():
    steps = read("bench_cpu.json")["steps"]
    big, counted = (steps["124M, 8 rows, 64 + 128 tokens"][key] for key in ("measured", "predicted"))
    time = {name: big[name]["sec_step"] / big["ppo"]["sec_step"] for name in big}
    memory = {name: big[name]["peak"] / big["ppo"]["peak"] for name in big}
    for name, label in ("ppo", "PPO"), ("dvpo", "DVPO"), ("lora", "DVPO `--lora`"):
        expected = counted[name]["step"] / counted["ppo"]["step"]
        seconds, peak = f"{big[name]['sec_step']:.1f}", f"{big[name]['peak'] / 2**20:,.0f}"
        ratios = [f"{time[name]:.3f}", f"{expected:.3f}", f"{memory[name]:.3f}"]
        if name == "ppo":
            ratios = [""] * 3
        yield row(label, seconds, *ratios[:2], peak, ratios[2])
    yield (f"DVPO takes {time['dvpo']:.3f} of PPO's time per step and {memory['dvpo']:.3f} of its memory; "
           f"`--lora` {time['lora']:.3f} and {memory['lora']:.3f}")
    for part, label in ("", "every answer has 64 tokens"), (" at most", "answers end where real ones do"):
        small = steps["14M, 16 rows, 32 + 64 tokens" + part]["measured"]
        cells = []
        for name in "ppo", "dvpo":
            time_to_trl = small[name]["sec_step"] / small["trl_ppo"]["sec_step"]
            memory_to_trl = small[name]["peak"] / small["trl_ppo"]["peak"]
            cells.append(f"{time_to_trl:.2f} and {memory_to_trl:.2f}")
        yield row(label, *cells)
    mixed = steps["124M, 8 rows, 64 + 128 tokens at most"]["measured"]
    dvpo, lora = (mixed[name]["sec_step"] / mixed["ppo"]["sec_step"] for name in ("dvpo", "lora"))
    yield f"leave DVPO {dvpo:.3f} of PPO's time, `--lora` {lora:.3f}"


def cost_on_gpus():
    """results/bench_gpu.json: a step of 3B on one card, and by it the hours of the paper's RL stage."""
    h200 = read("bench_gpu.json")["cards"]["NVIDIA H200, commit 4455f1d"]
    step = h200["steps"]["llama3-3b"]
    runs, cells, long = step["measured"], {}, []
    for name, label in ("dvpo", "DVPO"), ("lora", "DVPO `--lora`"), ("ppo", "PPO"):
        run = runs[name]
        gib, planned = (f"{run[key] / 2**30:.1f}" for key in ("peak", "planned"))
        cells[name] = f"{run['sec_step']:.1f}", gib
        long.append(f"{450 * 64 / step['rows'] * run['sec_step'] / 3600:.0f}")
        phases = [f"{run['sec_' + phase]:.2f}" for phase in ("generate", "score", "train")]
        share = f"{run['planned'] / run['peak']:.2f}"
        yield row(label, *phases, cells[name][0], gib, planned, share)
    both = "{} s and {} GiB ({})"
    each = (both.format(*cells[name], label) for name, label in
            (("dvpo", "DVPO"), ("lora", "`--lora`"), ("ppo", "PPO")))
    yield f"a step of {step['rows']} rollouts takes {', '.join(each)}"
    yield "the paper's RL stage there, computed: {}, {} and {} hours".format(*long)
    ppo = runs["ppo"]
    yield "DVPO takes {:.2f} of PPO's time and {:.2f} of its memory, `--lora` {:.2f} and {:.2f}".format(
        *(runs[name][key] / ppo[key] for name in ("dvpo", "lora") for key in ("sec_step", "peak")))
    token = h200["token"][0]
    least = 1000 * token["read"] / h200["rate"]["bandwidth"]
    yield f"takes {token['ms']:.1f} ms where reading weights and cache takes {least:.1f}"


def cost_of_comparators():
    steps = read("bench_cpu.json")["steps"]
    labels = METHODS | dict(lora="DVPO `--lora`")
    part = steps["14M, 16 rows, 32 + 64 tokens; comparators"]
    runs, counted = part["measured"], part["predicted"]
    for name, trl in dict(ppo="", dvpo="", lora="", grpo="trl_grpo", remax="", dpo="trl_dpo").items():
        run, beside = runs[name], ""
        if trl:
            ratios = [run[key] / runs[trl][key] for key in ("sec_step", "peak")]
            beside = "{:.2f} and {:.2f}".format(*ratios)
        ratios = ["", ""]
        if name != "ppo":
            ratios[0] = f"{run['sec_step'] / runs['ppo']['sec_step']:.3f}"
        if name != "ppo" and name in counted:
            ratios[1] = f"{counted[name]['step'] / counted['ppo']['step']:.3f}"
        yield row(labels[name], f"{run['sec_step']:.1f}", *ratios, f"{run['peak'] / 2**20:,.0f}", beside)
    big = steps["124M, 4 rows, 64 + 128 tokens; comparators"]["measured"]
    ratios = [f"{big[name]['sec_step'] / big['ppo']['sec_step']:.3f} of PPO's for {labels[name]}"
              for name in ("dvpo", "grpo", "remax", "dpo")]
    yield ", ".join(ratios)
    share = [run["planned"] / run["peak"] for run in big.values()]
    small = [run["planned"] / run["peak"] for run in runs.values() if "planned" in run]
    yield (f"it comes to {min(share):.2f} to {max(share):.2f} of the peak at 124M, {min(small):.2f} to "
           f"{max(small):.2f} at 14M")


def cost_of_parts():
    data, parts = read("bench_cpu.json"), read("bench_parts.json")
    ways = [way["seconds"] for way in parts["attention"]["shapes"]["llama3-3b"]["ways"].values()]
    yield f"{ways[0] / ways[2]:.0f} times as long"
    for shape, label in ("124M", "124M"), ("tiny", "toy"):
        ratio = data["decode"]["shapes"][shape]["ratio"]
        yield f"transformers' `generate`, {label} | {ratio:.2f} times as fast"
    measured = [run for point in parts["growth"]["points"] for run in point["measured"].values()]
    worst = max(abs(run["planned"] / run["peak"] - 1) for run in measured)
    yield f"is within {100 * worst:.0f} % of the peak"
    yield f"stayed within {100 * worst:.0f} % of the measured peak"


def long_rollout():
    data = read("long_rollout.json")
    for cells in window_means(data["runs"], data["new"]):
        yield row(*cells)
    growing, static = data["runs"].values()
    more = "{:.0f} % more, the static one {:.0f} %".format(
        *(100 * (run["held"][-1] / run["planned"] - 1) for run in (growing, static)))
    yield f"planned to hold {growing['planned']:.0f} MB; at the end the growing one holds {more}"
    short = read("bench_cpu.json")["decode"]["shapes"]["124M"]
    yield f"({short['static']:.2f} seconds against {short['rollout']:.2f}"
    yield f"{sum(static['seconds']):.0f} seconds for the whole rollout, against {sum(growing['seconds']):.0f}"
    last, first = (np.mean(growing["seconds"][part]) for part in (slice(-64, None), slice(64)))
    yield f"the last tokens take {last / first:.1f} times as long as the first"
    last, first = (np.mean(static["seconds"][part]) for part in (slice(-64, None), slice(64)))
    yield f"they take {last / first:.1f} times as long"


def plans():
    gib = {}
    for plan in read("bench_cpu.json")["plans"]["plans"]:
        keys = "shape", "ranks", "zero", "method", "gradient_checkpointing"
        gib[tuple(plan[key] for key in keys)] = plan["total"] / 2**30
    for shape in "llama3-3b", "llama3-8b":
        for setup in (1, 1), (8, 1), (8, 3):
            cells = []
            for method in "ppo", "dvpo", "lora":
                plain, checkpointing = gib[shape, *setup, method, False], gib[shape, *setup, method, True]
                cells.append(f"{plain:.1f} ({checkpointing:.1f})")
            yield row(shape, *map(str, setup), *cells)


def soak():
    data = read("soak.json")
    kills, long = data["kills"], data["long"]
    for stage in kills:
        equal = "yes" if stage["equal"] else "no"
        yield row(stage["stage"], str(stage["steps"]), str(stage["kills"]), str(max(stage["lost"])), equal)
    yield f"{sum(stage['kills'] for stage in kills)} kills with SIGKILL at random moments"
    yield f"metrics and weights of {sum(stage['equal'] for stage in kills)} of {len(kills)} stages"
    yield f"{long['steps']:,} steps of DVPO: memory {long['first_mb']:.0f} to {long['last_mb']:.0f} MB"
    yield f"{long['slope_kb_per_step']:.0f} kB per step"
    yield f"the launcher ended {data['rank']['seconds']:.0f} seconds later"


def real_language_model():
    """results/smollm2.json: the README's table, and what results/README.md says beside it."""
    data = read("smollm2.json")
    yield from (re.sub(r"\|  \|", "| |", line) for line in smollm2.headline(data))
    value = data["value"]
    last = value["gvm"]["accuracy"]["last"]
    yield f"The GVM took {value['gvm_seconds'] / 60:.0f} minutes of training and has {last:.3f} of held-out"
    yield f"the reward model took {value['rm_seconds'] / 60:.0f} minutes and has {value['rm_accuracy']:.3f}"
    titles = "lr 1e-3, rank 16", "lr 2e-6, rank 8, the paper's", "lr 1e-4, rank 8"
    for title, gvm in zip(titles, value["gvms"].values(), strict=True):
        accuracy = [f"{gvm['accuracy'][key]:.3f}" for key in ("mean", "last")]
        yield row(title, str(gvm["updates"]), f"{gvm['q_std']:.3f}", *accuracy)
    yield f"and {value['gvm']['accuracy']['mean']:.3f} by the mean over tokens"
    yield f"more ({value['rm_accuracy']:.3f} of held-out pairs; the GVM has {last:.3f} by the last token"
    heldout = {}
    for run in data["runs"]:
        heldout.setdefault(run["run"], []).append(run["heldout"]["gold"])
    behind = np.mean(np.subtract(heldout["ppo"], heldout["dvpo"]))
    yield f"higher** in two of three seeds, by {behind:.3f} on average"
    for run in data["runs"]:
        if "late" in run:
            late = run["late"]
            cells = f"{late['gold']:.3f}", f"{late['kl']:.2f}", f"{late['ended']:.2f}"
            yield row(smollm2.TITLES[run["run"]], str(run["seed"]), *cells)


def critic():
    """results/critic.json: gold reward of the last tenth, KL, and the difference to DVPO."""
    data = read("critic.json")
    best = [run["final"] for run in data["runs"]["dvpo_at_1.2"]]
    for name, (_, _, title) in CRITIC_RUNS.items():
        runs = data["runs"][name]
        cells = [interval([run["final"] for run in runs], 3), interval([run["kl"] for run in runs])]
        behind = np.subtract([run["final"] for run in runs], best)
        yield row(title, *cells, interval(behind, 3, "+") if name != "dvpo_at_1.2" else "")


def kl_target():
    """results/kl_target.json: where the KL ends, from a small and from a large coefficient."""
    for run in read("kl_target.json")["runs"]:
        cells = f"{run['kl_coef']:g}", f"{run['coef']:.3f}", f"{run['kl']:.2f}", f"{run['gold']:.3f}"
        yield row(run["method"], *cells)


CLAIMS = (real_language_model, critic, kl_target, demo, embedded_world, gvm_cost, comparators,
          earlier_draws, gvm, without_tau, last_update, lr_decay, exact_values, head, ablations, theorem,
          real_text, cost, cost_on_gpus, cost_of_comparators, cost_of_parts, long_rollout, plans, soak)


def pages():
    """README.md, docs/ and results/README.md as one text, with single spaces."""
    names = ["README.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT)), "results/README.md"]
    texts = []
    for name in names:
        with open(os.path.join(ROOT, name)) as f:
            texts.append(f.read().partition(NOT_KEPT)[0])
    return re.sub(r"\s+", " ", "\n".join(texts))


def main():
    text = pages()
    rest, wrong, n = text, [], 0
    for part in CLAIMS:
        for claim in part():
            claim, n = re.sub(r"\s+", " ", claim), n + 1
            if claim in text:
                rest = rest.replace(claim, " ")
            else:
                wrong.append(f"{part.__name__}: the pages do not say: {claim}")
    for pattern in KNOWN:
        rest = re.sub(pattern, " ", rest)
    for match in re.finditer(r"(?<![\w.])\d+\.\d\d+", rest):
        near = rest[max(0, match.start() - 60):match.end() + 30]
        wrong.append(f"from nowhere: {match.group()} in: ... {near} ...")
    if wrong:
        sys.exit("error: " + "\n       ".join(wrong))
    print(f"{n} claims of README.md, docs/ and results/README.md hold")


if __name__ == "__main__":
    main()
