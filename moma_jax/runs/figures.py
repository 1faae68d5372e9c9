"""What the numbers of a record are called where curves are drawn."""

from __future__ import annotations

from typing import Any


def figures_of(record: dict[str, Any]) -> dict[str, int | float]:
    """The numbers of a record by kind/name, and kind/eval_set/routing/name."""
    places = (record["kind"], record.get("eval_set"), record.get("routing"))
    prefix = "/".join(place for place in places if place)
    numbers = ((name, value) for name, value in record.items() if isinstance(value, (int, float)))
    return {f"{prefix}/{name}": value for name, value in numbers if name not in ("schema", "step", "time")}
