"""`lampq calibrate` over several processes, which share the images:

torchrun --nproc-per-node 2 -m lampq_rt.calibrate MODEL --weights FILE --images DIR --mean-bits 4 --out X.plan

The same options and the same plan as `lampq calibrate`. Each process reads and runs only its own images; the first one
speaks and writes. gloo on a CPU, NCCL with `--device cuda` (one GPU a process). With one process it is that command.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import typer

from lampq_rt.calibrate import distributed
from lampq_rt.cli_common import CommandGroup, quiet
from lampq_rt.cli_make import calibrate


class _OneVoice(CommandGroup):
    """What a user did wrong is said by the first process alone; all end with status 2."""

    def refuse(self, text: str) -> NoReturn:
        """Say what is wrong, or leave that to the first."""
        if distributed.current().first:
            super().refuse(text)
        raise typer.Exit(2)


main = typer.Typer(cls=_OneVoice, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
main.command()(calibrate)


@main.callback()
def _calibrate() -> None:
    quiet()


def run(arguments: list[str]) -> None:
    """The command in this process, in the group that torchrun's environment describes, if there is one."""
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together:
        asked = " ".join(arguments).replace("--device=", "--device ")
        on_gpu = "--device cuda" in asked and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Patient: where only one process has work (a last option to compensate, a training), the others wait for it.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=24))
    try:
        main(["calibrate", *arguments], prog_name="python -m lampq_rt.calibrate")
    finally:
        if together:
            dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1:])
