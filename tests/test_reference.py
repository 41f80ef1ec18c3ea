"""A few steps of DVPO, PPO and the GVM's training a second time: slow, plain, no common.py.

A stage runs on a small Llama of random weights, and what it sampled and shuffled is recorded.
From that, every weight that it trained is computed again and must agree to 1e-5; one update
moves a weight by about 1e-3. The second time there is no padding, mask, micro-batch, cache,
adapter or engine: a batch is a list of rows of different lengths, each goes through a plain
transformers model in float64 by itself, and AdamW is written out. The functions *_by_hand
retell the methods.
"""
import itertools
import json
import os
import runpy
import types
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
import runtime.run
import train_gvm
from data import toy
from runtime import checkpoints

TOK = toy.tokenizer()
ENDS = [2, 20, 21, 22, 23]              # ids that end an answer, so that many do
PROMPTS = [" ".join(np.random.default_rng(i).choice(toy.WORDS, 3 + i % 7)) for i in range(13)]
POLICIES = "a", "b", None, "a"
ROWS = [dict(prompt=text, response=" ".join(text.split()[::-1]), reward=i % 4 - 1.2,
             ended=i % 5 != 0, policy=POLICIES[i % 4]) for i, text in enumerate(PROMPTS)]
REWARD = """
def reward(prompt, response):
    return len(response.split()) / 4 - prompt.count("e") / 5
"""

BOTH = dict(seed=5, max_steps=4, batch_size=8, grad_accum=2, lr=1e-3, zero=0, dtype="fp32")
RL = types.SimpleNamespace(
    **BOTH, mini_batch_size=2, ppo_epochs=3, clip=0.1, temperature=0.7, kl_coef=0.3,
    kl_target=2.0, kl_stop=0.01, max_prompt_length=10, max_new_tokens=12, gold="")
PPO = types.SimpleNamespace(critic_lr=2e-3, gamma=0.9, gae_lambda=0.8, missing_eos_penalty=0.6)
GVM = types.SimpleNamespace(
    **BOTH, gamma=0.9, td_lambda=0.8, missing_eos_penalty=0.6, tau_pairs=2, tau_length=5,
    max_length=72, lora_rank=4, lora_alpha=6, true_q="")
TAU = types.SimpleNamespace(pairs=2, length=7)          # of the GVM that DVPO reads


# What the stages start from


