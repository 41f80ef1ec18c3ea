"""Derives the README's numbers from results/ once more, and fails where one differs or comes from nowhere.

    python experiments/results_check.py            make results-check

Every claim below is a piece of the README with its numbers put in from the files. A number with two decimals or more that no claim covers is an error too.
"""
import json
import os
import re
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from experiments.ablate import GVMS
from experiments.seeds import interval

ELSEWHERE = [
    "Python 3.11", "after 800 it had 0.831", r"kl_coef 0\.0\d", r"\d{4}\.\d{5}", "0.0001 B clip",
    "under 0.15", "0.57 and 0.66 for its 3B, 0.69 and 0.77 for its 8B", "TD.lambda. with lambda 0.95"
]  # papers; settings that stand in the code; the paper's table 3; an older results/theorem.md, see results/README.md


def read(name):
    with open(os.path.join(ROOT, "results", name)) as f:
        return json.load(f)


def spread(values, digits=3):
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def demo():
    for r in read("demo.json"):
        steps = [f"{r[k]:.0f}" if k in r else "" for k in ("steps_90", "seconds_90", "seconds")]
        yield "| " + " | ".join([
            r["stage"], f"{r['gold']:.3f}", f"{r['kl']:.2f}", *steps, f"{r['held']:,}", f"{r['trained']:,}"
        ]) + " |"


def toy():
    d, ceiling = read("toy.json"), read("gvm_ceiling.json")
    rows = d["seeds"]
    yield f"{len(rows)} seeds that no setting was chosen on, {rows[0]['dvpo']['steps']} steps"
    yield f"| SFT | | {spread([r['sft']['gold'] for r in rows])} | 0 |"

    def ends(name, key="final"):
        return [r[name][key] for r in rows]

    for name, said in ("dvpo", "DVPO"), ("dvpo_no_tau", "DVPO, GVM without a tau"), ("ppo", "PPO"):
        yield f"| {said} | {spread(ends(name))} | {spread(ends(name, 'heldout'))} | {np.mean(ends(name, 'kl')):.2f} |"

    def apart(a, b, sign="+"):
        return interval(np.subtract(ends(a), ends(b)), 3, sign)

    yield f"PPO ends {apart('ppo', 'dvpo', '')} above DVPO"

    def reach(share, name, i):
        return interval([x[name][i] / x["ppo"][i] for x in d["reach"][share] if x[name] and x["ppo"]])

    yield f"To 80 % of PPO's gain DVPO takes {reach('0.8', 'dvpo', 0)} times PPO's steps and {reach('0.8', 'dvpo', 1)} of its seconds"
    yield f"it reaches in {sum(x['dvpo'] is not None for x in d['reach']['1.0'])} of {len(rows)} seeds, in {reach('1.0', 'dvpo', 0)} times the steps"
    default, best = {}, {}
    for stage in ("dvpo", "ppo_baseline"):
        cells = [c for c in d["tuning"] if c["stage"] == stage]
        default[stage], best[stage] = next(c["final"] for c in cells
                                           if (c["lr"], c["kl_coef"]) == (3e-4, 0.1)), max(c["final"]
                                                                                           for c in cells)
    yield f"DVPO has {default['dvpo']:.3f} at the default and {best['dvpo']:.3f} at best, PPO {default['ppo_baseline']:.3f} and {best['ppo_baseline']:.3f}"
    draws = [read(name)["seeds"] for name in ("toy_before.json", "toy_constant_lr.json")]

    def twice(name):
        return " and ".join(f"{np.mean([r[name]['final'] for r in draw]):.3f}" for draw in draws)

    yield f"the same seeds ended at {twice('dvpo')}, PPO at {twice('ppo')}, DVPO without a tau at {twice('dvpo_no_tau')}"
    gvm = [r["gvm"] for r in rows]
    yield f"pair accuracy of the mean token value {spread([g['accuracy']['mean'] for g in gvm])[:-1]}; the exact values themselves score {ceiling['accuracy']['mean']:.3f}"
    yield f"correlation with the exact Q {spread([g['true_q']['correlation'] for g in gvm])}"
    yield f"in the right order in {sum(g['v0_ranks_all_policies'] for g in gvm)} of {len(gvm)} seeds"
    bare = [r["gvm_no_tau"] for r in rows]
    yield f"its correlation with the exact Q is {np.mean([g['true_q']['correlation'] for g in bare]):.3f}; its pair accuracy, which rewards knowing the answer and not the author, is {np.mean([g['accuracy']['mean'] for g in bare]):.3f}"
    yield (
        f"DVPO behind it ends {apart('dvpo_no_tau', 'dvpo')} higher, {apart('dvpo_no_tau', 'ppo')} above PPO, and comes to 80 % of PPO's gain in {reach('0.8', 'dvpo_no_tau', 0)} of PPO's steps, "
        f"to its whole final reward in {reach('1.0', 'dvpo_no_tau', 0)} of its steps and {reach('1.0', 'dvpo_no_tau', 1)} of its seconds"
    )
    near = "dvpo_no_tau_kl0.2"
    yield f"it ends at {np.mean(ends(near)):.3f} at KL {np.mean(ends(near, 'kl')):.2f} and needs {reach('0.8', near, 0)} and {reach('1.0', near, 0)} of the steps"


