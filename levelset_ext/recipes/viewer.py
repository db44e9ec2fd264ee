"""``--viewer``: a page in the browser that shows a reconstruction while it is trained.

The page is served by viser from this process: the points, samples on their way to the level set,
iso-levels on a plane, the surface by a coarse extraction, and the losses. The training hands over
a copy of its network every now and then, and everything is worked out from the copy by a thread of
its own with random numbers of its own: what is trained does not depend on who watches.
"""

from __future__ import annotations

import copy
import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.measure import find_contours
from torch import Tensor, nn

from levelset_ext.errors import InputError
from levelset_ext.geometry.extract import extract_mesh
from levelset_ext.recipes.observers import Moment, Observer, Run
from levelset_ext.recipes.progress import say as say_to_person
from levelset_ext.samplers import project

__all__ = ["Slice", "Viewer", "iso_lines", "sample_paths"]

MOST_POINTS = 30_000  # of the scan
PATHS = 700  # samples that are followed
NEWTON_STEPS = 6
NOISE = 0.12  # sigma of their starts around the scan, in units of the training
GRID = 96  # values of F along the longer side of the plane of the iso-levels
LEVEL_STEP = 0.1  # between iso-levels
RESOLUTION, LAST_RESOLUTION = 48, 96  # of the extraction, while training and at the end
CURVE_POINTS = 600  # of a plotted loss
SHARE = 0.25  # of the time that looking may take
_TICK = 0.12  # seconds between two pictures of the moving samples
_TICKS = 5  # pictures between two Newton steps

_RGB = tuple[int, int, int]
_SCAN: _RGB = (40, 70, 130)
_FAR, _NEAR = np.array([235, 110, 0.0]), np.array([0, 120, 60.0])  # of samples
_INSIDE, _OUTSIDE, _ZERO = np.array([0, 70, 170.0]), np.array([200, 20, 20.0]), np.zeros(3)
_SURFACES: tuple[_RGB, ...] = ((128, 158, 199), (204, 158, 122))
_PLOTTED = {
    "loss": "#20262e",
    "loss_projected": "#2f6db3",
    "loss_other_levels": "#e08a1e",
    "loss_cloud": "#3b8f5a",
}


@dataclass
class Curves:
    """Figures over the steps, thinned to at most ``CURVE_POINTS``."""

    steps: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        self.steps.append(step)
        for name in _PLOTTED:
            self.values.setdefault(name, []).append(float(figures.get(name, np.nan)))
        if len(self.steps) > 2 * CURVE_POINTS:
            self.steps = self.steps[::2]
            self.values = {name: some[::2] for name, some in self.values.items()}

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The steps, then a curve for each name of ``_PLOTTED``, as plotted: what is not above zero
        has no place on a logarithmic axis."""
        columns = [np.array(self.values.get(name, []), dtype=np.float64) for name in _PLOTTED]
        return (
            np.array(self.steps, dtype=np.float64),
            *(np.where(column > 0, column, np.nan) for column in columns),
        )


@dataclass(frozen=True)
class Slice:
    """A plane across the box: its normal's axis, and where, from 0 to 1."""

    axis: int = 2
    place: float = 0.5


