"""Two nodes on one machine: two torchrun agents in two working folders, which share only --out.

sft.py, since starting takes longest; results/nodes.md has dvpo.py.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
from helpers import HERE, path, resume_cases, same_run, world

from runtime import processes

TORCHRUN = sys.executable, "-m", "torch.distributed.run"


def start_node(folder, port, argv):
    environment = {k: v for k, v in os.environ.items() if k not in processes.LAUNCHER_VARIABLES}
    meeting = "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "dvpo"
    command = *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *meeting, "sft.py", *argv
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=dict(environment, OMP_NUM_THREADS="1"))


def two_nodes(argv, kill_after=None):
    """Run sft.py on two nodes -> exit codes; after so many steps the second is killed, all its processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    nodes = [start_node(folder, port, argv) for folder in (path("node0"), path("node1"))]
    if kill_after:
        metrics = os.path.join(argv[argv.index("--out") + 1], "metrics.jsonl")
        for _ in range(4800):
            time.sleep(0.05)
            if os.path.exists(metrics) and sum(1 for _ in open(metrics)) >= kill_after:
                break
        victim = psutil.Process(nodes[1].pid)
        for process in [victim, *victim.children(recursive=True)]:
            process.kill()
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    return [node.returncode for node in nodes], errors


def make_nodes():
    """Two working folders, path("node0") and path("node1")."""
    for name in ("node0", "node1"):
        ignored = shutil.ignore_patterns(".*", "out", "results", "docs", "tests")
        shutil.copytree(HERE, path(name), ignore=ignored, dirs_exist_ok=True)


def test_out_must_be_shared():
    """With an --out of each node's own no checkpoint would be whole: refused before the first step."""
    world()
    make_nodes()
    codes, errors = two_nodes([*resume_cases("3")[0][2], "--out", "out/own"])
    assert all(code > 0 for code in codes), (codes, errors)
    assert "error: --out out/own: each host has its own" in "".join(errors), errors
    for name in ("node0", "node1"):
        left = os.listdir(path(name, "out/own"))
        assert left in ([], ["run.json"]), left             # no step was done, and no mark is left


def test_a_killed_node_and_resume():
    """The other node ends; steps that are done again after --resume come out as before, bit for bit."""
    world()
    make_nodes()
    argv = [*resume_cases("3")[0][2], "--max-steps", "8", "--gold", "", "--out", path("nodes")]
    codes, errors = two_nodes(argv, kill_after=3)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL), (codes, errors)
    before = read_metrics()
    assert 3 <= len(before) < 8
    codes, errors = two_nodes([*argv, "--resume"])
    assert codes == [0, 0], errors
    after = read_metrics()
    same_run(after[:len(before)], before)
    assert [row["step"] for row in after] == list(range(8))


def read_metrics():
    with open(path("nodes/metrics.jsonl")) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]