@pytest.fixture(scope="module", autouse=True)
def start():
    """A model, two GVMs, a reward model and data. No weight is 0, so that each has a gradient."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOK), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2, tie_word_embeddings=False, bos_token_id=TOK.bos_token_id,
        eos_token_id=TOK.eos_token_id))
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(path("ref/model"))
    TOK.save_pretrained(path("ref/model"))
    save_adapter("gvm_delta", "gvm", q_std=2.5)         # above the sigma of the advantages
    save_adapter("gvm_q", "gvm", q_std=0.01)            # below
    save_adapter("rm", "rm", mean=0.4, std=1.7)
    toy.write_jsonl(path("ref/prompts.jsonl"), [dict(prompt=text) for text in PROMPTS])
    toy.write_jsonl(path("ref/gvm.jsonl"), ROWS)
    with open(path("ref/reward.py"), "w") as f:
        f.write(REWARD)


def save_adapter(folder, name, **meta):
    model = common.load_model(path("ref/model"))
    model.add_adapter(name, r=4, alpha=6)
    model.add_head(name, sees_token=name == "gvm")
    for p in model.adapter_parameters(name).values():
        torch.nn.init.normal_(p, std=0.3)
    trained = dict(max_length=128, tau_pairs=TAU.pairs, tau_length=TAU.length)
    checkpoints.save_adapter(model, name, TOK, path("ref", folder), **trained, **meta)


def stage_flags(*namespaces, **more):
    flags = []
    for settings in (*map(vars, namespaces), more):
        for key, value in settings.items():
            flags += ["--" + key.replace("_", "-"), value]
    return flags


def recorded(stage, *flags):
    """Runs the stage -> its metrics, its answers [rollout][row] as ids, its shuffles of rows."""
    answers, shuffles = [], []
    real_rollout = common.rollout
    real_randperm = torch.randperm

    def rollout(*args):
        out = real_rollout(*args)
        ids, _, mask, _ = out
        rows = zip(ids[:, -mask.shape[1]:], mask, strict=True)
        answers.append([row[is_real].tolist() for row, is_real in rows])
        return out

    def randperm(n):
        shuffles.append(real_randperm(n))
        return shuffles[-1]

    prompts = path("ref/prompts.jsonl")
    files = stage_flags(init_from=path("ref/model"), data=prompts, heldout=prompts)
    with (mock.patch.object(common, "rollout", rollout), mock.patch("torch.randperm", randperm),
          mock.patch("common.evaluate")):
        metrics = run(stage, *files, *stage_flags(RL), "--lr-decay", *flags)
    return metrics, answers, iter(shuffles)


# Models, tokens and AdamW, plainly


def plain_model():
    return AutoModelForCausalLM.from_pretrained(path("ref/model"), dtype=torch.float64)


def adapt(model, weights, name, alpha, r):
    """{layer: W + alpha / r B A} of all linear layers of the blocks."""
    adapted = {}
    for layer, linear in model.model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            A = weights[f"lm.model.{layer}.A.{name}.weight"]
            B = weights[f"lm.model.{layer}.B.{name}.weight"]
            adapted[f"{layer}.weight"] = linear.weight.detach() + alpha / r * B @ A
    return adapted


def adapted_model(folder):
    """-> the trunk with the adapter in its weights, the head (weight, bias), the meta data."""
    with open(path(folder, "adapter.json")) as f:
        meta = json.load(f)
    saved = {key: w.double() for key, w in load_file(path(folder, "adapter.safetensors")).items()}
    name = meta["name"]
    model = plain_model()
    model.model.load_state_dict(adapt(model, saved, name, meta["alpha"], meta["r"]), strict=False)
    return model, (saved[f"heads.{name}.weight"][0], saved[f"heads.{name}.bias"][0]), meta


def logp(model, prompt, answer):
    """log pi(a_t | s_t), at the temperature of sampling, of each token of the answer."""
    logits = model(torch.tensor([prompt + answer])).logits[0]
    before = logits[len(prompt) - 1:-1] / RL.temperature
    return torch.stack([row.log_softmax(0)[a] for row, a in zip(before, answer, strict=True)])


def state_values(model, head, prompt, answer):
    """The head on h_t: V(s_0) at the prompt's last token, then V after each of the answer."""
    weight, bias = head
    h = model.model(torch.tensor([prompt + answer])).last_hidden_state[0]
    return h[len(prompt) - 1:] @ weight + bias


def token_values(h, embedding, scale, head, ids, first):
    """The head on [h_t, scale h_{t-1} e(a_t)]: V(s_0) at `first`, then Q of each token."""
    weight, bias = head
    values = []
    for t in range(first, len(ids)):
        product = scale * h[t - 1] * embedding[ids[t]]
        values.append(torch.cat([h[t], product]) @ weight + bias)
    return torch.stack(values)


def prompt_ids(text):
    return TOK.convert_tokens_to_ids(["<bos>", "<user>", *text.split(), "<assistant>"])


def behind(prefix, ids):
    """prefix + ids, with one <bos>."""
    return prefix + ids[1:] if prefix and ids[0] == TOK.bos_token_id else prefix + ids


