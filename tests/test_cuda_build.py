"""What can be said about the CUDA kernels without a GPU: they are in the module, for every op."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import levelset_ext as ls

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {
    "pinv_apply",
    "pinv_adjoint",
    "newton_update",
    "newton_update_",
    "nearest",
    "bracket_update_",
}
OPS = sorted(
    name.split("::")[1]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("levelset_ext::")
)


ON_CPU_ONLY = {op for op in OPS if op.startswith("mlp_")}  # elsewhere the module is called


@pytest.mark.parametrize("op", sorted(set(OPS) - ON_CPU_ONLY))
def test_every_op_has_a_cuda_kernel_exactly_when_cuda_is_in(op):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"levelset_ext::{op}", "CUDA")
    assert registered == ls.build_info()["cuda"]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_cpu_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"levelset_ext::{op}", "CPU")


def test_the_dispatcher_lists_the_ops():
    assert set(OPS) >= KNOWN


def test_build_info_names_toolkit_and_architectures():
    info = ls.build_info()
    if info["cuda"]:
        assert info["cuda_toolkit"]
        assert info["cuda_architectures"]
    else:
        assert info["cuda_toolkit"] is None
        assert info["cuda_architectures"] == ""


def test_resource_check_skips_visibly_without_a_toolkit():
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    script = ROOT / "tools" / "check_cuda_resources.py"
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.returncode == 0
    assert "skipped" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_gpu_check_without_a_gpu_is_one_line_and_status_3(tmp_path):
    script = ROOT / "benchmarks" / "gpu_check.sh"
    run = subprocess.run(["bash", script, tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 3
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
