"""Table 4 of the exact token values on the toy's held-out rows: the most that any GVM which knows
the policy can reach.

    python data/toy.py && python experiments/ceiling.py           prints it, writes results/gvm_ceiling.json
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import train_gvm
from data import toy


def main():
    data = train_gvm.Labelled(["data/toy/gvm_heldout.jsonl"])
    rows, values = [data[i] for i in range(len(data))], []
    for row in rows:
        words = row["response"].split() + [toy.EOS]
        q = [toy.true_q(row["prompt"], " ".join(words[:t]), row["policy"]) for t in range(len(words) + 1)]
        values.append((words, np.array(q)))
    accuracy, pairs = train_gvm.table4(rows, values, 0.0)
    errors = [v - row["reward"] for row, (_, v) in zip(rows, values, strict=True)]
    noise = float(np.mean(np.concatenate(errors) ** 2))
    command = "python data/toy.py && python experiments/ceiling.py"
    result = dict(command=command, pairs=pairs, accuracy=accuracy, mean_squared_error_of_the_truth=noise)
    print(json.dumps(result, indent=1))
    with open("results/gvm_ceiling.json", "w") as f:
        json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
