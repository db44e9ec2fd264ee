"""What a user sees when the installation does not fit, and the names the package promises."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import levelset_ext as ls
from levelset_ext._load import check_torch

PACKAGE = Path(ls.__file__).parent


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117", "2.9.0a0+git12"])
def test_old_torch_is_one_clear_line(version):
    with pytest.raises(ImportError, match=r"needs torch >= 2\.11, found") as error:
        check_torch(version)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0"])
def test_supported_torch_passes(version):
    check_torch(version)


def test_missing_compiled_module_is_explained(tmp_path):
    copy = tmp_path / "levelset_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    # An editable install would find the module of the checkout.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "import levelset_ext"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: levelset_ext: the compiled module _C is not built")


def test_public_names_are_there():
    for name in ls.__all__:
        assert getattr(ls, name) is not None
    for name in ("reconstruction", "robust", "geometric_svm"):
        assert callable(getattr(ls.losses, name))
    for name in ("extract_mesh", "compare_meshes", "render_preview"):
        assert callable(getattr(ls.geometry, name))
    assert callable(ls.attacks.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ls.nothing


def test_version_comes_from_one_file():
    version = (PACKAGE.parent / "VERSION").read_text().strip()
    assert ls.__version__ == ls.build_info()["version"] == version


def test_status_codes_are_the_compiled_ones():
    from levelset_ext import _C

    assert {status.name: int(status) for status in ls.Status} == _C.status_codes
