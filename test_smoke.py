"""`python test_smoke.py`: the method on a tiny GPT-2, on a CPU, in a minute. Everything else is in tests/.

Numbers are worked by hand or by a slow second implementation beside the test.
"""
import contextlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import common
import dvpo
import ppo_baseline
import sft
import train_gvm
from data import toy
from runtime import processes

TMP = tempfile.mkdtemp(prefix="dvpo_smoke_")
PROMPTS = ["review the soup and the staff .", "review the wine ."]
RESPONSES = ["the soup was great . the staff was rude .", "the wine was cold ."]


def path(*parts):
    return os.path.join(TMP, *parts)


def close(a, b, tol=1e-6):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape and (a - b).abs().max() <= tol, (a, b)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return common.LM(GPT2LMHeadModel(toy.model_config(toy.tokenizer()))).eval()


def example(tok):
    """Two prompts and responses of unequal lengths: lists of ids, and the frame."""
    prompts = [common.encode_prompt(tok, p) for p in PROMPTS]
    responses = [common.encode_response(tok, r) for r in RESPONSES]
    return prompts, responses, *common.frame(prompts, responses)


# The losses, by hand


def test_td_targets():
    nan = math.nan
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]])
    score = torch.tensor([[nan, nan, nan, 1.0], [nan, -1.0, nan, 2.0]])     # two responses in the second row
    close(train_gvm.td_targets(q, score, 1.0, 0.0), [[0.2, 0.3, 0.4, 1.0], [2.0, -1.0, 4.0, 2.0]])
    close(train_gvm.td_targets(q, score, 1.0, 1.0), [[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, 2.0, 2.0]])
    close(train_gvm.td_targets(q, score, 0.9, 1.0), [[0.729, 0.81, 0.9, 1.0], [-0.9, -1.0, 1.8, 2.0]])
    # gamma 0.5, lambda 0.5: 1; .5 (.5 x .4 + .5 x 1) = .35; .5 (.5 x .3 + .5 x .35) = .1625; ...
    close(train_gvm.td_targets(q, score, 0.5, 0.5), [[0.090625, 0.1625, 0.35, 1.0], [0.25, -1.0, 1.5, 2.0]])


def test_batch_norm():
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, -50.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()             # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    s = math.sqrt(5)
    close(train_gvm.batch_norm(x, mask, eps=0.0), [[-3 / s, -1 / s, 0], [1 / s, 3 / s, 0]])
    one = torch.tensor([[True, False, False], [False, False, False]])
    close(train_gvm.batch_norm(x, one), torch.zeros(2, 3))         # a single token is its own mean
    close(train_gvm.batch_norm(torch.full((2, 3), 7.0), mask), torch.zeros(2, 3))       # no blow-up


def test_advantage():
    q = torch.tensor([[0.0, 1.0, 3.0], [1.0, 1.0, 5.0]])           # V(s_0), then Q of each token
    mask = torch.tensor([[True, True], [True, False]])
    s = math.sqrt(8 / 9)                                           # Q 1, 3 and 1: mean 5/3
    close(dvpo.advantage(q, mask, "q", 0.0), [[-2 / 3 / s, 4 / 3 / s], [-2 / 3 / s, 0]])
    close(dvpo.advantage(q, mask, "q", 2.0), [[-1 / 3, 2 / 3], [-1 / 3, 0]])      # at least the GVM's sigma
    # differences 1, 2 and 0: 3 and 0 in a response, 1.5 on average; without it -0.5, 2 and -1.5: mean 0
    d = math.sqrt(6.5 / 3)
    close(dvpo.advantage(q, mask, "delta", 0.0), [[-0.5 / d, 2 / d], [-1.5 / d, 0]])
    close(dvpo.advantage(q, mask, "delta", 2.0), [[-0.25, 1.0], [-0.75, 0]])
    too_low = q - torch.tensor([5.0, 0.0, 0.0])                    # V(s_0) of every prompt: no length pays
    close(dvpo.advantage(too_low, mask, "delta", 2.0), [[-0.25, 1.0], [-0.75, 0]])


