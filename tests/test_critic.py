"""What PPO's critic starts from, and the reward model's flags."""
import json
import os

import pytest
import torch
from helpers import (
    RL,
    close,
    example_frame,
    path,
    refused,
    rewind,
    run,
    same_run,
    tiny_gpt2,
    tiny_llama,
    world,
)

import dvpo
import ppo_baseline
from data import toy

PAIRS = ("--pairs", path("toy/pairs_small.jsonl"), "--pairs-heldout", path("toy/pairs_small.jsonl"))
SMALL = (*RL, *PAIRS, "--rm", path("critic_rm/model"), "--rm-max-steps", 4, "--rm-batch-size", 8,
         "--batch-size", 8, "--mini-batch-size", 8, "--max-steps", 2)


@pytest.mark.parametrize("sees_token", [False, True])
def test_the_critic_is_the_whole_model_that_it_starts_from(sees_token):
    """Adapter and head included, in units where (mean, std) are (0, 1)."""
    trunk, critic = tiny_gpt2().requires_grad_(False), tiny_gpt2()
    trunk.add_adapter("rm", 4, 8)
    trunk.add_head("rm", sees_token=sees_token)
    torch.manual_seed(1)
    for layer in trunk.lora_layers():
        torch.nn.init.normal_(layer.B["rm"].weight, std=0.3)
    for p in trunk.heads["rm"].parameters():
        torch.nn.init.normal_(p, std=0.3)
    ppo_baseline.start_critic(critic, trunk, "rm", 0.5, 2.0)
    ids = torch.arange(6, 30).view(2, 12)
    attn = torch.ones_like(ids)
    with torch.no_grad():
        want = trunk(ids, attn, 6, "rm", head="rm")
        found = critic(ids, attn, 6, head="critic")
    close(found, (want - 0.5) / 2, 1e-4)
    assert want.std() > 0.05 and all(p.requires_grad for p in critic.parameters())


def test_critic_from_the_gvm_frozen_or_trained():
    """V at first is the GVM's behind the same tau, in units of its rewards. A frozen critic stays."""
    world()
    gvm = "--critic-from", "gvm", "--gvm", path("gvm/model")
    first, critics = {}, []
    real = ppo_baseline.start_critic

    def start_critic(critic, *rest):
        real(critic, *rest)
        critics.append((critic, [p.clone() for p in critic.parameters()]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_baseline, "start_critic", start_critic)
        for name, flags in dict(rm=(), trained=gvm, frozen=(*gvm, "--freeze-critic")).items():
            rows = run(ppo_baseline, *SMALL, *flags, "--out", path("critic", name))
            assert all(row["ratio_first"] == 1.0 for row in rows)
            first[name] = rows[0]["v0"]
    moved = [any(not torch.equal(p, q) for p, q in zip(critic.parameters(), before, strict=True))
             for critic, before in critics]
    assert moved == [True, True, False]
    with open(path("gvm/model/adapter.json")) as f:
        meta = json.load(f)
    # dvpo.py draws the same tau and values the same first rollouts: the same seed, the same steps
    rows = run(dvpo, *RL, *gvm[2:], "--out", path("critic/dvpo"), "--batch-size", 8, "--mini-batch-size", 8,
               "--max-steps", 2)
    want = (rows[0]["v0"] - meta["reward_mean"]) / meta["reward_std"]
    assert first["trained"] == first["frozen"] != first["rm"]
    close(first["frozen"], want, 1e-4)


def test_resume_with_a_critic_from_the_gvm():
    world()
    flags = [*SMALL[:-2], "--max-steps", 4, "--save-every", 2, "--critic-from", "gvm", "--freeze-critic",
             "--gvm", path("gvm/model")]
    whole = run(ppo_baseline, *flags, "--out", path("critic_whole"))
    rewind(path("critic_whole"), path("critic_resumed"))
    same_run(whole, run(ppo_baseline, *flags, "--out", path("critic_resumed"), "--resume"))


def test_flags_that_the_reward_model_was_not_trained_with_are_refused():
    world()
    out = "--out", path("rm_flags")
    if not os.path.exists(path("critic_rm/model")):
        run(ppo_baseline, *SMALL, *out)
    again = [str(x) for x in (*SMALL, *out)]
    refused(lambda: ppo_baseline.main([*again, "--rm-lr", "0.5"]), "--rm-lr 0.5", "trained with")
    other = path("toy/pairs.jsonl")
    refused(lambda: ppo_baseline.main([*again, "--pairs", other]), "--pairs", "toy/pairs_small.jsonl")


def test_heads_read_the_output_embedding_at_the_size_of_the_state():
    """Untied: the token half reads the output embedding; its entries are about as large as the state's."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.mul_(0.01)
    model.add_head("gvm", sees_token=True)
    _, _, ids, attn, mask = example_frame(toy.tokenizer())
    seen = []
    model.heads["gvm"].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        model(ids, attn, mask.shape[1], head="gvm")
    state, product = seen[0].chunk(2, -1)
    ratio = product[attn[:, -mask.shape[1] - 1:].bool()].pow(2).mean().sqrt() / state.pow(2).mean().sqrt()
    assert 0.5 < ratio < 2
    embedding = model.lm.get_output_embeddings().weight
    close(model.heads["gvm"].token_scale, 1 / embedding.pow(2).mean().sqrt(), 1e-3)