class Viewer(Observer):
    """Serves the page; what is on it is in ``nodes``, ``show``, ``plot`` and ``status``.

    Args:
        host, port: where the page is served; the next free port if that one is taken, any free one
            for 0.
        say: where the address is told.

    Raises:
        InputError: viser is not there; nothing can be served at that address.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8080,
        say: Callable[[str], None] = say_to_person,
    ) -> None:
        try:
            import viser
        except ImportError as error:
            raise InputError(
                'viewer: expected the package viser, from the extra "levelset_ext[viewer]", '
                f"cannot import it ({error})"
            ) from None
        _check_address(host, port)
        self._viser, self.host, self.port, self.say = viser, host, port, say
        self.server: Any = None
        self.curves = Curves()
        self._wake, self._stop, self._idle = (threading.Event() for _ in range(3))
        self._idle.set()
        self._threads: list[threading.Thread] = []
        self._network: nn.Module | None = None  # the newest copy; replaced, never changed
        self._shown: _Look | None = None  # what the worker has made of it
        self._job = 0, RESOLUTION  # of that copy: its step, and how finely to look
        self._failed: Exception | None = None
        self._next = 0.0  # not looked at again before
        self._finished = False

    # --- what the training calls ---

    def begin(self, run: Run) -> None:
        training = self._training = run.training
        self.steps, self.every = run.steps, max(1, run.steps // CURVE_POINTS)
        self.low, self.high = (_space(x)[0] for x in (training.low[None], training.high[None]))
        self.plane = training.cloud.shape[1] == 2
        some = max(1, -(-len(training.cloud) // MOST_POINTS))
        self.cloud = training.cloud[::some].detach().clone()
        self._began, self._first = time.monotonic(), run.first
        with _quiet():
            self.server = self._viser.ViserServer(self.host, self.port, "levelset_ext")
        self._furnish()
        for target in (self._work, self._play):
            thread = threading.Thread(target=target, daemon=True, name="levelset_ext viewer")
            thread.start()
            self._threads.append(thread)
        self.say(f"watch at http://{self.host}:{self.server.get_port()}")

    def due(self, step: int, *, last: bool, saved: bool) -> bool:
        return last or self._ready() or step % self.every == 0

    def see(self, moment: Moment) -> None:
        self._check()
        if moment.last or moment.step % self.every == 0:
            self.curves.add(moment.step, moment.figures)
        if self._ready():
            self._hand_over(moment.step, RESOLUTION)

    def done(self, pictures: Mapping[str, Path], metrics: Mapping[str, Any]) -> None:
        self._idle.wait()
        self._hand_over(self.steps, LAST_RESOLUTION)
        self._idle.wait()
        self._check()
        self._finished = True
        self._status("finished")

    def _ready(self) -> bool:
        return self._idle.is_set() and time.monotonic() >= self._next

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """After a finished run stays for those who look, until their last page is closed."""
        if self.server is None:
            return
        try:
            if self._finished and self.server.get_clients():
                self.say("the page stays until it is closed in the browser; Ctrl-C ends it now")
            while self._finished and self.server.get_clients():
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass  # the work is done
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join()
        with _quiet():
            self.server.stop()
        self.server = None

    # --- the page ---

    def _furnish(self) -> None:
        """All nodes and controls, empty where there is nothing yet."""
        server, scene, gui = self.server, self.server.scene, self.server.gui
        size = float((self.high - self.low).max())
        center = (self.low + self.high) / 2
        scene.set_up_direction("+y")
        server.initial_camera.look_at = tuple(center)
        away = np.array([0.0, 0.0, 1.0]) if self.plane else np.array([0.55, 0.35, 0.8])
        server.initial_camera.position = tuple(center + away * size)
        gui.configure_theme(
            control_width="medium",
            show_logo=False,
            show_share_button=False,  # it would hand the page to a server elsewhere
            brand_color=(47, 109, 179),
        )
        gui.main_panel.dock_right()
        none, pair = np.zeros((0, 3), np.float32), np.zeros((0, 2, 3), np.float32)
        self.nodes: dict[str, Any] = {
            "scan": scene.add_point_cloud(
                "/scan",
                _space(self.cloud).astype(np.float32),
                _SCAN,
                point_size=0.012 if self.plane else 0.004,
                point_shape="circle",
                point_shading="flat",
            ),
            "samples": scene.add_point_cloud(
                "/samples",
                none,
                none.astype(np.uint8),
                point_size=0.02,
                point_shape="circle",
                point_shading="flat",
            ),
            "paths": scene.add_line_segments(
                "/paths", pair, pair.astype(np.uint8), thickness=1.5, thickness_units="screen"
            ),
            "levels": scene.add_line_segments(
                "/levels", pair, pair.astype(np.uint8), thickness=2.0, thickness_units="screen"
            ),
            "zero": scene.add_line_segments(
                "/zero", pair, pair.astype(np.uint8), thickness=4.0, thickness_units="screen"
            ),
        }
        self.status = gui.add_markdown("waiting for the first picture")
        self.bar = gui.add_progress_bar(0.0)
        uplot = self._viser.uplot
        self.plot = gui.add_uplot(
            self.curves.arrays(),
            (
                uplot.Series(label="step"),
                *(
                    uplot.Series(label=name.replace("_", " "), stroke=colour, width=1.5)
                    for name, colour in _PLOTTED.items()
                ),
            ),
            scales={"x": uplot.Scale(time=False), "y": uplot.Scale(distr=3)},
            title="losses",
            aspect=1.4,
        )
        self.show: dict[str, Any] = {}
        with gui.add_folder("show"):
            labels = {"scan": "points", "samples": "samples and paths", "levels": "iso-levels"}
            if not self.plane:
                labels["surface"] = "surface"
            for name, label in labels.items():
                self.show[name] = gui.add_checkbox(label, True)
                self.show[name].on_update(lambda _: self._dress())
        with gui.add_folder("samples"):
            self.moving = gui.add_checkbox("move", True)
            self.newton = gui.add_slider(
                "Newton steps", 0.0, float(NEWTON_STEPS), 1 / _TICKS, float(NEWTON_STEPS)
            )
            self.newton.on_update(lambda _: None if self.moving.value else self._place_samples())
        if not self.plane:
            with gui.add_folder("plane of the iso-levels"):
                self.axis = gui.add_dropdown("across", ("x", "y", "z"), initial_value="z")
                self.place = gui.add_slider("at", 0.0, 1.0, 0.01, 0.5)
            for control in (self.axis, self.place):
                control.on_update(lambda _: self._draw_levels())

    def _slice(self) -> Slice:
        return Slice() if self.plane else Slice("xyz".index(self.axis.value), self.place.value)

    def _dress(self) -> None:
        """Shows what is ticked."""
        kind = {"paths": "samples", "zero": "levels"}
        for name, node in self.nodes.items():
            word = "surface" if name.startswith("surface") else kind.get(name, name)
            node.visible = bool(self.show[word].value)

    def _status(self, word: str = "") -> None:
        shown = self._shown
        if shown is None:
            return
        speed = (shown.step - self._first) / max(time.monotonic() - self._began, 1e-9)
        figures = {name: some[-1] for name, some in self.curves.values.items() if some}
        self.bar.value = 100 * shown.step / self.steps
        line = f"**step {shown.step} of {self.steps}**, {word or f'{speed:.1f} steps/s'}"
        if "loss" in figures:
            line += f"  \nloss {figures['loss']:.5f}, at the points {figures['loss_cloud']:.5f}"
        share = 100 * shown.converged
        self.status.content = (
            f"{line}  \n{share:.1f} % of the samples arrive in {NEWTON_STEPS} Newton steps"
        )

    def _place_samples(self) -> None:
        """The samples where the slider has them, between two Newton steps on a straight line."""
        shown = self._shown
        if shown is None:
            return
        at = min(max(float(self.newton.value), 0.0), float(NEWTON_STEPS))
        below = min(int(at), NEWTON_STEPS - 1)
        part = at - below
        paths, far = shown.paths, shown.far
        points = (1 - part) * paths[below] + part * paths[below + 1]
        mix = ((1 - part) * far[below] + part * far[below + 1])[:, None]
        node = self.nodes["samples"]
        node.points = points.astype(np.float16)
        node.colors = np.round(mix * _FAR + (1 - mix) * _NEAR).astype(np.uint8)

    def _draw_levels(self) -> None:
        network = self._network
        if network is None:
            return
        levels, colours, zero = iso_lines(network, (self.low, self.high), self._slice())
        black = np.broadcast_to(_ZERO, zero.shape)
        for name, lines, paint in (("levels", levels, colours), ("zero", zero, black)):
            node = self.nodes[name]
            with self.server.atomic():
                node.points = lines.astype(np.float32)
                node.colors = np.round(paint).astype(np.uint8)

    # --- threads of the viewer ---

    def _hand_over(self, step: int, resolution: int) -> None:
        """A copy of the network for the worker. Called by the training, when the worker is idle."""
        self._network = copy.deepcopy(self._training.network).requires_grad_(False).eval()
        self._job = step, resolution
        self._idle.clear()
        self._wake.set()

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._stop.is_set():
                return
            began = time.monotonic()
            try:
                self._look(*self._job)
            except Exception as error:  # told by the next call of the training
                self._failed = error
            cost = time.monotonic() - began
            self._next = time.monotonic() + cost * (1 / SHARE - 1)
            self._idle.set()

    def _look(self, step: int, resolution: int) -> None:
        network = self._network
        assert network is not None
        paths, far, converged = sample_paths(network, self.cloud, (self.low, self.high))
        self._shown = _Look(step, paths, far, converged)
        self._draw_levels()
        self._place_samples()
        lines = np.stack([paths[:-1], paths[1:]], 2).reshape(-1, 2, 3)
        moved = np.linalg.norm(lines[:, 1] - lines[:, 0], axis=1) > 1e-3
        node = self.nodes["paths"]
        with self.server.atomic():
            node.points = lines[moved].astype(np.float32)
            node.colors = np.full((int(moved.sum()), 2, 3), 110, np.uint8)
        if not self.plane:
            self._draw_surfaces(network, resolution)
        names = list(self.curves.values)
        if names:
            self.plot.data = self.curves.arrays()
        self._status()

    def _draw_surfaces(self, network: nn.Module, resolution: int) -> None:
        """The level set 0 of each output; of two, see-through, as the curve is where they meet."""
        outputs = int(network(self.cloud[:1]).reshape(1, -1).shape[1])
        for k in range(outputs):
            mesh = extract_mesh(
                network if outputs == 1 else _Output(network, k),
                (self.low, self.high),
                resolution=resolution,
            )
            name = f"surface{k}"
            if mesh.empty:
                if name in self.nodes:
                    self.nodes.pop(name).remove()
                continue
            self.nodes[name] = self.server.scene.add_mesh_simple(
                f"/{name}",
                mesh.vertices.astype(np.float32),
                mesh.faces.astype(np.uint32),
                color=_SURFACES[k % len(_SURFACES)],
                opacity=None if outputs == 1 else 0.4,
                side="double",
                visible=bool(self.show["surface"].value),
            )

    def _play(self) -> None:
        """Moves the samples from their starts to the level set, again and again."""
        tick, whole = 0, NEWTON_STEPS * _TICKS
        while not self._stop.wait(_TICK):
            if self._shown is None or not self.moving.value or not self.server.get_clients():
                continue
            tick = (tick + 1) % (whole + 3 * _TICKS)  # and a rest at the end
            self.newton.value = min(tick, whole) / _TICKS
            self._place_samples()


def _check_address(host: str, port: int) -> None:
    """A port in use is none of its business: viser goes on to the next. Of a host that is not this
    machine's viser would try all of them."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            reason = error.strerror or error
            raise InputError(
                f"viewer: expected an address to listen on, got {host}:{port} ({reason})"
            ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """viser tells stdout that it starts and stops; stdout is for results."""
    import rich

    console = rich.get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


@dataclass(frozen=True)
class _Look:
    """What the page shows of one step."""

    step: int
    paths: np.ndarray  # (NEWTON_STEPS + 1, n, 3)
    far: np.ndarray  # (NEWTON_STEPS + 1, n), from 1 (as far as the farthest start) to 0
    converged: float


class _Output(nn.Module):
    """One of the outputs of a network."""

    def __init__(self, network: nn.Module, index: int) -> None:
        super().__init__()
        self.network, self.index = network, index

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, self.index]


