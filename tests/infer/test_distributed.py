"""Process groups of torch."""

import subprocess
import sys

SCRIPT = """
import os
import torch
import torch.distributed as dist
import pyro_vae.infer
from torch.fx.experimental.proxy_tensor import make_fx

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3))
make_fx(lambda a: 2 * a)(torch.ones(3))  # tracing imports modules of torch.distributed
dist.destroy_process_group()
print(sorted(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")))
"""


def test_destroying_a_process_group_ends_its_threads():
    """A remaining thread may abort the process at exit, by releasing a tensor after Python is finalized."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gloo" not in done.stdout
