"""What a user sees when the installation does not fit, and the names the package promises."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch

import levelset_ext as ls
from levelset_ext import _C, _load, cli
from levelset_ext._load import check_torch

PACKAGE = Path(ls.__file__).parent
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import build_wheel  # noqa: E402


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117", "2.9.0a0+git12"])
def test_old_torch_is_one_clear_line(version):
    with pytest.raises(ImportError, match=r"needs torch >= 2\.11, found") as error:
        check_torch(version)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0"])
def test_supported_torch_passes(version):
    check_torch(version)


def last_line_of_import(folder: Path) -> str:
    """What ``import levelset_ext`` ends with, for the package in a folder, with the torch there."""
    # An editable install would find the module of the checkout.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "import levelset_ext"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=folder
    )
    assert run.returncode != 0
    return run.stderr.strip().splitlines()[-1]


@pytest.fixture
def package_without_module(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "levelset_ext", ignore=ignored)
    # Of torch only the version is looked at before the module; the real one takes seconds.
    (tmp_path / "torch.py").write_text(f"__version__ = {torch.__version__!r}\n")
    return tmp_path / "levelset_ext"


def test_missing_compiled_module_is_explained(package_without_module):
    last = last_line_of_import(package_without_module.parent)
    assert last.startswith("ImportError: levelset_ext: the compiled module _C is not built; in a")
    assert "circular" not in last


def test_module_of_another_python_is_explained(package_without_module):
    name = "_C.cpython-399-x86_64-linux-gnu.so"
    (package_without_module / name).write_bytes(b"whatever is in it")
    last = last_line_of_import(package_without_module.parent)
    assert "the compiled module _C is built for another Python: expected" in last
    assert name in last
    assert sysconfig.get_config_var("EXT_SUFFIX") in last


def test_module_that_does_not_load_is_explained(package_without_module):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (package_without_module / f"_C{suffix}").write_bytes(b"no ELF header")
    last = last_line_of_import(package_without_module.parent)
    assert f"the compiled module _C does not load with torch {torch.__version__} (" in last
    assert "build it again" in last


def test_missing_torch_and_old_torch_at_import_are_one_line(package_without_module, tmp_path):
    fake = tmp_path / "torch.py"
    fake.write_text("__version__ = '2.10.0+cu128'\n")
    last = last_line_of_import(tmp_path)
    assert last == "ImportError: levelset_ext needs torch >= 2.11, found 2.10.0+cu128"
    fake.write_text("raise ImportError('no torch here')\n")
    last = last_line_of_import(tmp_path)
    assert last == "ImportError: levelset_ext needs torch >= 2.11, which is not installed"


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


def test_import_leaves_what_is_slow_to_load_for_those_who_use_it():
    """torch's compiler alone would double the time that every command takes to start."""
    slow = ("torch._dynamo", "torch._inductor", "sympy", "sklearn", "matplotlib")
    script = f"import sys, levelset_ext.cli; print([n for n in {slow} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_version_comes_from_one_file():
    version = (ROOT / "VERSION").read_text().strip()
    assert ls.__version__ == ls.build_info()["version"] == version


def test_status_codes_are_the_compiled_ones():
    assert {status.name: int(status) for status in ls.Status} == _C.status_codes


def test_info_is_json_with_what_a_bug_report_needs(capsys):
    assert cli.main(["info"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.items() >= json.loads(json.dumps(ls.build_info())).items()
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["threads"]["torch"] == torch.get_num_threads()
    assert told["cpu_count"] >= 1
    assert told["vector_bytes"] == _C.mlp_vector_bytes
    assert told["instruction_set"] in ("AVX-512", "AVX2", "128-bit vectors")
    assert told["mixed_precision"] == _C.mlp_mixed
    assert told["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert len(told["devices"]) == len(told["cuda_devices"]) == torch.cuda.device_count()
    assert str(Path.home()) not in json.dumps(told)


def test_a_package_that_is_not_there_is_null(monkeypatch, capsys):
    monkeypatch.setattr(_load, "_OPTIONAL", ("no-package-has-this-name",))
    assert cli.main(["info"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["packages"]["no-package-has-this-name"] is None


def test_info_lists_what_the_metadata_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    assert needed == {"torch", *_load._NEEDED}


def test_citation_has_the_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"version: {ls.__version__}\n" in text


# --- distributions --------------------------------------------------------------------------------


def test_the_module_binds_to_no_single_torch():
    module = Path(_C.__file__)
    symbols = build_wheel.undefined_symbols(module)
    if not symbols:
        pytest.skip("needs nm")
    assert "aoti_torch_get_sizes" in symbols


@pytest.mark.parametrize(
    ("symbol", "bad"),
    [
        ("U _ZN3c106detail14torchCheckFailEPKcS2_jRKSs", True),
        ("U _ZNK2at10TensorBase8data_ptrIfEEPT_v", True),
        ("U _ZTVN5torch8autograd4NodeE", True),
        ("U _ZNSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv", False),
        ("U aoti_torch_get_sizes", False),
    ],
)
def test_cxx_names_of_torch_are_recognised(symbol, bad):
    assert bool(build_wheel.TORCH_CXX.search(symbol)) == bad


def test_the_source_distribution_is_complete(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to compare with")
    sdist = build_wheel.build_sdist(tmp_path)
    assert build_wheel.left_out(sdist) == []
    assert sdist.stat().st_size < 20e6


def test_a_wheel_for_another_python_is_refused(tmp_path):
    wheel = tmp_path / "levelset_ext-0-cp399-cp399-linux_x86_64.whl"
    with build_wheel.zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("levelset_ext/_C.cpython-399-x86_64-linux-gnu.so", b"")
    with pytest.raises(build_wheel.Refused, match="expected levelset_ext/_C"):
        build_wheel.inspect(wheel)


@pytest.mark.slow
def test_a_wheel_installs_and_runs_in_a_new_environment(tmp_path):
    """The compiled module of this checkout, packed as a wheel: no compiler is run, see make wheel
    for the build from the source distribution."""
    wheel = pack(tmp_path)
    assert build_wheel.inspect(wheel)["module"].startswith("levelset_ext/_C.")
    built = build_wheel.install_and_use(wheel, tmp_path / "env")
    assert built["version"] == ls.__version__


def pack(folder: Path) -> Path:
    """A wheel of the package as it is here."""
    version = ls.__version__
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    info = f"levelset_ext-{version}.dist-info"
    wheel = folder / f"levelset_ext-{version}-{tag}-{tag}-linux_x86_64.whl"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    files = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".pyi", ".typed")]
    files += [PACKAGE / "py.typed", PACKAGE / f"_C{suffix}"]
    with build_wheel.zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(set(files)):
            archive.write(path, str(path.relative_to(PACKAGE.parent)))
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: levelset_ext\nVersion: {version}\n"
            "Requires-Dist: torch>=2.11\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\n"
            f"Tag: {tag}-{tag}-linux_x86_64\n",
        )
        archive.writestr(
            f"{info}/entry_points.txt", "[console_scripts]\nlevelset-ext = levelset_ext.cli:main\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel
