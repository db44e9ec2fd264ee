"""Who watches a training: sinks that are shown its steps and change nothing about it.

A training tells :class:`Observers` after every step; each sink says whether it wants to look, and
the figures are worked out only if one does. What a sink keeps, draws or sends is its own affair:
randomness, parameters and order of a training are the same with and without it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from levelset_ext.errors import InputError
from levelset_ext.recipes.progress import Progress
from levelset_ext.recipes.progress import say as say_to_person
from levelset_ext.recipes.ranks import rank_of_launch

__all__ = [
    "Moment",
    "Observer",
    "Observers",
    "ProgressLine",
    "Run",
    "add_observer_options",
    "chosen_observers",
]


@dataclass(frozen=True)
class Run:
    """What is about to be watched.

    training: the training itself, to be read only: an observer may evaluate a copy of its network
    with randomness of its own, and may change nothing.
    """

    out: Path
    steps: int  # of the whole run
    first: int  # done before, by the run that this one goes on with
    settings: Mapping[str, Any]
    training: Any
    rate: tuple[float, str] | None = None  # what a step sees: (2560, "points")


@dataclass(frozen=True)
class Moment:
    """A training after one of its steps."""

    step: int
    figures: Mapping[str, float]
    note: str = ""  # the figures for a person
    last: bool = False
    saved: bool = False  # a checkpoint of this step has been written


class Observer:
    """One sink. Every method may be left as it is.

    ``vital`` says what an exception in it means: True ends the training; False takes the sink out,
    with a line that says so.
    """

    vital = False

    def begin(self, run: Run) -> None:
        """Before the first step."""

    def due(self, step: int, *, last: bool, saved: bool) -> bool:
        """Whether it wants to see this step. Called after every one, so it has to be cheap."""
        return False

    def see(self, moment: Moment) -> None:
        """A step that it wanted to see."""

    def done(self, pictures: Mapping[str, Path], metrics: Mapping[str, Any]) -> None:
        """After the last step, when the results are there; metrics.json is written after it."""

    def close(self) -> None:
        """The end, also that of a training that failed."""


@dataclass
class Observers(Sequence[Observer]):
    """Sinks that are told all at once, and closed at the end of a ``with`` block."""

    sinks: list[Observer] = field(default_factory=list)
    say: Callable[[str], None] = say_to_person

    def __len__(self) -> int:
        return len(self.sinks)

    def __getitem__(self, index: Any) -> Any:
        return self.sinks[index]

    def begin(self, run: Run) -> None:
        self._tell(list(self.sinks), lambda sink: sink.begin(run))

    def after_step(
        self,
        step: int,
        look: Callable[[], tuple[Mapping[str, float], str]],
        *,
        last: bool = False,
        saved: bool = False,
    ) -> None:
        """``look`` gives the figures and the note of the step; called if a sink wants them."""
        due: list[Observer] = []

        def ask(sink: Observer) -> None:
            if sink.due(step, last=last, saved=saved):
                due.append(sink)

        self._tell(list(self.sinks), ask)
        if due:
            moment = Moment(step, *look(), last=last, saved=saved)
            self._tell(due, lambda sink: sink.see(moment))

    def done(self, pictures: Mapping[str, Path], metrics: Mapping[str, Any]) -> None:
        self._tell(list(self.sinks), lambda sink: sink.done(pictures, metrics))

    def close(self) -> None:
        self._tell(list(self.sinks), lambda sink: sink.close())
        self.sinks.clear()

    def __enter__(self) -> Observers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tell(self, sinks: Iterable[Observer], tell: Callable[[Observer], None]) -> None:
        for sink in sinks:
            try:
                tell(sink)
            except InputError:
                raise  # an option that cannot be served: the person has to choose another
            except Exception as error:
                if sink.vital:
                    raise
                self.say(f"{type(sink).__name__}: switched off ({type(error).__name__}: {error})")
                self.sinks.remove(sink)
                with contextlib.suppress(Exception):  # what it holds, a port or a file, goes
                    sink.close()


class ProgressLine(Observer):
    """A line on stderr: done, speed, time left, memory, figures."""

    vital = True

    def begin(self, run: Run) -> None:
        self.progress = Progress("step", run.steps, run.first, rate=run.rate)

    def due(self, step: int, *, last: bool, saved: bool) -> bool:
        return last or self.progress.due()

    def see(self, moment: Moment) -> None:
        self.progress.report(moment.step, moment.note, moment.last)


# --- the command line -----------------------------------------------------------------------


def add_observer_options(command: argparse.ArgumentParser, *, viewer: bool) -> None:
    """Adds ``--log`` and, where there is something to see in space, ``--viewer``."""
    watch = command.add_argument_group("watching", "changes nothing about the result")
    watch.add_argument(
        "--log",
        choices=("tensorboard",),
        help="write DIR/tensorboard: curves, settings, the picture",
    )
    if viewer:
        watch.add_argument(
            "--viewer",
            nargs="?",
            const="8080",
            metavar="[HOST:]PORT",
            help="watch in a browser, on 127.0.0.1:8080 if nothing else is said",
        )


def chosen_observers(args: argparse.Namespace) -> Observers:
    """The sinks that the options ask for; none but on the first of the processes of ``torchrun``.

    Raises:
        InputError: a package that is not there, named with the extra that brings it; an address
            that is none.
    """
    chosen: list[Observer] = []
    if rank_of_launch() > 0:
        return Observers(chosen)
    if args.log == "tensorboard":
        from levelset_ext.recipes.tensorboard import TensorBoard

        chosen.append(TensorBoard())
    if getattr(args, "viewer", None) is not None:
        host, _, port = args.viewer.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            raise InputError(
                f"viewer: expected PORT or HOST:PORT, got {args.viewer!r} (write --viewer=8080 "
                "where an argument follows)"
            )
        from levelset_ext.recipes.viewer import Viewer

        chosen.append(Viewer(host or "127.0.0.1", int(port)))
    return Observers(chosen)
