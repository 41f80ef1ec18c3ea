"""comparators/: losses by hand, what is rolled out, learning, resume, two ranks."""
import argparse
import contextlib
import io
import json
import math
import os
from unittest import mock

import deepspeed
import numpy as np
import pytest
import torch
from helpers import (
    RL,
    Args,
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

import ppo_baseline
from comparators import dpo, grpo, remax
from data import toy

GOLD = "--reward", "data/toy.py:gold_reward"
SMALL = "--batch-size", "16", "--mini-batch-size", "8", "--max-new-tokens", "16"


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
    """(script, flags) of four small steps with a checkpoint after two."""
    steps = "--max-steps", "4", "--save-every", "2"
    pairs = "--pairs", path("toy/pairs_small.jsonl"), "--pairs-heldout", path("toy/pairs_small.jsonl")
    own = "--init-from", path("sft/model"), "--heldout", path("toy/prompts_heldout.jsonl")
    rl, rm = (*RL, *SMALL, *steps), ("--rm", reward_model())
    flags = (*own, *pairs, *steps, "--batch-size", "16")
    return [(dpo, flags), (remax, (*rl, *rm)), (grpo, (*rl, *rm, "--grad-accum", "2")),
            (dpo, (*flags, "--lora")), (remax, (*rl, *rm, "--lora")), (grpo, (*rl, *GOLD, "--lora"))]


def test_losses_by_hand():
    loss, margin = dpo.dpo_loss(torch.tensor([-10.0, -20.0]), torch.tensor([-12.0, -18.0]), 0.1)
    close(margin, [0.4])
    close(loss, math.log(1 + math.exp(-0.4)))
    score, greedy = torch.tensor([0.5, 1.0]), torch.tensor([0.75, -1.0])
    logp, ref = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]), torch.tensor([[-2.0, -2.0], [-1.0, -50.0]])
    adv = remax.remax_advantage(score, greedy, logp, ref, 0.1)              # -0.25, 2; a ratio is cut at 20
    close(adv, [[-0.25 - 0.1, -0.25], [2 + 0.2, 2 - 2.0]])
    mask, logp = torch.ones(1, 3), torch.tensor([[-1.0, -2.0, -9.0]])
    mask[0, 2] = 0
    close(remax.remax_loss(logp, torch.tensor([[0.5, -1.0, 7.0]]), mask, 4), -(-0.5 + 2.0) / 4)
    # ratios 1.1 and 1.5 (clipped to 1.2); k3 is 0 and 2 - log 2 - 1
    args, old = argparse.Namespace(clip=0.2, kl_coef=0.1), torch.zeros(1, 3)
    logp = torch.tensor([[1.1, 1.5, 9.0]]).log()
    ref = logp + torch.tensor([[0.0, math.log(2), 3.0]])
    weight = torch.tensor([[0.5, 0.5, 0.0]])
    loss, stat = grpo.grpo_loss(logp, old, ref, torch.ones(1, 1), weight, args.clip, args.kl_coef)
    close(loss, -(0.5 * 1.1 + 0.5 * (1.2 - 0.1 * (1 - math.log(2)))))
    close(stat["clip_frac"], 0.5)
    close(stat["ratio"], 1.3)
    loss, _ = grpo.grpo_loss(logp, old, ref, -torch.ones(1, 1), weight, args.clip, args.kl_coef)
    close(loss, 0.5 * 1.1 + 0.5 * (1.5 + 0.1 * (1 - math.log(2))))


def test_group_advantage_by_hand():
    score, a = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0]), 0.5 / math.sqrt(1 / 3)
    adv, no_signal = grpo.group_advantage(score, 4, "mean", "std")
    close(adv, [a, -a, -a, a, 0, 0, 0, 0], 1e-5)
    close(no_signal, 0.5)
    adv, _ = grpo.group_advantage(score, 4, "loo", "none")      # 1 - (0 + 0 + 1) / 3
    close(adv, [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, 0, 0])


def test_greedy_responses():
    """The last ones are the argmax at each token, whatever is sampled beside them."""
    tok, model = toy.tokenizer(), tiny_gpt2()
    prompt = tok.apply_chat_template([dict(role="user", content="review the wine .")], return_dict=False)
    ids, _, mask, _ = remax.rollout(model, [prompt] * 4, tok, Args, "cpu", greedy=2)
    first, second = (ids[b, len(prompt):][mask[b]].tolist() for b in (2, 3))
    assert first == second
    for token in first:
        with torch.no_grad():
            assert model.lm(torch.tensor([prompt])).logits[0, -1].argmax() == token
        prompt = [*prompt, token]


