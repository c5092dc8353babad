"""The job scripts of docs/cluster.md, run with stand-ins for Slurm's commands and for ours."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from fst_fast.cli.main import build_parser

DOCUMENT = Path(__file__).parents[2] / "docs" / "cluster.md"
SCRIPTS = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", DOCUMENT.read_text(), re.DOTALL)
# A stand-in for srun starts two tasks; ours write down how they were called.
STAND_INS = {
    "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done; wait',
    "scontrol": "printf 'node7\\nnode8\\n'",
    "fst-fast": 'echo "fst-fast [$RANK] [$LOCAL_RANK] $*" >> "$CALLS"',
    "torchrun": 'echo "torchrun $*" >> "$CALLS"',
}


def calls(script, folder):
    for name, body in STAND_INS.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    (folder / "job.sh").write_text(script)
    variables = {"CALLS": str(folder / "calls"), "SLURM_ARRAY_TASK_ID": "5", "SLURM_NNODES": "2"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_NODELIST": "node[7-8]", **variables}
    environment.pop("RANK", None)
    environment.pop("LOCAL_RANK", None)
    subprocess.run(["bash", "job.sh"], cwd=folder, env=environment, check=True, timeout=60)
    return sorted((folder / "calls").read_text().splitlines())


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
def test_every_task_of_a_sweep_knows_its_rank(tmp_path):
    several, array = SCRIPTS[:2]
    assert calls(several, tmp_path) == [f"fst-fast [{i}] [{i}] sweep sweep.yaml" for i in (0, 1)]
    (tmp_path / "calls").unlink()
    assert calls(array, tmp_path) == ["fst-fast [5] [] sweep sweep.yaml"] * 2


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
def test_machines_of_one_model_meet_at_the_first(tmp_path):
    one, other = calls(SCRIPTS[2], tmp_path)
    assert one == other
    launcher, _, command = one.partition(" -m fst_fast ")
    assert launcher.endswith(
        "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node7:29500"
    )
    assert build_parser().parse_args(command.split()).batch_size == 256