def rows_of(step, n):
    """Row numbers of a batch, out of n: shuffled epochs laid end to end."""
    begin = step * RL.batch_size
    end = begin + RL.batch_size
    order = []
    for epoch in range(end // n + 1):
        order += np.random.default_rng([RL.seed, epoch]).permutation(n).tolist()
    return order[begin:end]


def prompts_of(step):
    """Of a prompt that is too long <bos> <user> and the end are left."""
    prompts = [prompt_ids(PROMPTS[i]) for i in rows_of(step, len(PROMPTS))]
    return [ids[:2] + ids[2:][-(RL.max_prompt_length - 2):] for ids in prompts]


class AdamW:
    """Without weight decay. The gradient of all weights together is cut to norm 1 (ds_config.json).

    A step divides a gradient by its own size. Where that is so small that it is mostly round-off,
    float32 and float64 need not agree: such weights are noted in `tiny`.
    """

    def __init__(self, params):
        self.params = params                            # {name: weight}
        self.n = 0
        self.m = {key: torch.zeros_like(p) for key, p in params.items()}
        self.v = {key: torch.zeros_like(p) for key, p in params.items()}
        self.tiny = {key: torch.zeros_like(p).bool() for key, p in params.items()}

    def step(self, loss, lr):
        self.n += 1
        grads = torch.autograd.grad(loss, list(self.params.values()))
        norm = sum((g ** 2).sum() for g in grads).sqrt()
        for (key, p), g in zip(self.params.items(), grads, strict=True):
            g = g / norm if norm > 1 else g
            self.m[key] = 0.9 * self.m[key] + 0.1 * g
            self.v[key] = 0.95 * self.v[key] + 0.05 * g ** 2
            mean = self.m[key] / (1 - 0.9 ** self.n)
            size = (self.v[key] / (1 - 0.95 ** self.n)).sqrt()
            p.data -= lr * mean / (size + 1e-8)
            self.tiny[key] |= (size > 0) & (size < 1e-6)


# DVPO and PPO


def optimizer_batches(epoch, shuffles):
    """The first epoch takes the rows as they come."""
    size = RL.grad_accum * RL.mini_batch_size
    order = next(shuffles).tolist() if epoch else list(range(RL.batch_size))
    return [order[i:i + size] for i in range(0, RL.batch_size, size)]


def policy_loss(policy, batch, prompts, answers, old, adv):
    """Eq. (3), negated, a mean over the tokens of the batch; the sum of (r - 1) - log r."""
    loss, moved = 0.0, 0.0
    for i in batch:
        log_ratio = logp(policy, prompts[i], answers[i]) - old[i]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - RL.clip, 1 + RL.clip)
        loss -= torch.min(ratio * adv[i], clipped * adv[i]).sum()
        moved += (ratio - 1 - log_ratio).sum().item()
    return loss / sum(len(answers[i]) for i in batch), moved


def next_kl_coef(kl_coef, kl, kl_before):
    """Higher where the KL, five steps on at its present speed, is over the target: by up to 10 %."""
    error = (kl + 5 * (kl - kl_before)) / RL.kl_target - 1
    return kl_coef * (1 + 0.1 * max(-1, min(1, error)))