def last_update():
    last, decay = read("last_update.json"), read("lr_decay.json")

    def fresh(step):
        return f"{last['fresh'][step]['gold']:.3f}"

    yield f"from {last['steps'][4]['kl']:.2f} to {last['fresh']['150']['kl']:.2f} nats, fresh answers {fresh('150')}; a step later they are at {fresh('151')}, two later at {fresh('152')}"

    def leaps(runs, kind):
        return sum(r["spikes"] for kinds in runs.values() for r in kinds[kind])

    runs, unseen = decay["runs"], decay["unseen"]["runs"]
    yield f"by a kl_step beyond 0.006 after the thirtieth, are {leaps(runs, 'decay')} in {3 * len(decay['seeds'])} runs, {leaps(runs, 'constant')} at a constant lr"
    yield f"{leaps(unseen, 'decay')} and {leaps(unseen, 'constant')} in {3 * len(decay['unseen']['seeds'])} runs"

    def change(name):
        return interval(
            [a["final"] - b["final"] for a, b in zip(unseen[name]["decay"], unseen[name]["constant"])], 3,
            "+")

    yield f"{change('dvpo')} for DVPO, {change('dvpo_no_tau')} without a tau, {change('ppo')} for PPO"


def exact():
    d = read("exact.json")

    def ends(name, key):
        return [r[key] for r in d["runs"][name]["exact"]]

    def mean(name, key):
        return np.mean(ends(name, key))

    yield f"DVPO ends at {mean('dvpo', 'final'):.3f} (fresh answers {mean('dvpo', 'heldout'):.3f}) at KL {mean('dvpo', 'kl'):.2f} with a tau and at {mean('dvpo_no_tau', 'final'):.3f} at KL {mean('dvpo_no_tau', 'kl'):.2f} without"
    yield f"reward model at {mean('ppo', 'final'):.3f}, DVPO's lead {interval(np.subtract(ends('dvpo', 'final'), ends('ppo', 'final')), 3)}"

    def change(name, word, i):
        return abs(np.mean([seed[word][i] for seed in d["blunders"][name]]))

    yield f"breaks costs {change('gvm', 'broken', 2):.2f}; the GVM behind the expert's tau takes off {change('gvm', 'broken', 1):.2f}, without a tau {change('gvm_no_tau', 'broken', 1):.2f}"
    yield f"costs {change('gvm', 'wrong noun', 2):.2f}, and they take off {change('gvm', 'wrong noun', 1):.2f} and {change('gvm_no_tau', 'wrong noun', 1):.2f}"
    yield f"{change('gvm', 'unkind', 1):.2f} of {change('gvm', 'unkind', 2):.2f}"
    yield f"come once in {4000 / np.mean([seed['broken'][0] + seed['wrong noun'][0] for seed in d['blunders']['gvm']]):.0f} of the expert's answers"
    yield f"a correlation of {np.mean([r['gvm']['true_q']['correlation'] for r in read('toy.json')['seeds']]):.3f} hides"


