"""A few steps of DVPO, of PPO and of the GVM's training a second time: slowly, plainly, without common.py.

A stage runs on a small Llama of random weights, and what it sampled and shuffled is recorded. From that, every
weight that it trained is computed again and must agree to 1e-5, where one update moves a weight by about 1e-3.
The second time there are no padding, masks, micro-batches, caches, adapters or engines: one row at a time goes
through a plain transformers model in float64, a list of tensors of different lengths is a batch, and AdamW is
six lines. Read the *_by_hand functions for what the methods compute.
"""
import copy
import itertools
import json
import math
import os
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import close, path, run, weights
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import common
import dvpo
import ppo_baseline
import train_gvm
from data import toy

TOK = toy.tokenizer()
SEED, STEPS, BATCH, ACCUM, MINI, PPO_EPOCHS = 5, 3, 8, 2, 2, 3
LR, CRITIC_LR, CLIP, TEMPERATURE, KL_COEF, KL_TARGET, KL_STOP = 1e-3, 2e-3, 0.1, 0.7, 0.3, 0.5, 0.01
MAX_PROMPT, MAX_NEW, TAU_PAIRS, TAU_LENGTH = 10, 12, 2, 7
GAMMA, LAM, EOS_PENALTY = 0.9, 0.8, 0.6
ENDS = [2, 20, 21, 22, 23]                              # ids that end an answer: about every second one ends
ASKED = [" ".join(np.random.default_rng(i).choice(toy.WORDS, 3 + i % 7)) for i in range(13)]
LABELLED = [dict(prompt=text, response=" ".join(text.split()[::-1]), reward=i % 4 - 1.2, ended=i % 5 != 0,
                 policy=["a", "b", None, "a"][i % 4]) for i, text in enumerate(ASKED)]
RL = ("--init-from", path("ref/model"), "--data", path("ref/prompts.jsonl"), "--heldout",
      path("ref/prompts.jsonl"), "--seed", SEED, "--max-steps", STEPS, "--batch-size", BATCH, "--grad-accum",
      ACCUM, "--mini-batch-size", MINI, "--ppo-epochs", PPO_EPOCHS, "--lr", LR, "--clip", CLIP, "--temperature",
      TEMPERATURE, "--kl-coef", KL_COEF, "--kl-target", KL_TARGET, "--kl-stop", KL_STOP, "--max-prompt-length",
      MAX_PROMPT, "--max-new-tokens", MAX_NEW, "--lr-decay", "--zero", 0, "--dtype", "fp32", "--gold", "")
REWARD = "def reward(prompt, response):\n    return len(response.split()) / 4 - prompt.count('e') / 5\n"


# What the stages start from


@pytest.fixture(scope="module", autouse=True)
def start():
    """A model, a GVM, a reward model and prompts. No weight is zero, or its gradient would be nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(TOK), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                         initializer_range=0.2, tie_word_embeddings=False, bos_token_id=TOK.bos_token_id,
                         eos_token_id=TOK.eos_token_id)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(path("ref/model"))
    TOK.save_pretrained(path("ref/model"))
    trained = dict(max_length=128, tau_pairs=TAU_PAIRS, tau_length=TAU_LENGTH, mean=0.4, std=1.7)
    for folder, name, sees_token, q_std in (
            ("gvm_delta", "gvm", True, 2.5), ("gvm_q", "gvm", True, 0.01), ("rm", "rm", False, 1.0)):
        adapted = common.load_model(path("ref/model"))
        adapted.add_adapter(name, r=4, alpha=6)
        adapted.add_head(name, sees_token)
        for p in adapted.adapter_parameters(name).values():
            torch.nn.init.normal_(p, std=0.3)
        common.save_adapter(adapted, name, TOK, path("ref", folder), q_std=q_std, **trained)
    toy.write_jsonl(path("ref/prompts.jsonl"), [dict(prompt=text) for text in ASKED])
    toy.write_jsonl(path("ref/gvm.jsonl"), LABELLED)
    with open(path("ref/reward.py"), "w") as f:
        f.write(REWARD)


def recorded(stage, *flags):
    """Runs the stage -> its metrics, its answers [rollout][row] as ids, its shuffles of the rows."""
    answers, shuffles = [], []
    real_rollout, real_randperm = stage.rollout, torch.randperm

    def rollout(*args):
        ids, attn, mask, ended = real_rollout(*args)
        T = mask.shape[1]
        answers.append([row[-T:][:n].tolist() for row, n in zip(ids, mask.sum(1), strict=True)])
        return ids, attn, mask, ended

    def randperm(n):
        order = real_randperm(n)
        shuffles.append(order.tolist())
        return order

    with mock.patch.object(stage, "rollout", rollout), mock.patch("torch.randperm", randperm), \
            mock.patch("common.evaluate"):
        return run(stage, *RL, *flags), answers, iter(shuffles)


# A model, plainly


def plain_model(folder="ref/model"):
    return AutoModelForCausalLM.from_pretrained(path(folder), dtype=torch.float64)


def adapted_model(folder):
    """-> the trunk with W + alpha / r B A in place of W, the head's weight and bias, and the meta data."""
    with open(path(folder, "adapter.json")) as f:
        meta = json.load(f)
    saved = {key: w.double() for key, w in load_file(path(folder, "adapter.safetensors")).items()}
    model, name = plain_model(), meta["name"]
    for layer, linear in model.model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            A, B = (saved[f"lm.model.{layer}.{part}.{name}.weight"] for part in "AB")
            linear.weight.data += meta["alpha"] / meta["r"] * B @ A
    return model, (saved[f"heads.{name}.weight"][0], saved[f"heads.{name}.bias"][0]), meta