def dvpo_by_hand(kind, rollouts, shuffles):
    """-> AdamW of the policy after the last step, and the numbers of each step."""
    policy = plain_model()
    reference = plain_model()
    gvm, head, meta = adapted_model(f"ref/gvm_{kind}")
    adam = AdamW(dict(policy.named_parameters()))
    kl_coef = RL.kl_coef
    kl_before = 0.0
    log = []
    shown = prompts_of(RL.max_steps), rollouts[0]       # tau: the rollouts before those it values
    for step in range(RL.max_steps):
        prompts = prompts_of(step)
        answers = rollouts[step + 1]

        tau = []                                        # one for all rows
        rng = np.random.default_rng([RL.seed, step, 0])
        for i in rng.permutation(RL.batch_size)[:TAU.pairs]:
            tau = behind(tau, shown[0][i]) + shown[1][i][:TAU.length]
        shown = prompts, answers

        old, log_ratio_ref, q = [], [], []
        with torch.no_grad():
            for prompt, answer in zip(prompts, answers, strict=True):
                old.append(logp(policy, prompt, answer))
                log_ratio_ref.append(old[-1] - logp(reference, prompt, answer))
                ids = behind(tau, prompt) + answer
                h = gvm.model(torch.tensor([ids])).last_hidden_state[0]
                first = len(ids) - len(answer) - 1
                e, scale = gvm.lm_head.weight, meta["token_scale"]
                q.append(token_values(h, e, scale, head, ids, first))

        if kind == "q":                                 # eq. (2)
            mean = torch.cat([values[1:] for values in q]).mean()
            adv = [values[1:] - mean for values in q]
        else:                                           # what each token did to the value
            adv = [values[1:] - values[:-1] for values in q]
            gained = sum(a.sum() for a in adv) / RL.batch_size
            for a in adv:
                a[0] -= gained
        sigma = max(torch.cat(adv).std(correction=0), meta["q_std"])
        adv = [a / sigma - kl_coef * x for a, x in zip(adv, log_ratio_ref, strict=True)]

        for epoch in range(RL.ppo_epochs):
            moved = 0.0
            for batch in optimizer_batches(epoch, shuffles):
                loss, moved_here = policy_loss(policy, batch, prompts, answers, old, adv)
                adam.step(loss, RL.lr * (1 - step / RL.max_steps))
                moved += moved_here
            if moved / sum(map(len, answers)) > 1.5 * RL.kl_stop:
                break

        kl = sum(x.sum().item() for x in log_ratio_ref) / RL.batch_size
        log.append(dict(kl=kl, kl_coef=kl_coef, updates=2 * (epoch + 1), tau_tokens=len(tau)))
        kl_coef = next_kl_coef(kl_coef, kl, kl_before)
        kl_before = kl
    return adam, log


def ppo_by_hand(reward, rollouts, shuffles):
    """reward: a function, or None for the reward model. -> AdamW of policy and critic, numbers."""
    policy = plain_model()
    reference = plain_model()
    rm, rm_head, meta = adapted_model("ref/rm")
    if reward:
        critic = plain_model()
        head = [torch.zeros(16).double(), torch.zeros(()).double()]
    else:                                               # in units of standardised scores
        critic = adapted_model("ref/rm")[0]
        head = [rm_head[0] / meta["std"], (rm_head[1] - meta["mean"]) / meta["std"]]
    head = [w.requires_grad_() for w in head]
    adam = AdamW(dict(policy.named_parameters()))
    critic_adam = AdamW(dict(critic.model.named_parameters(), weight=head[0], bias=head[1]))
    kl_coef = RL.kl_coef
    kl_before = 0.0
    log = []
    for step in range(RL.max_steps):
        texts = [PROMPTS[i] for i in rows_of(step, len(PROMPTS))]
        prompts = prompts_of(step)
        answers = rollouts[step]

        old, log_ratio_ref, values, adv, returns = [], [], [], [], []
        with torch.no_grad():
            for text, prompt, answer in zip(texts, prompts, answers, strict=True):
                old.append(logp(policy, prompt, answer))
                log_ratio_ref.append(old[-1] - logp(reference, prompt, answer))
                before_each = state_values(critic, head, prompt, answer)[:-1]
                values.append(before_each)
                if reward:
                    score = reward(text, TOK.decode(answer, skip_special_tokens=True))
                else:
                    score = state_values(rm, rm_head, prompt, answer)[-1]
                    score = (score - meta["mean"]) / meta["std"]
                if answer[-1] not in ENDS:
                    score -= PPO.missing_eos_penalty
                rewards = -kl_coef * log_ratio_ref[-1]
                rewards[-1] += score
                gae, a, after = [], 0.0, 0.0            # from the end, where no value follows
                for r, v in zip(rewards.flip(0), before_each.flip(0), strict=True):
                    a = r + PPO.gamma * after - v + PPO.gamma * PPO.gae_lambda * a
                    after = v
                    gae.insert(0, a)
                adv.append(torch.stack(gae))
                returns.append(adv[-1] + before_each)
        every = torch.cat(adv)
        adv = [(a - every.mean()) / (every.std(correction=0) + 1e-8) for a in adv]

        for epoch in range(RL.ppo_epochs):
            moved = 0.0
            for batch in optimizer_batches(epoch, shuffles):
                decay = 1 - step / RL.max_steps
                loss, moved_here = policy_loss(policy, batch, prompts, answers, old, adv)
                adam.step(loss, RL.lr * decay)
                moved += moved_here
                value_loss = 0.0
                for i in batch:
                    v = state_values(critic, head, prompts[i], answers[i])[:-1]
                    near = values[i] + (v - values[i]).clamp(-RL.clip, RL.clip)
                    error = torch.max((v - returns[i]) ** 2, (near - returns[i]) ** 2)
                    value_loss += 0.5 * error.sum() / sum(len(answers[k]) for k in batch)
                critic_adam.step(value_loss, PPO.critic_lr * decay)
            if moved / sum(map(len, answers)) > 1.5 * RL.kl_stop:
                break

        kl = sum(x.sum().item() for x in log_ratio_ref) / RL.batch_size
        log.append(dict(kl=kl, kl_coef=kl_coef, updates=2 * (epoch + 1)))
        kl_coef = next_kl_coef(kl_coef, kl, kl_before)
        kl_before = kl
    return adam, critic_adam, log