def test_clipped_ppo_loss():
    ratio = torch.tensor([[1.1, 1.5, 0.5], [1.5, 0.5, 9.0]])
    adv = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    logp = ratio.log().requires_grad_()
    # min(r A, clip(r) A): 1.1, 1.2 (clipped), 0.5, -1.5 and -0.8 (clipped): mean 0.1
    loss, stats = dvpo.clipped_ppo_loss(logp, torch.zeros(2, 3), adv, mask, 0.2)
    close(loss.detach(), -0.1)
    close(stats["clip_frac"], 0.8)
    close(stats["ratio"], (1.1 + 1.5 + 0.5 + 1.5 + 0.5) / 5)
    close(stats["kl_step"], sum(r - 1 - math.log(r) for r in (1.1, 1.5, 0.5, 1.5, 0.5)) / 5)
    loss.backward()
    close(logp.grad, [[-1.1 / 5, 0, -0.5 / 5], [1.5 / 5, 0, 0]])  # none beyond the clip on the gaining side


def test_gae_and_pairwise_loss():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 9.0]])
    values = torch.tensor([[0.5, 0.6, 0.7], [1.0, 1.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    # lambda .95: .3; .1 + .95 x .3 = .385; .1 + .95 x .385 = .46575
    adv, returns = ppo_baseline.gae(rewards, values, mask, 1.0, 0.95)
    close(adv, [[0.46575, 0.385, 0.3], [0.95, 1.0, 0]])
    close(returns, [[0.96575, 0.985, 1.0], [1.95, 2.0, 0]])
    close(ppo_baseline.gae(rewards, values, mask, 0.5, 0.0)[0], [[-0.2, -0.25, 0.3], [-0.5, 1.0, 0]])
    loss = ppo_baseline.pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    close(loss, (math.log(1 + math.exp(-1)) + math.log(2)) / 2)


# The frame, the rollout, LoRA


@torch.no_grad()
def test_frame_against_a_slow_loop():
    """logp[t] is read before a_t and Q[t] after it, whatever the padding."""
    tok, model = toy.tokenizer(), tiny_model()
    model.add_head("v")
    torch.nn.init.normal_(model.heads["v"].weight, std=0.1)
    prompts, responses, ids, attn, mask = example(tok)
    logp = model(ids, attn, mask.shape[1], temperature=0.7)
    value = model(ids, attn, mask.shape[1], head="v")
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        for t in range(len(response)):
            before, after = torch.tensor([prompt + response[:t]]), torch.tensor([prompt + response[:t + 1]])
            want = (model.lm(before).logits[0, -1] / 0.7).log_softmax(-1)[response[t]]
            close(logp[b, t], want, 1e-5)
            hidden = model.lm.base_model(after).last_hidden_state[0, -1]
            close(value[b, t + 1], model.heads["v"](hidden)[0], 1e-5)
    assert mask.sum(1).tolist() == [len(r) for r in responses] and responses[0][-1] == tok.eos_token_id


def test_greedy_rollout_equals_generate():
    tok, model = toy.tokenizer(), tiny_model(3)
    args = dvpo.parse_args(["--temperature", "1e-6", "--max-new-tokens", "24"])
    prompts = [common.encode_prompt(tok, p) for p in PROMPTS]
    for args.static_cache in (False, True):
        ids, attn, mask, _ = common.rollout(model, prompts, tok, args, "cpu")
        P = ids.shape[1] - mask.shape[1]
        want = model.lm.generate(ids[:, :P], attention_mask=attn[:, :P], do_sample=False, max_new_tokens=24,
                                 pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
        assert torch.equal(ids.masked_fill(attn == 0, tok.pad_token_id)[:, :want.shape[1]], want)


@torch.no_grad()
def test_lora_off_is_the_base_and_merged_is_on():
    model = tiny_model()
    _, _, ids, attn, mask = example(toy.tokenizer())
    T = mask.shape[1]
    base = model(ids, attn, T)
    model.add_adapter("a", r=4, alpha=8)
    assert torch.equal(model(ids, attn, T, adapter="a"), base)     # B is zero at first
    for layer in model.lora_layers():
        torch.nn.init.normal_(layer.B["a"].weight, std=0.3)
    on = model(ids, attn, T, adapter="a")
    assert (on - base).abs().max() > 1e-3
    assert torch.equal(model(ids, attn, T), base)
    plain = GPT2LMHeadModel(model.lm.config).eval()
    plain.load_state_dict(model.merged_state_dict("a"))
    close(common.LM(plain)(ids, attn, T), on, 1e-4)


# The stages, chained as a user would, on a world of their own


def run(stage, out, *argv):
    """A stage's main(argv) without its output; returns the rows of metrics.jsonl."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stage.main([*map(str, argv), "--out", path(out)])
    with open(path(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def read(*parts):
    with open(path(*parts)) as f:
        return json.load(f)


def data(name):
    return "--data", path("toy", f"{name}.jsonl"), "--heldout", path("toy", f"{name}_heldout.jsonl")


def policy_flags():
    return "--init-from", path("sft/model"), *data("prompts")


def test_chain():
    """SFT -> GVM -> DVPO and PPO: the gold reward rises, the first ratio is 1, what is frozen stays."""
    with contextlib.redirect_stdout(io.StringIO()):
        toy.make(path("toy"), sft_rows=2000, rows_per_policy=1000, heldout_rows_per_policy=30)
    run(sft, "sft", "--init-from", path("toy/model"), *data("sft"), "--max-steps", 260,
        "--prompts", path("toy/prompts_heldout.jsonl"))
    run(train_gvm, "gvm", "--init-from", path("sft/model"), *data("gvm"), "--max-steps", 250,
        "--tau-pairs", 0)
    assert read("gvm/eval.json")["accuracy"]["mean"] > 0.8
    frozen = path("sft/model/model.safetensors"), path("gvm/model/adapter.safetensors")
    before = [load_file(file) for file in frozen]
    rows = run(dvpo, "dvpo", *policy_flags(), "--gvm", path("gvm/model"), "--max-steps", 20)
    assert all(row["ratio_first"] == 1.0 for row in rows) and rows[0]["kl"] == 0.0
    for file, weights in zip(frozen, before, strict=True):
        assert all(torch.equal(w, weights[key]) for key, w in load_file(file).items())
    sft_gold = read("sft/summary.json")["gold"]
    assert read("sft/summary.json")["heldout_loss"] < 2
    assert read("dvpo/summary.json")["gold"] > sft_gold + 0.15, sft_gold

    pairs = "--pairs", path("toy/pairs.jsonl"), "--pairs-heldout", path("toy/pairs_heldout.jsonl")
    rows = run(ppo_baseline, "ppo", *policy_flags(), *pairs, "--rm", path("rm/model"), "--rm-max-steps", 60,
               "--max-steps", 20)
    assert all(row["ratio_first"] == 1.0 for row in rows)
    assert read("ppo/summary.json")["gold"] > sft_gold + 0.15, sft_gold


def test_resume_equals_a_straight_run():
    """A run that was killed after its second step continues bit for bit."""
    flags = (*policy_flags(), "--gvm", path("gvm/model"), "--lora", "--max-steps", 4, "--save-every", 2)
    straight = run(dvpo, "straight", *flags)
    shutil.copytree(path("straight"), path("again"))
    shutil.rmtree(path("again/checkpoint/step_4"))
    again = run(dvpo, "again", *flags, "--resume")
    for a, b in zip(straight, again, strict=True):
        for key in a.keys() - {"seconds", "sec_generate", "sec_score", "sec_train", "peak_bytes"}:
            assert a[key] == b[key], (key, a, b)
    weights, resumed = (load_file(path(out, "model/model.safetensors")) for out in ("straight", "again"))
    assert all(torch.equal(w, resumed[key]) for key, w in weights.items())


def test_bad_input_is_one_line():
    with open(path("bad.jsonl"), "w") as f:
        for reward in ("1", "1e308"):
            f.write(f'{{"prompt": "a", "response": "b", "reward": {reward}}}\n')
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            model = path("sft/model")
            train_gvm.main(["--init-from", model, "--data", path("bad.jsonl"), "--out", path("x")])
            raise AssertionError("not refused")
        except SystemExit as e:
            assert e.code == 2
    line, = err.getvalue().splitlines()
    assert "bad.jsonl:2: the reward must be a finite number" in line, line


def main():
    begin, failed = time.time(), 0
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    for name, test in tests:
        start = time.time()
        try:
            test()
            print(f"{name:<44} ok {time.time() - start:5.1f} s", flush=True)
        except (Exception, SystemExit):
            failed += 1
            print(f"{name:<44} FAILED\n{traceback.format_exc()}", flush=True)
    shutil.rmtree(TMP)
    print(f"{time.time() - begin:.0f} s\n{len(tests) - failed} passed, {failed} failed")
    sys.stdout.flush()
    processes.finish(int(failed > 0))


if __name__ == "__main__":
    main()
