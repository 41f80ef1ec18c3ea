"""What test_smoke.py does not check by hand."""
import argparse
import inspect
import math

import numpy as np
import torch
from helpers import close

import dvpo
import ppo_baseline
import train_gvm


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


def test_both_stages_have_one_loss():
    ours, theirs = (inspect.getsource(stage.clipped_ppo_loss) for stage in (dvpo, ppo_baseline))
    assert ours == theirs


def test_value_loss_by_hand():
    v, old, ret = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 1.0]])
    # first: clipped to 0.7, error max(0, 0.09); second: 1
    close(ppo_baseline.value_loss(v, old, ret, torch.tensor([[True, True]]), 0.2), 0.5 * (0.09 + 1) / 2)


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