# The GVM's training


def gvm_rows():
    """Prompts and responses as ids, and rewards: an answer that was cut has no <eos>, and pays."""
    responses = [TOK.convert_tokens_to_ids(row["response"].split()) for row in ROWS]
    for response, row in zip(responses, ROWS, strict=True):
        response += [TOK.eos_token_id] * row["ended"]
    rewards = np.array([row["reward"] for row in ROWS])
    cut = np.array([not row["ended"] for row in ROWS])
    rewards = rewards - GVM.missing_eos_penalty * rewards.std() * cut
    return [prompt_ids(row["prompt"]) for row in ROWS], responses, rewards


def tau_of(step, i):
    """Numbers of up to two rows of the policy of row i, on other prompts."""
    own = [k for k, row in enumerate(ROWS) if row["policy"] == ROWS[i]["policy"]]
    if ROWS[i]["policy"] is None:
        return []
    rng = np.random.default_rng([GVM.seed, step, i])
    drawn = rng.choice(len(own), min(len(own), 2 * GVM.tau_pairs), replace=False)
    return [own[k] for k in drawn if own[k] != i][:GVM.tau_pairs]


def gvm_by_hand(params):
    """params: {name: weight} at first -> AdamW, sigma of Q, how many rows each sequence held."""
    trunk = plain_model()
    embedding = trunk.lm_head.weight.detach()
    scale = 1 / (embedding ** 2).mean().sqrt()
    prompts, responses, rewards = gvm_rows()
    adam = AdamW({key: w.requires_grad_() for key, w in params.items()})
    sigma, packed = None, []
    for step in range(GVM.max_steps):
        loss, q = 0.0, []
        for i in rows_of(step, len(ROWS)):
            ids, spans = [], []                         # (begin, end, reward) of each answer
            for k in tau_of(step, i):                   # those that fit into half, with the prompt
                begin = behind(ids, prompts[k])
                answer = responses[k][:GVM.tau_length]
                if len(begin + answer + prompts[i]) <= GVM.max_length // 2:
                    ids = begin + answer
                    spans.append((len(begin), len(ids), rewards[k]))
            begin = behind(ids, prompts[i])
            ids = begin + responses[i]
            spans.append((len(begin), len(ids), rewards[i]))
            packed.append(len(spans))

            adapted = adapt(trunk, params, "gvm", GVM.lora_alpha, GVM.lora_rank)
            out = functional_call(trunk.model, adapted, torch.tensor([ids]))
            h = out.last_hidden_state[0]
            head = params["heads.gvm.weight"][0], params["heads.gvm.bias"][0]
            for begin, end, reward in spans:
                values = token_values(h, embedding, scale, head, ids[:end], begin - 1)
                G = [reward]                            # of the last token; then those before it
                lam = GVM.td_lambda
                for after in values.tolist()[:0:-1]:
                    G.insert(0, GVM.gamma * ((1 - lam) * after + lam * G[0]))
                loss += ((values - torch.tensor(G)) ** 2).sum()
                q.append(values.detach())
        states = sum(map(len, q))
        adam.step(loss / states, GVM.lr * (1 - step / GVM.max_steps))
        new = torch.cat([values[1:] for values in q]).std(correction=0).item()
        sigma = 0.8 * sigma + 0.2 * new if step else new
    return adam, sigma, packed


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
    """The KL sums over tokens what `tiny` weights, too, did to the policy: 5e-4."""
    for row, want in zip(metrics, log, strict=True):
        for key, value in want.items():
            assert abs(row[key] - value) < 5e-4, (row["step"], key, row[key], value)


