"""What a fresh process waits for: the package's import, and the first evaluation's."""

import subprocess
import sys

IMPORTS = """
import time
started = time.process_time()
import torch
middle = time.process_time()
import fst_fast
print(middle - started, time.process_time() - middle)
"""

EVALUATES = """
import sys, torch
before = "torch._dynamo" in sys.modules
import fst_fast
from fst_fast.lab.models import resnet18
images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
loader = fst_fast.DeviceLoader(images, torch.arange(8), shuffle=False)
model = resnet18(num_classes=10, width=4)
fst_fast.heads.find_head(model)
fst_fast.evaluate(model, loader, fst_fast.triggers.BadNets())
print(before, "torch._dynamo" in sys.modules)
"""


def printed(script):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_the_import_costs_a_fraction_of_torchs():
    # In shares of torch's own import, which takes a second and more: the machine may be loaded.
    torch_seconds, own_seconds = (float(seconds) for seconds in printed(IMPORTS))
    assert own_seconds < 0.3 * max(torch_seconds, 1.0)


def test_the_first_evaluation_imports_no_compiler():
    before, after = printed(EVALUATES)
    assert after == before
