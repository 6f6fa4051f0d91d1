"""Training on CUDA without CUDA: see `steps`, whose tests run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
INCLUDE = [TORCH / "include", TORCH / "include/torch/csrc/api/include"]
RUN = """
import ctypes, os, sys
ctypes.CDLL(sys.argv[1])  # before torch, which asks once
import pytest
code = pytest.main(["-q", "-p", "no:cacheprovider", "tests/fake_cuda/steps.py", *sys.argv[2:]])
sys.stdout.flush()
os._exit(code)  # autograd's thread for the device does not end well
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch has CUDA: test_devices runs")
@pytest.mark.skipif(
    which("g++") is None or not INCLUDE[1].exists(), reason="no g++, or no headers of torch"
)
def test_training_steps(tmp_path):
    guard = tmp_path / "guard.so"
    compile_ = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", "-o", guard]
    compile_ += [HERE / "guard.cpp", HERE / "hooks.cpp", *(f"-I{folder}" for folder in INCLUDE)]
    link = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*compile_, *link], check=True)
    done = subprocess.run(
        [sys.executable, "-c", RUN, guard],
        cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    print(done.stdout)
