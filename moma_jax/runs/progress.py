"""What the terminal shows of a run: a live line with progress and losses, or plain lines where it is no terminal."""

from __future__ import annotations

import datetime
from typing import Any

from moma_jax import hosts
from moma_jax.display import Display


class RunProgress(Display):
    """A sink of the journal that draws; nothing at all where `quiet`, or on other processes than process 0."""

    def __init__(self, total: int, step: int, *, quiet: bool = False):
        """Args: `total` steps of the run, `step` where it stands; without steps there is no bar."""
        super().__init__(not quiet and hosts.is_first())
        self._total = total
        if total:
            self._move(step, "compiling")

    def write(self, record: dict[str, Any]) -> None:
        """Shows a record."""
        step = record["step"]
        match record["kind"]:
            case "train" | "routers" | "codec" if self.live:
                self._move(step, self._rates(record))
            case "train" | "routers" | "codec":
                self.say(f"step {step}/{self._total}  {self._rates(record)}")
            case "eval":
                causal = likelihood(record, record.get("gap_percent"))
                self.say(f"step {step}  {record['eval_set']} ({record['routing']})  {losses(record)}{causal}")
            case "routers_eval":
                self.say(f"step {step}  {record['eval_set']}  {predictions(record)}")
            case "codec_eval":
                self.say(f"step {step}  {record['eval_set']}  {quality(record)}")
            case "checkpoint":
                pass  # it needs no line
            case _:
                self.say(f"step {step}  {record['event']}")

    def seal(self, step: int) -> None:
        """Nothing to do: a checkpoint needs no line."""

    def _move(self, step: int, text: str) -> None:
        self.update(step, self._total, f"step {step}/{self._total}", text)

    def _rates(self, record: dict[str, Any]) -> str:
        left = datetime.timedelta(seconds=round((self._total - record["step"]) * record["step_seconds"]))
        mfu = "" if record.get("mfu") is None else f"  MFU {record['mfu']:.1%}"
        said = {"routers": predictions, "codec": quality}.get(record["kind"], losses)(record)
        counted = "pictures" if record["kind"] == "codec" else "tokens"
        speed = record[f"{counted}_per_second"]
        shares = f"  ({time_shares(record, least=0.05)})" if self.live else ""
        return f"{said}  {speed:,.{1 if speed < 10 else 0}f} {counted}/s{mfu}  {left} left{shares}"


def time_spent(record: dict[str, Any]) -> dict[str, float]:
    """Seconds of a record's run so far by what they were spent on; what is left are steps."""
    spent = {name.removeprefix("spent_"): value for name, value in record.items() if name.startswith("spent_")}
    return {"steps": max(record["wall_seconds"] - sum(spent.values()), 0.0), **spent}


def time_shares(record: dict[str, Any], least: float = 0.005) -> str:
    """`time: steps 81%, evaluation 12%, compile 7%` of a record, where time went since the run began.

    Args: `least`: smaller shares are left out.
    """
    wall = max(record["wall_seconds"], 1e-9)
    shown = sorted(((seconds / wall, name) for name, seconds in time_spent(record).items()), reverse=True)
    return "time: " + ", ".join(f"{name} {share:.0%}" for share, name in shown if share >= least)


def losses(record: dict[str, Any], conditions: bool = False) -> str:
    """`loss 4.123  text 5.001  image 3.456` of a record or of a dictionary of losses.

    Args:
      conditions: also the losses under conditions (`evaluation/conditions.py`) that there are.
    """
    parts = []
    for name, value in record.items():
        under_condition = "_given_" in name or name == "loss_interleaved"
        if (name == "loss" or name.startswith("loss_")) and not under_condition:
            parts.append(f"{name.removeprefix('loss_')} {'-' if value is None else f'{value:.4f}'}")
        elif conditions and name.startswith("loss_") and value is not None:
            parts.append(f"{name.removeprefix('loss_').replace('_', ' ')} {value:.4f}")
    return "  ".join(parts)


def predictions(record: dict[str, Any]) -> str:
    """`loss 0.1234  text precision 91.2% recall 90.1%` of a record of auxiliary routers; single layers are left out."""
    parts = [losses({"loss": record["loss"]})]
    for name in record:
        modality = name.removeprefix("precision_")
        if modality != name and "_layer_" not in modality:
            both = [record[f"{kind}_{modality}"] for kind in ("precision", "recall")]
            shown = ["-" if value is None else f"{value:.1%}" for value in both]
            parts.append(f"{modality} precision {shown[0]} recall {shown[1]}")
    return "  ".join(parts)


def quality(record: dict[str, Any]) -> str:
    """`loss 0.0432  PSNR 23.4 dB  SSIM 0.812  use 93.1%` of a record of an image tokenizer."""
    shown = (("reconstruction", "loss {:.4f}"), ("psnr", "PSNR {:.2f} dB"), ("ssim", "SSIM {:.3f}"))
    parts = [form.format(record[name]) for name, form in shown if record.get(name) is not None]
    if record.get("codebook_use") is not None:  # of an interval whose every update was skipped
        parts.append(f"use {record['codebook_use']:.1%}")
    return "  ".join(parts)


def likelihood(record: dict[str, Any], gap: float | None) -> str:
    """What only figures of a causal routing have: perplexity, and how far the loss lies from that under choice."""
    perplexity = record.get("perplexity")
    text = "" if perplexity is None else f"  perplexity {perplexity:.3f}"
    return text if gap is None else f"{text}  gap {gap:+.2f}%"
