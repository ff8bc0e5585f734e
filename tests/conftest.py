"""One thread for the whole suite, the same number for parent and forked ranks; hypothesis without a deadline."""

import os

for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import hypothesis
import torch
import torch._dynamo  # DDP imports it; here once, not once in every forked rank

try:
    import nvidia.dali.fn  # likewise
except ImportError:
    pass

torch.set_num_threads(1)
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")