def logp(model, prompt, answer):
    """log pi(a_t | s_t) of each token of the answer, under the temperature of sampling."""
    logits = model(torch.tensor([prompt + answer])).logits[0]
    said = logits[len(prompt) - 1:-1] / TEMPERATURE     # the logits before a token are of that token
    return torch.stack([row.log_softmax(0)[token] for row, token in zip(said, answer, strict=True)])


def state_values(model, head, prompt, answer):
    """The head on h_t at the last token of the prompt and at each of the answer: V(s_0), V(s_1), ..."""
    h = model.model(torch.tensor([prompt + answer])).last_hidden_state[0]
    weight, bias = head
    return h[len(prompt) - 1:] @ weight + bias


def token_values(h, embedding, scale, head, ids, first):
    """The head on [h_t, scale h_{t-1} e(a_t)] from position `first` on: V(s_0), Q(s_0, a_0), Q(s_1, a_1), ..."""
    weight, bias = head
    return torch.stack([torch.cat([h[t], scale * h[t - 1] * embedding[ids[t]]]) @ weight + bias
                        for t in range(first, len(ids))])


def behind(prefix, ids):
    """prefix + ids with one <bos>."""
    return prefix + ids[1:] if prefix and ids[0] == TOK.bos_token_id else prefix + ids