def says_something(log, rollouts):
    """The run held what is compared: cut answers, many lengths, an early stop, a moving KL."""
    answers = list(itertools.chain(*rollouts))
    assert 0.1 < np.mean([answer[-1] not in ENDS for answer in answers]) < 0.5
    assert len({len(answer) for answer in answers}) > 5
    assert {row["updates"] for row in log} == {4, 6}
    assert abs(log[-1]["kl"]) > 0.05 and len({row["kl_coef"] for row in log}) == 4


@pytest.mark.parametrize("kind", ["delta", "q"])
def test_dvpo(kind):
    """delta is divided by the sigma of the GVM's training, q by its own."""
    out = path("ref/dvpo", kind)
    flags = stage_flags(gvm=path(f"ref/gvm_{kind}"), advantage=kind, out=out)
    metrics, rollouts, shuffles = recorded(dvpo, *flags)
    policy, log = dvpo_by_hand(kind, rollouts, shuffles)
    same_log(metrics, log)
    same_weights(weights(os.path.join(out, "model")), policy)
    says_something(log, rollouts)


@pytest.mark.parametrize("source", ["rm", "function"])
def test_ppo(source):
    """The reward model's scores and a critic that starts from it; a function and a new head."""
    reward = None
    flags = dict(rm=path("ref/rm"))
    if source == "function":
        reward = runpy.run_path(path("ref/reward.py"))["reward"]
        flags = dict(reward=path("ref/reward.py:reward"))
    critics = []
    real = runtime.run.engine

    def engine(model, *args):                           # no stage saves its critic
        critics.extend([model] if "critic" in model.heads else [])
        return real(model, *args)

    out = path("ref/ppo", source)
    with mock.patch("runtime.run.engine", engine):
        flags = stage_flags(PPO, **flags, out=out)
        metrics, rollouts, shuffles = recorded(ppo_baseline, *flags)
    policy, critic, log = ppo_by_hand(reward, rollouts, shuffles)
    same_log(metrics, log)
    same_weights(weights(os.path.join(out, "model")), policy)
    found = dict(critics[0].lm.model.named_parameters())
    head = critics[0].heads["critic"]
    same_weights(dict(found, weight=head.weight[0], bias=head.bias[0]), critic)
    says_something(log, rollouts)


def test_gvm():
    """From an adapter without zeros. Some rows have two before them, some one or none."""
    start = {}
    real = runtime.run.engine

    def engine(model, *args):
        torch.manual_seed(1)
        for key, p in model.adapter_parameters("gvm").items():
            torch.nn.init.normal_(p, std=0.3)
            start[key] = p.detach().double().clone()
        return real(model, *args)

    out = path("ref/gvm")
    rows = path("ref/gvm.jsonl")
    with mock.patch("runtime.run.engine", engine):
        files = stage_flags(init_from=path("ref/model"), data=rows, heldout=rows, out=out)
        run(train_gvm, *stage_flags(GVM), *files)
    adam, q_std, packed = gvm_by_hand(start)
    same_weights(weights(os.path.join(out, "model")), adam)
    with open(os.path.join(out, "model", "adapter.json")) as f:
        close(json.load(f)["q_std"], q_std, 1e-4)
    assert set(packed) == {1, 2, 3}
