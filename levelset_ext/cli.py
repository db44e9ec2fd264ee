"""The command line: ``levelset-ext COMMAND``, the same as ``python -m levelset_ext COMMAND``.

Results go to files or as JSON to stdout, progress and messages to stderr. Exit status 0 means that
the work is done; 2 that an input cannot be used, said in one line; 1 that something else failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from levelset_ext._load import build_info, system_info
from levelset_ext.bench import add_bench_command
from levelset_ext.errors import InputError
from levelset_ext.recipes.attack import add_attack_command
from levelset_ext.recipes.devices import parse_device
from levelset_ext.recipes.files import prepare_folder
from levelset_ext.recipes.observers import add_observer_options, chosen_observers
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.ranks import launched, rank_of_launch, restarted, started
from levelset_ext.recipes.run_folder import check_apart
from levelset_ext.recipes.sweep import add_sweep_command
from levelset_ext.recipes.train import add_train_command


class _Parser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here an error is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{name}: expected numbers with commas between, got {text!r}") from None


def _reconstruct(args: argparse.Namespace) -> None:
    from levelset_ext.recipes.reconstruct import RESULTS, load_cloud, preset, reconstruct

    if args.scan is not None:
        check_apart("scan", args.scan, Path(args.out), RESULTS)
    levels = None if args.levels is None else _numbers("levels", args.levels)
    lam = None if args.lam is None else (args.lam[0], args.lam[1])
    config = preset(
        args.preset,
        args.steps,
        args.seed,
        levels=levels,
        p=args.p,
        lam=lam,
        resolution=args.resolution,
    )
    observers = chosen_observers(args)  # before a large file is read
    with launched(args.device) as (ranks, device), observers:
        metrics = reconstruct(
            load_cloud(args.scan, args.seed),
            Path(args.out),
            config,
            device=device,
            resume=args.resume or restarted(),
            say=say,
            observers=observers,
            ranks=ranks,
        )
    if ranks.main:
        say(
            f"{args.out}/mesh.ply: {metrics['vertices']} vertices, {metrics['faces']} faces, "
            f"{metrics['components']} component(s), "
            f"{'watertight' if metrics['watertight'] else 'open'}, {metrics['seconds']:.0f} s"
        )
        if (folded := 1 - metrics.get("sign_change_share", 1.0)) > 0.001:
            say(
                f"note: F has the same sign on both sides of {100 * folded:.3g} % of the cloud; "
                "the surface misses it there, or has bubbles or holes, see preview.png"
            )


def _curve(args: argparse.Namespace) -> None:
    from levelset_ext.recipes.curve import (
        RESULTS,
        curve_preset,
        load_curve_points,
        reconstruct_curve,
    )

    if args.points is not None:
        check_apart("points", args.points, Path(args.out), RESULTS)
    device, observers = parse_device(args.device), chosen_observers(args)
    config = curve_preset(args.preset, args.steps, args.seed)
    cloud = load_curve_points(args.points, args.seed)
    with observers:
        metrics = reconstruct_curve(
            cloud,
            Path(args.out),
            config,
            device=device,
            resume=args.resume,
            say=say,
            observers=observers,
        )
    say(
        f"{args.out}/curve.ply: {metrics['vertices']} vertices, {metrics['components']} "
        f"component(s), {'closed' if metrics['closed'] else 'open'}, length "
        f"{metrics['length']:.6g}, {metrics['seconds']:.0f} s"
    )


def _compare(args: argparse.Namespace) -> None:
    from levelset_ext.data.meshes import read_mesh
    from levelset_ext.geometry.compare import compare_meshes

    if args.seed < 0:
        raise InputError(f"seed: expected a number >= 0, got {args.seed}")
    if args.samples < 1:
        raise InputError(f"samples: expected at least 1, got {args.samples}")
    mesh, truth = read_mesh(args.mesh), read_mesh(args.truth)
    try:
        result = compare_meshes(mesh, truth, samples=args.samples, seed=args.seed)
    except ValueError as error:
        raise InputError(f"{args.mesh}, {args.truth}: {error}") from None
    print(json.dumps(result, indent=2))


def _trim(args: argparse.Namespace) -> None:
    import numpy as np

    from levelset_ext.data.meshes import read_mesh, write_mesh
    from levelset_ext.data.scans import read_points
    from levelset_ext.geometry.trim import trim_mesh

    share, out = args.distance, Path(args.out)
    if share is None and args.smallest is None:
        raise InputError("distance, smallest: expected one of them or both, got neither")
    if (share is None) != (args.scan is None):
        raise InputError(
            "scan: expected one for --distance, got none"
            if args.scan is None
            else f"distance: expected one for the scan {args.scan}, got none"
        )
    if share is not None and not (0 < share < math.inf):
        raise InputError(f"distance: expected a share > 0, got {share}")
    if out.suffix.lower() != ".ply" or out.is_dir():
        raise InputError(f"out: expected a file NAME.ply to write, got {out}")
    mesh, points, length = read_mesh(args.mesh), None, math.inf
    if args.scan is not None:
        points = read_points(args.scan)
        if out.exists() and out.samefile(args.scan):
            raise InputError(f"out: expected another file than the scan, got {out}")
        diagonal = float(np.linalg.norm(np.ptp(points, axis=0)))
        if not diagonal > 0:
            raise InputError(f"{args.scan}: expected points in different places, got one place")
        length = share * diagonal
    if not out.parent.is_dir():
        prepare_folder(out.parent)
    try:
        left = trim_mesh(mesh, points, length, args.smallest or 0.0)
    except ValueError as error:
        raise InputError(str(error)) from None
    if not len(left.faces):
        raise InputError(
            f"{args.mesh}: expected faces within {length:.3g} of {args.scan} ({share:g} of its "
            "diagonal), got none; is it in the same units?"
        )
    write_mesh(out, left.vertices, left.faces)
    found = {
        "distance": length if math.isfinite(length) else None,
        "far": left.far,
        "pieces": left.pieces,
        "vertices": len(left.vertices),
        "faces": len(left.faces),
    }
    print(json.dumps(found, indent=2))


def _info(args: argparse.Namespace) -> None:
    print(json.dumps(system_info(), indent=2))


def _parser() -> _Parser:
    parser = _Parser(
        prog="levelset-ext", description="Points on the level sets of neural networks."
    )
    parser.add_argument("--version", action="version", version=build_info()["version"])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser(
        "reconstruct",
        help="a raw point cloud to a mesh",
        description="Trains a network whose zero level set passes through a point cloud and writes "
        "mesh.ply, metrics.json, preview.png, checkpoint.pt and config.json. No normals needed.",
    )
    one.add_argument(
        "scan",
        nargs="?",
        metavar="SCAN",
        help="PLY, OBJ, OFF, STL, XYZ or NPY; a synthetic scan if left out",
    )
    one.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    one.add_argument(
        "--preset", default="fast", help="fast (the default, minutes on a CPU) or paper (for a GPU)"
    )
    one.add_argument("--steps", type=int, help="training steps; the schedules stretch to them")
    one.add_argument("--seed", type=int, default=0, help="of every random choice; 0 if left out")
    one.add_argument(
        "--resolution",
        type=int,
        metavar="N",
        help="cells of the mesh along the longest side; that of the preset if left out",
    )
    one.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    one.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    add_observer_options(one, viewer=True)
    loss = one.add_argument_group(
        "Eq. 13", "lengths in units in which the longest half side is 0.9"
    )
    loss.add_argument("--levels", metavar="T,T", help="levels to project samples to; 0 if left out")
    loss.add_argument("--p", type=float, help="exponent of the first sum")
    loss.add_argument(
        "--lam",
        type=float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="lambda, growing with the steps",
    )
    one.set_defaults(run=_reconstruct)

    one = commands.add_parser(
        "curve",
        help="points to a curve",
        description="Trains a network whose zero level set is a curve through points of space (two "
        "outputs) or of the plane (one output), traces it and writes curve.ply (vertices in order "
        "and edges), metrics.json, preview.png, checkpoint.pt and config.json.",
    )
    one.add_argument(
        "points",
        nargs="?",
        metavar="POINTS",
        help="PLY, OBJ, OFF, STL, XYZ or NPY; noisy points of a random closed spline if left out",
    )
    one.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    one.add_argument("--preset", default="fast", help="fast (the default) or paper (for a GPU)")
    one.add_argument("--steps", type=int, help="training steps; the schedules stretch to them")
    one.add_argument("--seed", type=int, default=0, help="of every random choice; 0 if left out")
    one.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    one.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    add_observer_options(one, viewer=True)
    one.set_defaults(run=_curve)

    one = commands.add_parser("compare", help="distances between two surfaces, as JSON")
    one.add_argument("mesh", metavar="MESH")
    one.add_argument("truth", metavar="TRUTH")
    one.add_argument(
        "--samples",
        type=int,
        default=30_000,
        help="points drawn from each surface, for the chamfer distances and normals",
    )
    one.add_argument("--seed", type=int, default=0, help="of every random choice; 0 if left out")
    one.set_defaults(run=_compare)

    one = commands.add_parser(
        "trim",
        help="a mesh without what no point is near to, or without small pieces",
        description="A level set closes where a scan ends. This takes the lids off again, and "
        "bubbles, and writes the rest as PLY. What was taken off goes to stdout, as JSON.",
    )
    one.add_argument("mesh", metavar="MESH")
    one.add_argument("scan", nargs="?", metavar="SCAN", help="the points, for --distance")
    one.add_argument("--out", required=True, metavar="FILE", help="PLY to write")
    one.add_argument(
        "--distance",
        type=float,
        metavar="D",
        help="faces further from every point go; a share of the diagonal of the scan, such as 0.01",
    )
    one.add_argument(
        "--smallest",
        type=float,
        metavar="S",
        help="pieces with less than this share of the area go, such as 0.001",
    )
    one.set_defaults(run=_trim)

    add_train_command(commands)
    add_attack_command(commands)
    add_sweep_command(commands)
    add_bench_command(commands)

    one = commands.add_parser("info", help="versions, compiler, CUDA and devices, as JSON")
    one.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = _parser().parse_args(argv)
    program: Any = f"levelset-ext {args.command}"
    try:
        if started() > 1 and args.command not in ("reconstruct", "train", "attack"):
            raise InputError(f"torchrun: expected 1 process, got {started()}")
        args.run(args)
    except InputError as error:
        if rank_of_launch() == 0:  # all processes see the same input
            print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError) as error:
        print(f"{program}: failed: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"{program}: failed: not enough memory ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted; --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
