"""The losses of comparators/ against TRL's, on the same model and tokens: loss and gradient of every weight.

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 trl==1.16.0 deepspeed==0.19.8
    ENV/bin/python experiments/check_trl.py

TRL's trainers compute their own log-probs from a tiny random Llama; ours come from common.LM on a copy of
it. (Not from a GPT-2: TRL gives it no positions, and behind left padding they are other ones than ours.)
Writes results/check_trl.json and .md.
"""
import argparse
import copy
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import common
from comparators import critic_free, dpo
from data import toy
from experiments.shared import commit, machine, table, write_results

B, GROUP, CLIP, BETA = 8, 4, 0.2, 0.04
PROMPT = [dict(role="user", content="review the soup and the staff .")]
VARIANTS = {"grpo": "response", "bnpo": "token", "dapo": "token"}       # TRL's loss_type: --loss-mean


def frame(tok):
    """B responses of different lengths, as ours and as TRL's inputs want them."""
    rng = torch.Generator().manual_seed(0)
    prompts = [tok.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)] * B
    prompts = [p[:len(p) - i % 3] for i, p in enumerate(prompts)]
    responses = [torch.randint(6, 40, (4 + 3 * i,), generator=rng).tolist() for i in range(B)]
    return common.frame(prompts, responses)


def compare(ours, our_model, theirs, their_model):
    """(our loss, theirs, largest difference of a gradient by the largest gradient)."""
    ours.backward()
    theirs.backward()
    mine = {name: p.grad for name, p in our_model.lm.named_parameters()}
    most = max(g.abs().max().item() for g in mine.values())
    off = max((p.grad - mine[name]).abs().max().item() for name, p in their_model.named_parameters())
    return ours.item(), theirs.item(), off / most


def copies(lm):
    """Two copies of the model, one as ours: both without gradients so far."""
    own, other = copy.deepcopy(lm), copy.deepcopy(lm)
    return common.LM(own), other


def log_probs(lm, ids, attn, T):
    with torch.no_grad():
        return common.LM(copy.deepcopy(lm))(ids, attn, T)


def check_grpo(lm, reference, old, tok, folder):
    ids, attn, mask = frame(tok)
    P, T = ids.shape[1] - mask.shape[1], mask.shape[1]
    old_logp, ref_logp = log_probs(old, ids, attn, T), log_probs(reference, ids, attn, T)
    score = torch.randn(B, generator=torch.Generator().manual_seed(1))
    found = {}
    for loss_type, loss_mean in VARIANTS.items():
        ours, theirs = copies(lm)
        config = trl.GRPOConfig(folder, per_device_train_batch_size=B, num_generations=GROUP, beta=BETA,
                                epsilon=CLIP, loss_type=loss_type, use_cpu=True, bf16=False, report_to=[],
                                gradient_checkpointing=False, max_completion_length=T,
                                use_bias_correction_kl=False)       # TRL's default is not the paper's KL
        data = Dataset.from_list([dict(prompt=PROMPT)] * B)
        trainer = trl.GRPOTrainer(theirs, lambda completions, **_: [0.0] * B, config, data,
                                  processing_class=tok)
        trainer.current_gradient_accumulation_steps = 1
        adv, _ = critic_free.group_advantage(score, GROUP, "mean", "std")
        inputs = dict(prompt_ids=ids[:, :P], prompt_mask=attn[:, :P], completion_ids=ids[:, P:],
                      completion_mask=mask.long(), advantages=adv, old_per_token_logps=old_logp,
                      ref_per_token_logps=ref_logp, num_items_in_batch=mask.sum())
        their_loss = trainer._compute_loss(theirs, inputs)
        weight = mask / (mask.sum(1, keepdim=True) if loss_mean == "response" else 1)
        args = argparse.Namespace(clip=CLIP, kl_coef=BETA)
        logp = ours(ids, attn, T)
        loss, _ = critic_free.clipped_loss(logp, old_logp, ref_logp, adv[:, None], weight / weight.sum(),
                                           args.clip, args.kl_coef)
        found[f"GRPO, --loss-mean {loss_mean} (TRL: {loss_type})"] = compare(loss, ours, their_loss, theirs)
    return found


def check_dpo(lm, reference, tok, folder):
    ids, attn, mask = frame(tok)
    ours, theirs = copies(lm)
    config = trl.DPOConfig(folder, beta=0.1, use_cpu=True, bf16=False, report_to=[],
                           per_device_train_batch_size=4, gradient_checkpointing=False)
    rows = [dict(prompt=PROMPT, chosen=[dict(role="assistant", content="the soup was great .")],
                 rejected=[dict(role="assistant", content="the soup was cold .")])] * 8
    trainer = trl.DPOTrainer(theirs, copy.deepcopy(reference), config, train_dataset=Dataset.from_list(rows),
                             processing_class=tok)
    completion = torch.cat([torch.zeros(B, ids.shape[1] - mask.shape[1]), mask], 1).long()
    inputs = dict(input_ids=ids, attention_mask=attn, completion_mask=completion,
                  position_ids=(attn.cumsum(1) - 1).clamp(min=0))
    their_loss = trainer._compute_loss(theirs, inputs, return_outputs=False)
    ref_logp = (log_probs(reference, ids, attn, mask.shape[1]) * mask).sum(1)
    logp = (ours(ids, attn, mask.shape[1]) * mask).sum(1)
    loss, _, _ = dpo.dpo_loss(logp.view(2, -1), ref_logp.view(2, -1), 0.1)
    return {"DPO": compare(loss, ours, their_loss, theirs)}


def main():
    tok, models = toy.tokenizer(), []
    config = LlamaConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=256, initializer_range=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    lm, reference, old = models
    for other in reference, old:                        # near each other: ratios within the clip and without
        for p, q in zip(other.parameters(), lm.parameters(), strict=True):
            p.data = q.data + 0.1 * p.data
    with tempfile.TemporaryDirectory() as folder:
        lm.save_pretrained(folder)                      # TRL loads its reference from where the model is
        lm = LlamaForCausalLM.from_pretrained(folder).eval()
        found = check_grpo(lm, reference, old, tok, folder) | check_dpo(lm, reference, tok, folder)
    data = dict(command="ENV/bin/python experiments/check_trl.py", commit=commit(), machine=machine(),
                trl=trl.__version__, losses=found)
    lines = ["# Losses against TRL", "",
             f"Command: `{data['command']}`. Commit {data['commit']}. TRL {trl.__version__}, fp32, a random "
             f"Llama of two layers, {B} responses. Gradient: the largest difference over all weights, by the "
             "largest gradient.", ""]
    cells = [[name, f"{a:.7f}", f"{b:.7f}", f"{off:.1e}"] for name, (a, b, off) in found.items()]
    write_results("check_trl", data, lines + table(["loss", "ours", "TRL's", "gradient"], cells))
    if any(abs(a - b) > 1e-5 or off > 1e-5 for a, b, off in found.values()):
        sys.exit("error: not equal to 1e-5")


if __name__ == "__main__":
    main()
