"""What the terminal shows of a run: a live line with progress and losses, or plain lines where it is no terminal."""

from __future__ import annotations

import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class View:
    """A sink of the journal that draws; nothing at all where `quiet`."""

    def __init__(self, total: int, step: int, *, quiet: bool = False, console: Console | None = None):
        """Args: `total` steps of the run, `step` where it stands."""
        self._total, self._quiet = total, quiet
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._progress = self._task = None
        if self._console.is_terminal and not quiet:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=24), TimeElapsedColumn())
            self._progress = Progress(*columns, TextColumn("{task.description}"), console=self._console)
            self._task = self._progress.add_task("compiling", total=total, completed=step)
            self._progress.start()

    def write(self, record: dict[str, Any]) -> None:
        """Shows a record."""
        match record["kind"]:
            case "train" if self._progress is not None:
                self._progress.update(self._task, completed=record["step"], description=self._rates(record))
            case "train":
                self.say(f"step {record['step']}/{self._total}  {self._rates(record)}")
            case "eval":
                self.say(f"step {record['step']}  {record['eval_set']} ({record['routing']})  {losses(record)}")
            case _:
                self.say(f"step {record['step']}  {record['event']}")

    def say(self, line: str) -> None:
        """Prints a line above the progress."""
        if not self._quiet:
            self._console.print(line, markup=False)

    def seal(self, step: int) -> None:
        """Nothing to do: a checkpoint needs no line."""

    def close(self) -> None:
        """Gives the terminal back."""
        if self._progress is not None:
            self._progress.stop()

    def _rates(self, record: dict[str, Any]) -> str:
        left = datetime.timedelta(seconds=round((self._total - record["step"]) * record["step_seconds"]))
        mfu = "" if record["mfu"] is None else f"  MFU {record['mfu']:.1%}"
        return f"{losses(record)}  {record['tokens_per_second']:,.0f} tokens/s{mfu}  {left} left"


def losses(record: dict[str, Any]) -> str:
    """`loss 4.123  text 5.001  image 3.456` of a record or of a dictionary of losses."""
    parts = []
    for name, value in record.items():
        if name == "loss" or name.startswith("loss_"):
            parts.append(f"{name.removeprefix('loss_')} {'-' if value is None else f'{value:.4f}'}")
    return "  ".join(parts)