def real_text():
    d = read("real_text.json")
    runs = {(r["tau_pairs"], r["batch_norm"], r["td_lambda"], r["seed"]): r for r in d["runs"]}

    def mean(*key):
        return runs[key]["accuracy"]["mean"]

    three = [mean(2, False, 1, s) for s in (1, 2, 3)]
    yield f"Accuracy over {d['runs'][0]['pairs']:,} pairs"
    yield f"{np.mean(three):.3f} with two pairs of tau (three seeds, {min(three):.3f} to {max(three):.3f})"
    yield f"{mean(0, False, 1, 1):.3f} without tau, {mean(0, True, 1, 1):.3f} without tau and with batch norm"
    yield f"V(s_0 | tau) correlates {np.mean([runs[2, False, 1, s]['v0_correlation'] for s in (1, 2, 3)]):.2f}"
    marks = d["yardsticks"]
    yield f"\"the longer answer wins\" {marks['longer_wins']:.3f} ({marks['longer_wins_seen_behind_0']:.3f} at the lengths a GVM without tau sees, {marks['longer_wins_seen_behind_2']:.3f} behind two pairs)"
    yield f"better average wins\" {marks['better_average_wins']:.3f}"
    yield f"td_lambda 0.95 gave {mean(2, False, 0.95, 1):.3f} where 1 gave {mean(2, False, 1, 1):.3f} (one seed)"


def cost():
    d = read("bench_cpu.json")
    big, want = (d["steps"]["124M, 8 rows, 64 + 128 tokens"][k] for k in ("measured", "predicted"))
    for name, method in ("PPO", "ppo"), ("DVPO", "dvpo"), ("DVPO `--lora`", "lora"):
        r, ppo = big[method], big["ppo"]
        ratios = [
            f"{r['sec_step'] / ppo['sec_step']:.3f}", f"{want[method]['step'] / want['ppo']['step']:.3f}"
        ] if method != "ppo" else ["", ""]
        yield "| " + " | ".join([
            name, f"{r['sec_step']:.1f}", *ratios, f"{r['peak'] / 2**20:,.0f}",
            f"{r['peak'] / ppo['peak']:.3f}" if method != "ppo" else ""
        ]) + " |"
    for part, said in ("", "our PPO takes {} of its time and {} of its memory, DVPO {} and {}"), (
            " at most", "our PPO takes {} and {}, DVPO {} and {}"):
        small = d["steps"]["14M, 16 rows, 32 + 64 tokens" + part]["measured"]
        yield said.format(*(f"{small[m][k] / small['trl'][k]:.2f}" for m in ("ppo", "dvpo")
                            for k in ("sec_step", "peak")))
    mixed = d["steps"]["124M, 8 rows, 64 + 128 tokens at most"]["measured"]
    yield f"DVPO {mixed['dvpo']['sec_step'] / mixed['ppo']['sec_step']:.3f} of PPO's, `--lora` {mixed['lora']['sec_step'] / mixed['ppo']['sec_step']:.3f}"
    ways = [r["seconds"] for r in d["attention"]["shapes"]["llama3-3b"]["ways"].values()]
    yield f"{ways[0] / ways[2]:.0f} times as long"
    off = [abs(r["planned"] / r["peak"] - 1) for p in d["growth"]["points"] for r in p["measured"].values()]
    yield f"the plan of memory is within {max(off):.0%} of the peak".replace("%", " %")
    shapes = d["decode"]["shapes"]
    yield f"{shapes['124M']['ratio']:.2f} times as fast as transformers' `generate` at 124M, {shapes['tiny']['ratio']:.2f} times at the toy's size"


def plans():
    found = read("bench_cpu.json")["plans"]["plans"]
    for shape in ("llama3-3b", "llama3-8b"):
        for ranks, zero in (1, 1), (8, 1), (8, 3):
            total = {(p["method"], p["gradient_checkpointing"]): f"{p['total'] / 2**30:.1f}"
                     for p in found if (p["shape"], p["ranks"], p["zero"]) == (shape, ranks, zero)}
            yield f"| {shape} | {ranks} | {zero} | " + " | ".join(f"{total[m, False]} ({total[m, True]})"
                                                                  for m in ("ppo", "dvpo", "lora")) + " |"


def soak():
    d = read("soak.json")
    yield f"{sum(r['kills'] for r in d['kills'])} kills at random moments over all four stages ([results/soak.md](results/soak.md)): {sum(r['equal'] for r in d['kills'])} of {len(d['kills'])} stages"
    yield f"at most {max(max(r['lost']) for r in d['kills'] if r['lost'])} steps to do again"
    yield f"{d['long']['steps']:,} steps of DVPO: memory {d['long']['first_mb']:.0f} to {d['long']['last_mb']:.0f} MB"


