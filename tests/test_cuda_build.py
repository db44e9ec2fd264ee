"""What can be said about the CUDA kernels without a GPU: they are in the module, for every op."""

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import levelset_ext as ls
from levelset_ext import _C

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {
    "pinv_apply",
    "pinv_adjoint",
    "newton_update",
    "newton_update_",
    "nearest",
    "bracket_update_",
    "mlp_pack_",
    "mlp_project",
    "mlp_values",
}
OPS = sorted(
    name.split("::")[1]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("levelset_ext::")
)


ON_CPU_ONLY = {"mlp_weight_gradient"}  # on CUDA no tape is kept


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


def test_the_fused_kernel_says_which_networks_it_takes():
    def plan(*widths, d=3):
        shapes = [(o, i, d if k == 0 else 0) for k, (i, o) in enumerate(pairwise((0, *widths)))]
        return _C.mlp_cuda_plan(shapes)

    if not ls.build_info()["cuda"]:
        assert plan(64, 1) is None
        return
    assert plan(64, 1)[2] == 0  # no matrix for tensor cores
    assert plan(64, 40, 1)[2] == 64 * (32 + 32)  # pairs of W^T and of W, padded to 16
    # Bias, U^T of 3 rows, then W^T (64 rows) and W (1 row, padded to 16) of the last layer.
    assert plan(64, 1)[0] == 64 * (1 + 3) + 64 * (1 + 64 + 16)
    for widths in ((1,), (5, 2), (128,) * 4 + (1,), (512,) * 8 + (1,)):
        packed, shared, _ = plan(*widths)
        assert packed > 0
        assert shared <= 113 * 1024  # two blocks on a multiprocessor with 228 KiB
    for widths, d in (((513, 1), 3), ((8, 3), 3), ((8, 1), 17), ((4,) * 24 + (1,), 3)):
        assert plan(*widths, d=d) is None
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    assert ls.networks.MLP.from_module(net)._cuda_plan == plan(8, 1)


def test_the_room_of_a_device_that_is_not_there_is_an_error_and_not_none():
    if not ls.build_info()["cuda"]:
        assert _C.mlp_cuda_room(0) == 0
        return
    with pytest.raises(RuntimeError, match="mlp_cuda_room: device 99"):
        _C.mlp_cuda_room(99)


def test_resource_check_skips_visibly_without_a_toolkit():
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    script = ROOT / "tools" / "check_cuda_resources.py"
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.returncode == 0
    assert "skipped" in run.stdout


def test_resource_check_reads_the_log_of_a_build(tmp_path):
    def check(text):
        log = tmp_path / "build.log"
        log.write_text(text)
        script = ROOT / "tools" / "check_cuda_resources.py"
        command = [sys.executable, script, "--log", log]
        return subprocess.run(command, capture_output=True, text=True)

    def kernel(stem, spilled=0):
        return (
            f"ptxas info    : Compiling entry function '_ZN53_GLOBAL__N__0_1_{stem}_cu_2_33f' for "
            f"'sm_90'\n    8 bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 40 registers, used 0 barriers\n"
        )

    files = [path.stem for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    run = check("".join(map(kernel, files)))
    assert (run.returncode, run.stderr) == (0, "")
    assert f"{len(files)} kernels, 0 that spill" in run.stdout
    run = check("".join(kernel(name, 4 * (name == "nearest")) for name in files))
    assert run.returncode == 1
    assert "spills on sm_90" in run.stderr
    run = check("".join(kernel(name) for name in files if name != "mlp"))
    assert run.returncode == 1
    assert "no kernel of csrc/cuda/mlp.cu; was it built with -Xptxas -v?" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_gpu_check_without_a_gpu_is_one_line_and_status_3(tmp_path):
    script = ROOT / "benchmarks" / "gpu_check.sh"
    run = subprocess.run(["bash", script, tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 3
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