def sample_paths(
    network: nn.Module, cloud: Tensor, box: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Samples near the points on their way to the level set 0, one Newton step (Eq. 4) at a time.

    Args:
        network: F, of the points' dimension d (2 or 3) and device.
        cloud: (N, d) points.
        box: lower and upper corner (3,), where the samples are kept.

    Returns:
        Positions (NEWTON_STEPS + 1, PATHS, 3); |F| as a share of its largest at the starts, of the
        same shape without the last axis, from 0 to 1; the share of the samples that arrived.
    """
    d = cloud.shape[1]
    random = torch.Generator().manual_seed(0)  # the same starts every time: only F moves them
    rows = torch.randint(len(cloud), (PATHS,), generator=random).to(cloud.device)
    x = cloud[rows] + NOISE * torch.randn(PATHS, d, generator=random).to(cloud)
    low, high = (torch.from_numpy(corner[:d]).to(cloud) for corner in box)
    x = torch.minimum(torch.maximum(x, low), high)
    paths, far = [x], []
    with torch.no_grad():
        for _ in range(NEWTON_STEPS):
            found = project(
                network, paths[-1], max_iters=1, tol=1e-4, max_step=0.15, box=(low, high)
            )
            paths.append(found.points)
        values = [network(x).reshape(PATHS, -1).abs().amax(1) for x in paths]
    largest = float(values[0].nan_to_num().max()) or 1.0
    far = [(value / largest).nan_to_num(1.0).clamp(0, 1).cpu().numpy() for value in values]
    converged = float((values[-1] <= 1e-4).float().mean())
    return np.stack([_space(x) for x in paths]), np.stack(far), converged


def iso_lines(
    network: nn.Module, box: tuple[np.ndarray, np.ndarray], plane: Slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lines of equal F on a plane across a box.

    Args:
        network: F, of dimension 2 or 3. Of several outputs the lines are those of |F|.
        box: lower and upper corner (3,); the plane z = 0 if both are in it.
        plane: which plane.

    Returns:
        Segments (n, 2, 3) of the levels +-LEVEL_STEP, +-2 LEVEL_STEP, ...; their colours (n, 2, 3)
        from 0 to 255, by the sign of F and paler with |F|; segments (m, 2, 3) of {F = 0}, of every
        output.
    """
    low, high = box
    flat = bool(high[2] == low[2])
    first, second = [axis for axis in range(3) if axis != plane.axis]
    cell = max(high[first] - low[first], high[second] - low[second]) / (GRID - 1)
    u = np.arange(low[first], high[first] + cell, cell)
    v = np.arange(low[second], high[second] + cell, cell)
    grid = np.empty((len(u), len(v), 3))
    grid[..., first], grid[..., second] = u[:, None], v[None, :]
    grid[..., plane.axis] = (1 - plane.place) * low[plane.axis] + plane.place * high[plane.axis]
    parameter = next(network.parameters())
    x = torch.from_numpy(grid.reshape(-1, 3)[:, : 2 if flat else 3]).to(parameter)
    with torch.no_grad():
        values = network(x).reshape(len(u), len(v), -1).double().cpu().numpy()
    origin = grid[0, 0]

    def segments(image: np.ndarray, level: float) -> np.ndarray:
        parts = [np.empty((0, 2, 3))]
        for line in find_contours(image, level):
            places = np.broadcast_to(origin, (len(line), 3)).copy()
            places[:, first] += cell * line[:, 0]
            places[:, second] += cell * line[:, 1]
            parts.append(np.stack([places[:-1], places[1:]], 1))
        return np.concatenate(parts)

    outputs = values.shape[2]
    image = values[..., 0] if outputs == 1 else np.linalg.norm(values, axis=2)
    finite = image[np.isfinite(image)]
    most = min(12, int(np.abs(finite).max() / LEVEL_STEP)) if len(finite) else 0
    lines, colours = [np.empty((0, 2, 3))], [np.empty((0, 2, 3))]
    for k in [k for k in range(-most, most + 1) if k]:
        some = segments(image, k * LEVEL_STEP)
        fade = 0.6 * (abs(k) - 1) / max(most, 1)
        colour = (1 - fade) * (_INSIDE if k < 0 else _OUTSIDE) + fade * 255
        lines.append(some)
        colours.append(np.broadcast_to(colour, some.shape))
    zero = [segments(values[..., k], 0.0) for k in range(outputs)]
    return np.concatenate(lines), np.concatenate(colours), np.concatenate(zero)


def _space(x: Tensor) -> np.ndarray:
    """Points (n, d) of the plane or of space as (n, 3) float64."""
    array = x.detach().cpu().double().numpy()
    return np.concatenate([array, np.zeros((len(array), 3 - array.shape[1]))], 1)
