"""comparators/: losses by hand, what is rolled out, learning, resume, two ranks."""
import argparse
import contextlib
import io
import json
import math
import os
from unittest import mock

import deepspeed
import pytest
import torch
from helpers import (
    RL,
    close,
    path,
    refused,
    rewind,
    run,
    same_run,
    tiny_gpt2,
    two_ranks,
    weights,
    world,
    zero_3,
)

import common
import ppo_baseline
from comparators import critic_free
from data import toy

GOLD = "--reward", "data/toy.py:gold_reward"
SMALL = "--batch-size", "16", "--mini-batch-size", "8", "--max-new-tokens", "16"
GRPO, REMAX = ("--method", "grpo"), ("--method", "remax")


def reward_model():
    """A reward model of three steps on the little world's SFT model -> its folder."""
    folder = path("comparators/rm/model")
    if not os.path.exists(folder):
        small = path("toy/pairs_small.jsonl")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ppo_baseline.main([*RL, "--pairs", small, "--pairs-heldout", small, "--rm", folder, "--rm-only",
                               "--rm-max-steps", "3", "--out", path("comparators/ppo")])
    assert not os.path.exists(path("comparators/ppo/metrics.jsonl"))        # no RL after it
    return folder


def cases():
    """Flags of four small steps with a checkpoint after two."""
    rl = *RL, *SMALL, "--max-steps", "4", "--save-every", "2"
    rm = "--rm", reward_model()
    return [(*REMAX, *rl, *rm), (*GRPO, *rl, *rm, "--grad-accum", "2")]


def test_losses_by_hand():
    logp = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -1.0, -9.0]], requires_grad=True)
    ref = torch.tensor([[-2.0, -2.0, -9.0], [-1.0, -50.0, -9.0]])           # a log-ratio is cut at 20
    weight = torch.tensor([[1.0, 1.0, 0.0]]).expand(2, 3)
    adv = torch.tensor([[-0.25 - 0.1, -0.25, 0.0], [2 + 0.2, 2 - 2.0, 0.0]])    # less 0.1 log-ratios
    loss = critic_free.reinforce_loss(logp, ref, torch.tensor([[-0.25], [2.0]]), weight, 0.1)
    close(loss, -(logp * adv).sum())
    close(torch.autograd.grad(loss, logp)[0], -adv)                         # the KL is in the reward
    # ratios 1.1 and 1.5 (clipped to 1.2); k3 is 0 and 2 - log 2 - 1
    args, old = argparse.Namespace(clip=0.2, kl_coef=0.1), torch.zeros(1, 3)
    logp = torch.tensor([[1.1, 1.5, 9.0]]).log()
    ref = logp + torch.tensor([[0.0, math.log(2), 3.0]])
    weight = torch.tensor([[0.5, 0.5, 0.0]])
    loss, stat = critic_free.clipped_loss(logp, old, ref, torch.ones(1, 1), weight, args.clip, args.kl_coef)
    close(loss, -(0.5 * 1.1 + 0.5 * (1.2 - 0.1 * (1 - math.log(2)))))
    close(stat["clip_frac"], 0.5)
    close(stat["ratio"], 1.3)
    loss, _ = critic_free.clipped_loss(logp, old, ref, -torch.ones(1, 1), weight, args.clip, args.kl_coef)
    close(loss, 0.5 * 1.1 + 0.5 * (1.5 + 0.1 * (1 - math.log(2))))


def test_group_advantage_by_hand():
    score, a = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0]), 0.5 / math.sqrt(1 / 3)
    adv, no_signal = critic_free.group_advantage(score, 4, "mean", "std")
    close(adv, [a, -a, -a, a, 0, 0, 0, 0], 1e-5)
    close(no_signal, 0.5)
    adv, _ = critic_free.group_advantage(score, 4, "loo", "none")           # 1 - (0 + 0 + 1) / 3
    close(adv, [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, 0, 0])
    adv, _ = critic_free.group_advantage(score, 4, "greedy", "none", torch.tensor([0.75, 3.0]))
    close(adv, [0.25, -0.75, -0.75, 0.25, -1, -1, -1, -1])
    adv, _ = critic_free.group_advantage(score[:2], 1, "greedy", "none", torch.tensor([0.75, -1.0]))
    close(adv, [0.25, 1.0])


