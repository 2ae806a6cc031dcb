"""What the commands share: options, the two consoles, JSON beside the tables, and errors as one line.

torch and timm are imported inside the commands, so that help and a mistyped option answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from lampq_rt import files
from lampq_rt.errors import BackendError, DataError, LampqError

if TYPE_CHECKING:
    from torch import Tensor, nn

STDOUT = "-"
THREADS_PER_CORE = 4
T = TypeVar("T")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="timm name, for example deit_tiny_patch16_224.")]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Weights as safetensors; timm's pretrained ones by default."),
]
Images = Annotated[
    Path, typer.Option("--images", metavar="DIR", help="JPEG, PNG or WebP files, flat or one folder per class.")
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", metavar="CSV", help="Columns file (relative to the image folder) and label (from 0)."),
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.", min=0, max=2**31 - 1)]
Target = Annotated[str, typer.Option("--target", help="Whose formats may be used: any, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; by default PyTorch's own number.", min=1)]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the same facts as JSON; - is standard output, without tables."),
]


UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What the command line parser raises for any mistake; of this family typer gives out BadParameter alone."""


class CommandGroup(TyperGroup):
    """Turns a user's mistake into one line on standard error and exit status 2; our own keep their traceback."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the options that stand before the command."""
        try:
            return super().make_context(*arguments, **options)
        except UsageError as error:
            self.refuse(_with_help(error, "lampq"))

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            self.refuse(_with_help(error, ctx.command_path))
        except (LampqError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            self.refuse(str(error))

    def refuse(self, text: str) -> NoReturn:
        """Say what is wrong, in one line, and end."""
        typer.echo(f"error: {' '.join(text.split())}", err=True)
        raise typer.Exit(2)


def _with_help(error: Any, command: str) -> str:
    """What the parser says, and which command explains what is allowed."""
    asked = command if error.ctx is None else error.ctx.command_path
    return f"{error.format_message().rstrip('.')}; what is allowed: {asked} --help"


class Output:
    """Where a command's findings go: tables to standard output, JSON to a file; with `--json -`, only JSON.

    Args:
        json_target: value of `--json`. A file that cannot be written is refused here, before the work.
        silent: True for a process that leaves the speaking to another.

    Raises:
        DataError: the JSON could not be written there.
    """

    def __init__(self, json_target: str | None, *, silent: bool = False) -> None:
        self.json_target = None if silent else json_target
        self.people = Console(stderr=json_target == STDOUT, highlight=False, quiet=silent)
        self.aside = Console(stderr=True, highlight=False, quiet=silent)
        if json_target not in (None, STDOUT):
            check_destination(Path(json_target), "JSON")

    def show(self, *parts: RenderableType) -> None:
        """Print for people; nothing where standard output belongs to JSON."""
        if self.json_target != STDOUT:
            for part in parts:
                self.people.print(part)

    def note(self, text: str) -> None:
        """A remark on standard error."""
        self.aside.print(f"note: {text}", markup=False, soft_wrap=True)

    def facts(self, facts: Any) -> None:
        """Write the facts as JSON where they were asked for.

        Raises:
            DataError: the file could not be written.
        """
        if self.json_target is None:
            return
        text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if self.json_target == STDOUT:
            typer.echo(text, nl=False)
        else:
            files.write_file(self.json_target, text.encode(), what="JSON", error=DataError)

    @contextmanager
    def working(self, text: str) -> Iterator[Any]:
        """A spinner on standard error while something takes its time; call it to change the text."""
        with self.aside.status(text) as status:
            yield status.update

    def track(self, batches: Iterable[Tensor], images: int, text: str) -> Iterator[Tensor]:
        """A progress bar on standard error that counts images."""
        return self._counted(batches, images, text, len)

    def steps(self, steps: Iterable[T], count: int, text: str) -> Iterator[T]:
        """A progress bar on standard error that counts steps."""
        return self._counted(steps, count, text, lambda step: 1)

    def _counted(self, items: Iterable[T], total: int, text: str, size: Callable[[Any], int]) -> Iterator[T]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.aside, transient=True) as bar:
            task = bar.add_task(text, total=total)
            for item in items:
                yield item
                bar.advance(task, size(item))


def check_destination(path: Path, what: str, names: Collection[str] | None = None) -> None:
    """Refuse a file that cannot be written, before the work that fills it: it may be of minutes, and would be lost.

    Args:
        path: where it will be written.
        what: what will be, for the message.
        names: of the files in it where a folder is written; other content is refused.

    Raises:
        DataError: names the place and the obstacle.
    """
    files.check_place(path, what=what, error=DataError, names=names)


def check_target(target: str) -> None:
    """Refuse a set of number formats that does not exist, before images are read.

    Raises:
        BackendError: names those that there are.
    """
    from lampq_rt.backends import TARGETS

    if target not in TARGETS:
        raise BackendError(f"unknown target {target!r}; allowed: {', '.join(TARGETS)}")


def true_classes(
    labels: Path | None, folder: Path, files: Sequence[Path], chosen: Sequence[Path], network: nn.Module
) -> Tensor | None:
    """int64 [images]: the classes of the chosen ones of a folder's files; None where no labels are given.

    Raises:
        DataError: see `images.read_labels`.
    """
    import torch

    from lampq_rt.images import read_labels
    from lampq_rt.models import classes

    if labels is None:
        return None
    table = read_labels(labels, folder, files, classes(network))
    return torch.tensor([table[path] for path in chosen])


def use_threads(threads: int | None) -> None:
    """Let PyTorch compute with so many threads; None leaves it as it is.

    Raises:
        BackendError: far more than the machine has cores: nothing would be measured but their waiting for each other,
            and where the system has no more threads to give, the process would end without a word.
    """
    import torch

    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if threads is not None:
        if threads > most:
            raise BackendError(
                f"--threads {threads}: this machine has {plural(os.cpu_count() or 1, 'core')}; allowed: 1 to {most}"
            )
        torch.set_num_threads(threads)


def numbers(text: str, option: str) -> list[int]:
    """ "1,8,64" as positive integers.

    Raises:
        DataError: anything else.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise DataError(f"{option} {text!r}: positive integers with commas between them are needed, like 1,8")
    return found


def names(text: str) -> list[str]:
    """ "eager,bf16" as a list; empty parts are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def quiet() -> None:
    """Silence remarks of libraries that a user can do nothing about."""
    warnings.filterwarnings("ignore", message="Image size")  # Pillow's, where `images` refuses the file by name
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"


def percent(value: float | None) -> str:
    """ "79.40", or a dash."""
    return "–" if value is None else f"{value:.2f}"


def same_model(plan_model: str, model: str, what: Path) -> None:
    """Refuse a plan or checkpoint of another architecture than the one named.

    Raises:
        DataError: names both.
    """
    import timm

    made_for = plan_model.partition(".")[0]
    if timm.is_model(made_for) and made_for != model.partition(".")[0]:
        raise DataError(f"{what} was made for {plan_model}, not for {model}")


def plural(count: int, thing: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count} {thing}" + ("" if count == 1 else "s")
