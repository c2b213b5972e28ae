"""Scoring never raises the peak memory of the training step (measured, in processes of their own)."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from earlysift import Sifter
from earlysift.pretrain.models import build_bert
from earlysift.scorers import training_loss

keep = float(sys.argv[1])
model = build_bert(vocab_size=8192, length=128, layers=6, width=128, seed=0)
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
sifter = Sifter(model, keep=keep, probe_every=1)
ids = torch.randint(5, 8192, (round(16 / keep), 128), generator=torch.Generator().manual_seed(0))
labels = torch.where(torch.arange(128) % 7 == 0, ids, -100)
for _ in range(3):
    training_loss(model, sifter.sift({"input_ids": ids, "labels": labels})).backward()
    optimizer.step()
    optimizer.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_mib(keep):
    command = [sys.executable, "-c", SCRIPT, str(keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's units")
def test_scoring_and_probing_pools_of_8b_keep_the_peak_memory_of_the_plain_step():
    # A dense head over the pool of 128 samples would hold 512 MiB of logits; a step holds a fraction of that.
    assert peak_mib(0.125) <= 1.05 * peak_mib(1.0)
