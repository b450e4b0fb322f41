"""Real processes that talk through gloo, as torchrun would start them, each with an environment of its own."""
import os
import socket
import subprocess
import sys


def free_port():
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


END = "\nimport os, sys; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)"  # gloo's threads sometimes abort an interpreter that is done
JOIN = "import torch.distributed as dist; dist.init_process_group('gloo')\n"


def world(code, n, local_ranks=None, each=None, timeout=120):
    "Run a program in n processes; local_ranks makes hosts of them, each(rank) more environment. Returns (exit code, stdout, stderr) by rank."
    port, jobs = free_port(), []
    for rank in range(n):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str((local_ranks or range(n))[rank]), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **(each(rank) if each else {})}
        jobs.append(subprocess.Popen([sys.executable, "-c", code + END], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try: outs = [j.communicate(timeout=timeout) for j in jobs]
    finally:
        for j in jobs: j.kill()
    return [(j.returncode, *o) for j, o in zip(jobs, outs, strict=True)]