def ablations():
    d = read("ablations.json")
    runs = d["runs"]

    def mean(name, key):
        return np.mean([r[key] for r in runs[name]])

    def change(name):
        return interval([r["heldout"] - b["heldout"] for r, b in zip(runs[name], runs["unchanged"])], 3, "+")

    yield f"{len(d['seeds'])} seeds, {d['gvm_steps']} steps a GVM, {d['steps']} rollout steps"
    yield f"unchanged run of the same seed, {mean('unchanged', 'heldout'):.3f} on average"
    yield f"td_lambda 0, the paper's: {change('td_lambda 0')}"
    yield f"0.5: {change('td_lambda 0.5')}; 0.9: {change('td_lambda 0.9')}; 1: {change('td_lambda 1')}"
    yield f"Batch norm: {change('batch norm')}. `--advantage q`: {change('advantage q')}. kl_coef 0.05: {change('kl_coef 0.05')}; 0.2: {change('kl_coef 0.2')}"
    yield f"none {change('tau 0')}, one {change('tau 1')}, three {change('tau 3')}"
    yield f"(KL {mean('tau 0', 'heldout_kl'):.2f} against {mean('unchanged', 'heldout_kl'):.2f})"
    yield f"behind a tau (KL {mean('kl_coef 0.05', 'heldout_kl'):.2f})"
    yield f"runs away (KL {mean('kl_coef 0.02', 'heldout_kl'):.2f}) and fools the frozen GVM: {change('kl_coef 0.02')}, without tau {change('tau 0, kl_coef 0.02')}"
    yield f"does not stop that: {change('retrained, kl_coef 0.02')}"
    moved = {k: np.mean(v) for k, v in d["moved_accuracy"].items()}
    yield f"{moved['unchanged']:.3f} of pairs right, without tau {moved['tau 0']:.3f}, {moved['retrained']:.3f} where it was retrained"
    yield f"over {sum(len(v) for k, v in runs.items() if k in GVMS)} runs, correlates {d['q_correlation_against_reward']:.2f} with the reward"


def theorem():
    d = read("theorem.json")

    def mean(n, signal, key):
        return np.mean([r[key] for r in d["gradients"] if (r["n"], r["signal"]) == (n, signal)])

    sizes = sorted({r["n"] for r in d["gradients"] if r["n"]})

    def series(f):
        return " / ".join(f"{f(n):.3f}" for n in sizes)

    yield f"nine times over {' / '.join(f'{n:,}' for n in sizes)} rows"
    yield f"cosine with the gold reward's: reward model {series(lambda n: mean(n, 'reward model', 'gold'))}, GVM {series(lambda n: mean(n, 'GVM, delta', 'gold'))}"
    yield f"with each other {series(lambda n: mean(n, 'GVM, delta', 'reward_model'))}"
    yield f"correlates with the true one by {series(lambda n: np.mean([r['correlation'] for r in d['read_back'] if r['n'] == n]))}"
    halves = [
        np.mean([r["halves"] for r in d["gradients"] if r["signal"] == "gold"]),
        mean(30000, "GVM, delta", "halves")
    ]
    yield f"{halves[0]:.3f} for the gold reward and {halves[1]:.3f} for the GVM"


CLAIMS = (demo, toy, last_update, exact, real_text, cost, plans, soak, ablations, theorem)


def main():
    with open(os.path.join(ROOT, "README.md")) as f:
        text = re.sub(r"\s+", " ", f.read())
    rest, wrong, n = text, [], 0
    for part in CLAIMS:
        for claim in part():
            claim, n = re.sub(r"\s+", " ", claim), n + 1
            if claim in text:
                rest = rest.replace(claim, " ")
            else:
                wrong.append(f"{part.__name__}: README.md does not say: {claim}")
    for pattern in ELSEWHERE:
        rest = re.sub(pattern, " ", rest)
    wrong += [
        f"from nowhere: {m.group()} in: ... {rest[max(0, m.start() - 60):m.end() + 30]} ..."
        for m in re.finditer(r"(?<![\w.])\d+\.\d\d+", rest)
    ]
    if wrong:
        sys.exit("error: " + "\n       ".join(wrong))
    print(f"{n} claims of README.md hold")


if __name__ == "__main__":
    main()
