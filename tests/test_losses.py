import argparse
import math

import numpy as np
import torch
from helpers import close

import dvpo
import ppo_baseline
import train_gvm


def test_td_targets_by_hand():
    nan = math.nan
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]])
    score = torch.tensor([[nan, nan, nan, 1.0], [nan, -1.0, nan, 2.0]])     # two responses in the second row
    close(train_gvm.td_targets(q, score, 1.0, 0.0), [[0.2, 0.3, 0.4, 1.0], [2.0, -1.0, 4.0, 2.0]])
    close(train_gvm.td_targets(q, score, 1.0, 1.0), [[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, 2.0, 2.0]])
    close(train_gvm.td_targets(q, score, 0.9, 1.0), [[0.729, 0.81, 0.9, 1.0], [-0.9, -1.0, 1.8, 2.0]])
    # gamma 0.5, lambda 0.5: G3 = 1; G2 = .5 (.5 x .4 + .5 x 1) = .35; G1 = .5 (.5 x .3 + .5 x .35);
    # G0 = .5 (.5 x .2 + .5 x .1625)
    # second row: G3 = 2; G2 = .5 (.5 x 4 + .5 x 2) = 1.5; G1 = -1; G0 = .5 (.5 x 2 - .5 x 1) = .25
    close(train_gvm.td_targets(q, score, 0.5, 0.5), [[0.090625, 0.1625, 0.35, 1.0], [0.25, -1.0, 1.5, 2.0]])


def test_gvm_loss_by_hand():
    """Its gradient is 2 (Q - G): none flows into the targets."""
    nan, args = math.nan, argparse.Namespace(batch_norm=False, gamma=1.0, td_lambda=0.0)
    q = torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 9.0]], requires_grad=True)
    score = torch.tensor([[nan, nan, 1.0], [nan, -1.0, nan]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    # targets 0.2, 0.3, 1 | 2, -1: errors -0.1, -0.1, -0.7 | -1, 3
    loss = train_gvm.gvm_loss(q, score, mask, args)
    close(loss, 0.01 + 0.01 + 0.49 + 1 + 9)
    loss.backward()
    close(q.grad, [[-0.2, -0.2, -1.4], [-2, 6, 0]])


def test_batch_norm_by_hand():
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, -50.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()  # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    s = math.sqrt(5)
    close(train_gvm.batch_norm(x, mask, eps=0.0), [[-3 / s, -1 / s, 0], [1 / s, 3 / s, 0]])
    close(train_gvm.batch_norm(x, mask, eps=1.0),
          [[-3 / (s + 1), -1 / (s + 1), 0], [1 / (s + 1), 3 / (s + 1), 0]])
    one = torch.tensor([[True, False, False], [False, False, False]])
    close(train_gvm.batch_norm(x, one), torch.zeros(2, 3))  # a single token is its own mean
    close(train_gvm.batch_norm(torch.full((2, 3), 7.0), mask), torch.zeros(2, 3))  # constant: no blow-up


def test_clipped_ppo_loss_by_hand():
    ratio, clip = torch.tensor([[1.1, 1.5, 0.5], [1.5, 0.5, 9.0]]), 0.2
    adv = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    # min(r A, clip(r) A): 1.1, 1.2 (clipped), 0.5 (pessimistic: not clipped), -1.5, -0.8 (clipped); mean 0.1
    for module in (dvpo, ppo_baseline):
        loss, stats = module.clipped_ppo_loss(ratio.log(), torch.zeros(2, 3), adv, mask, clip)
        close(loss, -0.1)
        close(stats["clip_frac"], 0.8)
        close(stats["ratio"], (1.1 + 1.5 + 0.5 + 1.5 + 0.5) / 5)
        close(stats["kl_step"], sum(r - 1 - math.log(r) for r in (1.1, 1.5, 0.5, 1.5, 0.5)) / 5)
    logp = ratio.log().requires_grad_()
    dvpo.clipped_ppo_loss(logp, torch.zeros(2, 3), adv, mask, clip)[0].backward()
    # No gradient beyond the clip on the gaining side
    close(logp.grad, [[-1.1 / 5, 0, -0.5 / 5], [1.5 / 5, 0, 0]])


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 9.0]])
    values = torch.tensor([[0.5, 0.6, 0.7], [1.0, 1.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    # gamma 1, lambda .95: d2 = .3; d1 = .1 -> .1 + .95 x .3 = .385; d0 = .1 -> .1 + .95 x .385 = .46575
    adv, returns = ppo_baseline.gae(rewards, values, mask, 1.0, 0.95)
    close(adv, [[0.46575, 0.385, 0.3], [0.95, 1.0, 0]])
    close(returns, [[0.96575, 0.985, 1.0], [1.95, 2.0, 0]])
    close(ppo_baseline.gae(rewards, values, mask, 0.5, 0.0)[0], [[-0.2, -0.25, 0.3], [-0.5, 1.0, 0]])


def test_value_and_pairwise_loss_by_hand():
    v, old, ret = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 1.0]])
    # first: clipped to 0.7, error max(0, 0.09); second: 1
    close(ppo_baseline.value_loss(v, old, ret, torch.tensor([[True, True]]), 0.2), 0.5 * (0.09 + 1) / 2)
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    close(ppo_baseline.pairwise_loss(chosen, rejected), (math.log(1 + math.exp(-1)) + math.log(2)) / 2)


def test_advantage_by_hand():
    q = torch.tensor([[0.0, 1.0, 3.0], [1.0, 1.0, 5.0]])            # V(s_0), then Q: 1, 3 | 1
    mask = torch.tensor([[True, True], [True, False]])
    s = math.sqrt(8 / 9)                                            # mean 5/3
    close(dvpo.advantage(q, mask, "q", 0.0), [[-2 / 3 / s, 4 / 3 / s], [-2 / 3 / s, 0]])
    close(dvpo.advantage(q, mask, "q", 2.0), [[-1 / 3, 2 / 3], [-1 / 3, 0]])    # divided by the GVM's sigma
    d = math.sqrt(6.5 / 3)          # deltas 1, 2 | 0; 3 and 0 per response, less 1.5 each: -0.5, 2 | -1.5
    want = dvpo.advantage(q, mask, "delta", 0.0)
    close(want, [[-0.5 / d, 2 / d], [-1.5 / d, 0]])
    too_low = q - torch.tensor([5.0, 0.0, 0.0])                     # V(s_0) for every prompt: no length pays
    close(dvpo.advantage(too_low, mask, "delta", 0.0), want)


def test_table4_by_hand():
    labels = ("a", 1.0), ("a", 0.0), ("a", 0.5), ("b", 0.0)
    rows = [dict(prompt=prompt, reward=reward) for prompt, reward in labels]
    q = [9.0, 1, 1, 4], [0.0, 2, 2, 2], [0.0, 1, 1, 1], [0.0, 5]    # the first, V(s_0), does not count
    values = [(None, np.array(v)) for v in q]
    accuracy, pairs = train_gvm.table4(rows, values, 0.0)
    assert pairs == 3                                   # means 2, 2, 1: a tie, a win, a loss
    close(accuracy["mean"], 0.5)
    close(accuracy["last"], 2 / 3)
    assert train_gvm.table4(rows, values, 0.6)[1] == 1
