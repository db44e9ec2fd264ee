"""The networks of Table A1 and ResNet-18: sizes, shapes, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from levelset_ext.errors import InputError
from levelset_ext.networks import CLASSIFIERS, build
from levelset_ext.recipes.classifiers import load_classifier, load_foreign, save_classifier

# Counted by hand from Table A1.
PARAMETERS = {
    "convnet-2a": 166_406,
    "convnet-2b": 1_663_370,
    "convnet-4a": 312_202,
    "convnet-4b": 2_466_858,
    "resnet-18": 11_173_962,
}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_parameters_and_shapes(name: str) -> None:
    network = build(name).eval()
    assert parameters(network) == PARAMETERS[name]
    with torch.no_grad():
        assert network(torch.rand(2, *network.shape)).shape == (2, 10)


def test_convnet4a_layers() -> None:
    network = build("ConvNet-4a")
    seen: list[tuple[int, ...]] = []
    for layer in network.features:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:])))
    network(torch.rand(1, 1, 28, 28))
    assert seen[-1] == (64, 4, 4)
    kinds = [type(layer).__name__ for layer in network.classifier]
    assert kinds == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_released_variant_is_affine_after_the_features() -> None:
    network = build("convnet-4a", released=True).double()
    assert parameters(network) == PARAMETERS["convnet-4a"]
    a, b = torch.randn(2, 1, 64, 4, 4, dtype=torch.float64)
    middle = network.classifier((a + b) / 2)
    assert torch.allclose(middle, (network.classifier(a) + network.classifier(b)) / 2)


def test_names_options_and_other_sizes() -> None:
    assert build("RESNET_18", classes=3).linear.out_features == 3
    assert build("convnet-2a", 1, (1, 8, 8))(torch.rand(2, 1, 8, 8)).shape == (2, 1)
    assert build("convnet-2b", shape=(3, 32, 32))(torch.rand(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "convnet-9"}, "name: expected one of convnet-2a"),
        ({"name": "convnet-4a", "shape": (1, 8, 8)}, "shape: expected larger images"),
        ({"name": "convnet-2a", "shape": (8, 8)}, r"shape: expected \(c, h, w\)"),
        ({"name": "convnet-2a", "classes": 0}, "classes: expected at least 1"),
        ({"name": "convnet-2a", "released": True}, "released: expected only with convnet-4a"),
    ],
)
def test_bad_names_and_options(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_wrong_images() -> None:
    with pytest.raises(ValueError, match=r"x: expected images \(n, 1, 28, 28\), got"):
        build("convnet-4a")(torch.rand(2, 3, 28, 28))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnet-4a", {"released": True}),
        ("convnet-2a", {"classes": 2, "shape": (1, 8, 8)}),
        ("resnet-18", {"classes": 4, "shape": (3, 16, 16)}),
    ],
)
def test_checkpoint_round_trip(tmp_path: Path, name: str, options: dict) -> None:
    network = build(name, **options).eval()
    save_classifier(tmp_path / "a.pt", network, epoch=3)
    again = load_classifier(tmp_path / "a.pt")
    assert not again.training
    x = torch.rand(2, *network.shape)
    with torch.no_grad():
        assert torch.equal(network(x), again(x))
    assert torch.load(tmp_path / "a.pt", weights_only=True)["epoch"] == 3


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_classifier(path, build("convnet-2a"))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "network": "convnet-4a"}, path)
    with pytest.raises(InputError, match="they do not fit"):
        load_classifier(path)
    torch.save({**content, "network": "convnet-7"}, path)
    with pytest.raises(InputError, match="expected a network of this version"):
        load_classifier(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=r"a.pt: expected a levelset_ext classifier 1"):
        load_classifier(path)
    with pytest.raises(InputError, match=r"missing.pt"):
        load_classifier(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match=r"made by networks.build, got Linear"):
        save_classifier(path, nn.Linear(2, 2))


def test_networks_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_code.py").write_text(
        "from torch import nn\n"
        "def make(width=3):\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, width))\n"
        "def broken():\n    raise RuntimeError('no luck')\n"
        "def number():\n    return 7\n"
    )
    monkeypatch.chdir(tmp_path)
    weights = {"1.weight": torch.rand(2, 4), "1.bias": torch.rand(2)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, "w.pt")
    network = load_foreign("other_code:make", "w.pt", {"width": 2})
    assert torch.equal(network[1].weight, weights["1.weight"])
    for factory, message in [
        ("other_code:make", "do not fit"),
        ("other_code:broken", "RuntimeError: no luck"),
        ("other_code:number", "to make a module, got int"),
        ("other_code:nothing", "AttributeError"),
        ("no_such_module:make", "ModuleNotFoundError"),
        ("other_code", "expected MODULE:FACTORY"),
    ]:
        with pytest.raises(InputError, match=message):
            load_foreign(factory, "w.pt")
    with pytest.raises(InputError, match="expected weights, cannot read"):
        load_foreign("other_code:make", "missing.pt")