@pytest.mark.parametrize("stage, flags", [
    (dpo, ("--max-steps", "60", "--lr", "1e-3", "--pairs-heldout", "toy/pairs_heldout.jsonl")),
    (remax, ("--max-steps", "25", "--lr", "3e-3", *GOLD)),
    (grpo, ("--max-steps", "12", "--lr", "1e-3", *GOLD)),
    (grpo, ("--max-steps", "12", "--lr", "1e-3", *GOLD, "--scale", "none", "--loss-mean", "token",
            "--baseline", "loo"))])
def test_gold_reward_rises(stage, flags):
    world()
    out = path("learns", stage.__name__, str(len(flags)))
    data = ("--pairs", path("toy/pairs.jsonl")) if stage is dpo else ("--data", path("toy/prompts.jsonl"))
    flags = [path(word) if word.startswith("toy/") else word for word in flags]
    rows = run(stage, "--init-from", path("sft/model"), "--heldout", path("toy/prompts_heldout.jsonl"), *data,
               *flags, "--out", out)
    with open(f"{out}/summary.json") as f:
        after = json.load(f)["gold"]
    with open(path("sft/summary.json")) as f:
        before = json.load(f)["gold"]
    assert after > before + 0.3, (before, after)
    if stage is dpo:
        close(rows[0]["loss"], math.log(2), 1e-6)
        assert np.mean([row["accuracy"] for row in rows[-10:]]) > 0.8
    if stage is grpo:
        assert {row["ratio_first"] for row in rows} == {1.0}


@pytest.mark.parametrize("case", range(6))
def test_resume(case):
    world()
    stage, argv = cases()[case]
    straight, again = path("straight", str(case)), path("again", str(case))
    argv = *argv, "--dtype", "bf16"
    rows = run(stage, *argv, "--out", straight)
    rewind(straight, again)
    same_run(run(stage, *argv, "--out", again, "--resume"), rows)
    resumed = weights(f"{again}/model")
    for key, w in weights(f"{straight}/model").items():
        assert torch.equal(w, resumed[key]), key


def test_zero_3_on_two_ranks():
    world()
    commands = []
    for flags in ("--zero", "1"), zero_3():
        for stage, argv in cases()[:3]:
            out = path("two", stage.__name__, flags[1])
            commands.append((stage, (*argv, "--max-steps", "2", *flags, "--out", out)))
    rows = two_ranks(*commands)
    for whole, sharded in zip(rows[:3], rows[3:], strict=True):
        for a, b in zip(whole, sharded, strict=True):
            close(a["loss"], b["loss"], 1e-4)


@pytest.mark.parametrize("stage", [dpo, remax, grpo])
def test_gradient_does_not_depend_on_micro_batches(stage):
    """The first gradient's norm, before clipping, of one pass over the batch and of four."""
    world()
    norms, found, step = [], [], deepspeed.DeepSpeedEngine.step

    def step_and_see(engine):
        step(engine)
        norms.append(float(engine.get_global_grad_norm() or 0))

    argv = (*cases()[[dpo, remax, grpo].index(stage)][1], "--zero", "1")
    for size in 16, 4:
        flags = ("--grad-accum", 16 // size) if stage is dpo else ("--mini-batch-size", size)
        if stage is grpo:
            flags += ("--grad-accum", 16 // size, "--ppo-epochs", 1)
        norms.clear()
        with mock.patch.object(deepspeed.DeepSpeedEngine, "step", step_and_see):
            run(stage, *argv, *flags, "--max-steps", 1, "--out", path("micro", stage.__name__, str(size)))
        found.append(norms[-1])
    whole, parts = found
    assert whole > 0
    close(parts / whole, 1.0, 1e-4)


def test_bad_input():
    world()
    refused(lambda: grpo.main([*RL, *GOLD, "--group-size", "5"]), "--group-size")
    no_rm = *RL, "--rm", "nowhere", "--out", path("comparators/none")
    refused(lambda: remax.main([*no_rm]), "ppo_baseline.py --rm-only")