def test_greedy_responses():
    """The last ones are the argmax at each token, whatever is sampled beside them."""
    tok, model = toy.tokenizer(), tiny_gpt2()
    args = argparse.Namespace(batch_size=2, temperature=1.0, max_new_tokens=24, static_cache=False)
    args = critic_free.with_greedy_rows(args, 2, "cpu")
    prompt = tok.apply_chat_template([dict(role="user", content="review the wine .")], return_dict=False)
    ids, _, mask, _ = common.rollout(model, [prompt] * 4, tok, args, "cpu")
    first, second = (ids[b, len(prompt):][mask[b]].tolist() for b in (2, 3))
    assert first == second
    for token in first:
        with torch.no_grad():
            assert model.lm(torch.tensor([prompt])).logits[0, -1].argmax() == token
        prompt = [*prompt, token]


@pytest.mark.parametrize("method, steps, lr", [
    ("remax", 25, 3e-3), ("rloo", 25, 3e-3), ("grpo", 12, 1e-3), ("dr_grpo", 12, 1e-3)])
def test_gold_reward_rises(method, steps, lr):
    world()
    out = path("learns", method)
    rows = run(critic_free, *RL, *GOLD, "--method", method, "--max-steps", steps, "--lr", lr, "--out", out)
    with open(f"{out}/summary.json") as f:
        after = json.load(f)["gold"]
    with open(path("sft/summary.json")) as f:
        before = json.load(f)["gold"]
    assert after > before + 0.3, (before, after)
    if "grpo" in method:
        assert {row["ratio_first"] for row in rows} == {1.0}


@pytest.mark.parametrize("case", range(2))
def test_resume(case):
    world()
    argv = *cases()[case], "--dtype", "bf16"
    straight, again = path("straight", str(case)), path("again", str(case))
    rows = run(critic_free, *argv, "--out", straight)
    rewind(straight, again)
    same_run(run(critic_free, *argv, "--out", again, "--resume"), rows)
    resumed = weights(f"{again}/model")
    for key, w in weights(f"{straight}/model").items():
        assert torch.equal(w, resumed[key]), key


def test_zero_3_on_two_ranks():
    world()
    commands = []
    for flags in ("--zero", "1"), zero_3():
        for number, argv in enumerate(cases()):
            out = path("two", str(number), flags[1])
            commands.append((critic_free, (*argv, "--max-steps", "2", *flags, "--out", out)))
    rows = two_ranks(*commands)
    for whole, sharded in zip(rows[:2], rows[2:], strict=True):
        for a, b in zip(whole, sharded, strict=True):
            close(a["loss"], b["loss"], 1e-4)


@pytest.mark.parametrize("case", range(2))
def test_gradient_does_not_depend_on_micro_batches(case):
    """The first gradient's norm, before clipping, of one pass over the batch and of four."""
    world()
    norms, found, step = [], [], deepspeed.DeepSpeedEngine.step

    def step_and_see(engine):
        step(engine)
        norms.append(float(engine.get_global_grad_norm() or 0))

    argv = *cases()[case], "--zero", "1"
    for size in 16, 4:
        flags = "--mini-batch-size", size
        if "grpo" in argv:
            flags += ("--grad-accum", 16 // size, "--ppo-epochs", 1)
        norms.clear()
        with mock.patch.object(deepspeed.DeepSpeedEngine, "step", step_and_see):
            run(critic_free, *argv, *flags, "--max-steps", 1, "--out", path("micro", str(case), str(size)))
        found.append(norms[-1])
    whole, parts = found
    assert whole > 0
    close(parts / whole, 1.0, 1e-4)


def test_bad_input():
    world()
    for flags in (*GRPO, "--group-size", "5"), ("--group-size", "1"), (*REMAX, "--group-size", "0"):
        refused(lambda flags=flags: critic_free.main([*RL, *GOLD, *flags]), "--group-size")
    no_rm = *REMAX, *RL, "--rm", "nowhere", "--out", path("comparators/none")
    refused(lambda: critic_free.main([*no_rm]), "ppo_baseline.py --rm-only")
    # A second update on the same rollouts needs a ratio
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
        critic_free.main([*REMAX, *RL, *GOLD, "--ppo-epochs", "2"])
    assert "unrecognized arguments: --ppo-epochs 2" in said.getvalue()