def rows_of(step, size, n):
    """Row numbers of a batch: shuffled epochs laid end to end."""
    epochs = [np.random.default_rng([SEED, epoch]).permutation(n) for epoch in range((step + 1) * size // n + 1)]
    return np.concatenate(epochs)[step * size:(step + 1) * size].tolist()


def prompt_ids(text):
    return TOK.convert_tokens_to_ids(["<bos>", "<user>", *text.split(), "<assistant>"])


def prompts_of(step):
    return [prompt_ids(ASKED[i])[-MAX_PROMPT:] for i in rows_of(step, BATCH, len(ASKED))]


class AdamW:
    """Without weight decay. The gradient of all weights together is at most 1 long: ds_config.json.

    A step divides a gradient by its own size. Where that is so small that it is mostly round-off, the weight
    is noted in `tiny`: float32 and float64 need not agree on it.
    """

    def __init__(self, params):
        self.params, self.n = params, 0                 # {name: weight}
        self.m, self.v = ([torch.zeros_like(p) for p in params.values()] for _ in range(2))
        self.tiny = {key: torch.zeros_like(p).bool() for key, p in params.items()}

    def step(self, loss, lr):
        grads = torch.autograd.grad(loss, list(self.params.values()))
        norm = sum((g ** 2).sum() for g in grads).sqrt()
        self.n += 1
        for (key, p), g, m, v in zip(self.params.items(), grads, self.m, self.v, strict=True):
            g = g / norm if norm > 1 else g
            m += 0.1 * (g - m)
            v += 0.05 * (g ** 2 - v)
            size = (v / (1 - 0.95 ** self.n)).sqrt()
            p.data -= lr * m / (1 - 0.9 ** self.n) / (size + 1e-8)
            self.tiny[key] |= (size > 0) & (size < 1e-6)


# The methods


def clipped(ratio, adv):
    """Eq. (3), a sum over the tokens of one answer."""
    return -torch.min(ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv).sum()


def next_kl_coef(kl_coef, kl, kl_before):
    """A tenth up where the KL, five steps on at its present speed, is over the target; else down."""
    error = (kl + 5 * (kl - kl_before)) / KL_TARGET - 1
    return kl_coef * (1 + 0.1 * max(-1, min(1, error)))


def optimizer_batches(epoch, shuffles):
    order = next(shuffles) if epoch else list(range(BATCH))
    return [order[i:i + ACCUM * MINI] for i in range(0, BATCH, ACCUM * MINI)]


def dvpo_by_hand(kind, answers, shuffles):
    policy, reference = plain_model(), plain_model()
    gvm, head, meta = adapted_model(f"ref/gvm_{kind}")
    adam = AdamW(dict(policy.named_parameters()))
    kl_coef, kl_before, log = KL_COEF, 0.0, []
    shown = prompts_of(STEPS), answers[0]               # tau is of the rollouts before those that are valued
    for step in range(STEPS):
        prompts, responses = prompts_of(step), answers[step + 1]
        tau = []
        for i in np.random.default_rng([SEED, step, 0]).permutation(BATCH)[:TAU_PAIRS]:
            tau = behind(tau, shown[0][i]) + shown[1][i][:TAU_LENGTH]
        shown = prompts, responses

        old, log_ratio, q = [], [], []
        with torch.no_grad():
            for p, r in zip(prompts, responses, strict=True):
                old.append(logp(policy, p, r))
                log_ratio.append(old[-1] - logp(reference, p, r))
                ids = behind(tau, p) + r
                h = gvm.model(torch.tensor([ids])).last_hidden_state[0]
                e, first = gvm.lm_head.weight, len(ids) - len(r) - 1
                q.append(token_values(h, e, meta["token_scale"], head, ids, first))
        if kind == "q":                                 # eq. (2)
            mean = torch.cat([v[1:] for v in q]).mean()
            adv = [v[1:] - mean for v in q]
        else:                                           # what a token did to the value
            adv = [v[1:] - v[:-1] for v in q]
            gained = sum(a.sum() for a in adv) / BATCH
            for a in adv:
                a[0] -= gained
        sigma = max(torch.cat(adv).std(correction=0), meta["q_std"])
        adv = [a / sigma - kl_coef * x for a, x in zip(adv, log_ratio, strict=True)]

        for epoch in range(PPO_EPOCHS):
            moved = 0.0
            for batch in optimizer_batches(epoch, shuffles):
                loss, tokens = 0.0, sum(len(responses[i]) for i in batch)
                for i in batch:
                    ratio = (logp(policy, prompts[i], responses[i]) - old[i]).exp()
                    loss += clipped(ratio, adv[i]) / tokens
                    moved += (ratio - 1 - ratio.log()).sum().item()
                adam.step(loss, LR * (1 - step / STEPS))
            if moved / sum(map(len, responses)) > 1.5 * KL_STOP:
                break

        kl = sum(x.sum().item() for x in log_ratio) / BATCH
        log.append(dict(kl=kl, kl_coef=kl_coef, updates=2 * (epoch + 1), tau_tokens=len(tau)))
        kl_coef = next_kl_coef(kl_coef, kl, kl_before)
        kl_before = kl
    return adam, log


def ppo_by_hand(reward, answers, shuffles):
    """reward: a function of prompt and response, or None for the reward model."""
    policy, reference = plain_model(), plain_model()
    rm, rm_head, meta = adapted_model("ref/rm")
    critic, units = copy.deepcopy(rm), (meta["mean"], meta["std"])
    head = rm_head[0] / units[1], (rm_head[1] - units[0]) / units[1]        # in standardised rewards
    if reward:
        critic, head = plain_model(), (torch.zeros(16).double(), torch.zeros(()).double())
    head = [w.clone().requires_grad_() for w in head]
    adam = AdamW(dict(policy.named_parameters()))
    critic_adam = AdamW(dict(critic.model.named_parameters(), weight=head[0], bias=head[1]))
    kl_coef, kl_before, log = KL_COEF, 0.0, []
    for step in range(STEPS):
        prompts, responses = prompts_of(step), answers[step]
        asked = [ASKED[i] for i in rows_of(step, BATCH, len(ASKED))]

        old, log_ratio, values, adv, returns = [], [], [], [], []
        with torch.no_grad():
            for text, p, r in zip(asked, prompts, responses, strict=True):
                old.append(logp(policy, p, r))
                log_ratio.append(old[-1] - logp(reference, p, r))
                values.append(state_values(critic, head, p, r)[:-1])        # before each token
                if reward:
                    score = reward(text, TOK.decode(r, skip_special_tokens=True))
                else:
                    score = (state_values(rm, rm_head, p, r)[-1] - units[0]) / units[1]
                rewards = -kl_coef * log_ratio[-1]
                rewards[-1] += score - (EOS_PENALTY if r[-1] not in ENDS else 0.0)
                a, v_next, gae = 0.0, 0.0, []
                for reward_t, v in zip(rewards.flip(0), values[-1].flip(0), strict=True):   # from the end
                    a = reward_t + GAMMA * v_next - v + GAMMA * LAM * a
                    gae.insert(0, a)
                    v_next = v
                adv.append(torch.stack(gae))
                returns.append(adv[-1] + values[-1])
        every = torch.cat(adv)
        adv = [(a - every.mean()) / (every.std(correction=0) + 1e-8) for a in adv]

        for epoch in range(PPO_EPOCHS):
            moved = 0.0
            for batch in optimizer_batches(epoch, shuffles):
                loss, value_loss, tokens = 0.0, 0.0, sum(len(responses[i]) for i in batch)
                for i in batch:
                    ratio = (logp(policy, prompts[i], responses[i]) - old[i]).exp()
                    loss += clipped(ratio, adv[i]) / tokens
                    moved += (ratio - 1 - ratio.log()).sum().item()
                    v = state_values(critic, head, prompts[i], responses[i])[:-1]
                    near = values[i] + (v - values[i]).clamp(-CLIP, CLIP)
                    error = torch.max((v - returns[i]) ** 2, (near - returns[i]) ** 2)
                    value_loss += 0.5 * error.sum() / tokens
                adam.step(loss, LR * (1 - step / STEPS))
                critic_adam.step(value_loss, CRITIC_LR * (1 - step / STEPS))
            if moved / sum(map(len, responses)) > 1.5 * KL_STOP:
                break

        kl = sum(x.sum().item() for x in log_ratio) / BATCH
        log.append(dict(kl=kl, kl_coef=kl_coef, updates=2 * (epoch + 1)))
        kl_coef = next_kl_coef(kl_coef, kl, kl_before)
        kl_before = kl
    return adam, critic_adam, log


def gvm_by_hand(params):
    """params: {name: weight} of the adapter and the head as they start."""
    trunk, alpha, r, max_length = plain_model(), 6, 4, 40
    e = trunk.lm_head.weight.detach()
    token_scale = 1 / (e ** 2).mean().sqrt()
    adam = AdamW({key: w.clone().requires_grad_() for key, w in params.items()})
    rewards = np.array([row["reward"] for row in LABELLED])
    cut = np.array([not row["ended"] for row in LABELLED])
    rewards = rewards - EOS_PENALTY * rewards.std() * cut
    prompts = [prompt_ids(row["prompt"]) for row in LABELLED]
    responses = [TOK.convert_tokens_to_ids(row["response"].split()) + ([2] if row["ended"] else [])
                 for row in LABELLED]
    for step in range(STEPS):
        loss, states, q = 0.0, 0, []
        for i in rows_of(step, BATCH, len(LABELLED)):
            row, tau = LABELLED[i], []
            if row["policy"]:                           # up to two rows of the same policy on other prompts
                own = [k for k, other in enumerate(LABELLED) if other["policy"] == row["policy"]]
                drawn = np.random.default_rng([SEED, step, i]).choice(len(own), min(len(own), 2 * TAU_PAIRS),
                                                                      replace=False)
                tau = [own[k] for k in drawn if own[k] != i][:TAU_PAIRS]
            ids, ends = [], []                          # ends: (where an answer begins, ends, its reward)
            for k in [*tau, i]:
                longer = behind(ids, prompts[k])
                said = responses[k] if k == i else responses[k][:TAU_LENGTH]
                if k == i or len(longer) + len(said) + len(prompts[i]) <= max_length // 2:
                    ids = longer + said
                    ends.append((len(longer), len(ids), rewards[k]))

            adapted = {}
            for layer, linear in trunk.model.named_modules():
                if isinstance(linear, torch.nn.Linear):
                    A, B = (adam.params[f"lm.model.{layer}.{part}.gvm.weight"] for part in "AB")
                    adapted[f"{layer}.weight"] = linear.weight.detach() + alpha / r * B @ A
            h = functional_call(trunk.model, adapted, (torch.tensor([ids]),)).last_hidden_state[0]
            head = adam.params["heads.gvm.weight"][0], adam.params["heads.gvm.bias"][0]
            for begin, end, reward in ends:
                v = token_values(h, e, token_scale, head, ids[:end], begin - 1)
                G = [reward]                            # at the last token; the others from the end
                for after in v.tolist()[:0:-1]:
                    G.insert(0, GAMMA * ((1 - LAM) * after + LAM * G[0]))
                loss += ((v - torch.tensor(G)) ** 2).sum()
                states += len(v)
                q.append(v[1:].detach())
        adam.step(loss / states, LR * (1 - step / STEPS))
        sigma = torch.cat(q).std(correction=0).item()
        running = sigma if step == 0 else 0.8 * running + 0.2 * sigma
    return adam, running


# The tests


def same_weights(found, adam):
    """{name: weight} of the stage, and AdamW after the last step."""
    assert found.keys() == adam.params.keys()
    for key, w in adam.params.items():
        error = (found[key].double() - w).abs()[~adam.tiny[key]]
        assert error.max() < 1e-5, (key, error.max())
    tiny = torch.cat([mask.flatten() for mask in adam.tiny.values()])
    assert tiny.float().mean() < 0.02, tiny.float().mean()


def same_log(metrics, log):
    for row, want in zip(metrics, log, strict=True):
        for key, value in want.items():
            assert abs(row[key] - value) < 5e-4, (row["step"], key, row[key], value)


def some_of_everything(log, answers):
    """What the run must hold for the comparison to say something."""
    cut = [r[-1] not in ENDS for r in itertools.chain(*answers)]
    assert 0.1 < np.mean(cut) < 0.5 and len({len(r) for r in itertools.chain(*answers)}) > 5
    assert {row["updates"] for row in log} == {4, 6}    # the early stop, and none
    assert log[-1]["kl"] > 0.01 and len({row["kl_coef"] for row in log}) == 3


@pytest.mark.parametrize("kind", ["delta", "q"])
def test_dvpo(kind):
    """delta under the sigma of the GVM's training, q under its own."""
    out = path("ref/dvpo", kind)
    metrics, answers, shuffles = recorded(dvpo, "--gvm", path(f"ref/gvm_{kind}"), "--advantage", kind, "--out",
                                          out)
    policy, log = dvpo_by_hand(kind, answers, shuffles)
    same_log(metrics, log)
    same_weights(weights(os.path.join(out, "model")), policy)
    some_of_everything(log, answers)


@pytest.mark.parametrize("source", ["rm", "function"])
def test_ppo(source):
    """Rewards and the critic's start from the reward model; and from a function, beside a new head."""
    reward, flags, scope, critics = None, ["--rm", path("ref/rm")], {}, []
    if source == "function":
        exec(REWARD, scope)
        reward, flags = scope["reward"], ["--reward", path("ref/reward.py:reward")]
    real = common.engine

    def engine(model, *args):
        critics.extend([model] if "critic" in model.heads else [])
        return real(model, *args)

    out = path("ref/ppo", source)
    with mock.patch("common.engine", engine):
        metrics, answers, shuffles = recorded(
            ppo_baseline, *flags, "--critic-lr", CRITIC_LR, "--gamma", GAMMA, "--gae-lambda", LAM,
            "--missing-eos-penalty", EOS_PENALTY, "--out", out)
    policy, critic, log = ppo_by_hand(reward, answers, shuffles)
    same_log(metrics, log)
    same_weights(weights(os.path.join(out, "model")), policy)
    trained, = critics                                  # which no stage saves
    head = trained.heads["critic"]
    found = dict(trained.lm.model.named_parameters(), weight=head.weight[0], bias=head.bias[0])
    same_weights(found, critic)
    some_of_everything(log, answers)


def test_gvm():
    """From an adapter without zeros: rows behind others of their policy, one of the trunk's rows cut."""
    start, real, out = {}, common.engine, path("ref/gvm")

    def engine(model, *args):
        torch.manual_seed(1)
        for key, p in model.adapter_parameters("gvm").items():
            torch.nn.init.normal_(p, std=0.3)
            start[key] = p.detach().double().clone()
        return real(model, *args)

    rows = "--data", path("ref/gvm.jsonl"), "--heldout", path("ref/gvm.jsonl"), "--true-q", ""
    with mock.patch("common.engine", engine):
        run(train_gvm, "--init-from", path("ref/model"), *rows, "--seed", SEED, "--max-steps", STEPS,
            "--batch-size", BATCH, "--grad-accum", ACCUM, "--lr", LR, "--gamma", GAMMA, "--td-lambda", LAM,
            "--missing-eos-penalty", EOS_PENALTY, "--tau-pairs", TAU_PAIRS, "--tau-length", TAU_LENGTH,
            "--max-length", 40, "--lora-rank", 4, "--lora-alpha", 6, "--zero", 0, "--dtype", "fp32", "--out",
            out)
    adam, q_std = gvm_by_hand(start)
    same_weights(weights(os.path.join(out, "model")), adam)
    with open(os.path.join(out, "model", "adapter.json")) as f:
        close(json.load(f)["q_std"], q_std, 1e-4)
