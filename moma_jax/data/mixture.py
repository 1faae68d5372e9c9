"""Mixture weights: which share of each modality's tokens every store supplies.

A store has one degree of freedom, how much is drawn from it; the ratio of modalities inside it is its documents' own.
So a share of one modality implies the store's shares of all others, and shares and quotas can contradict each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moma_jax.config import Modality, StoreConfig
from moma_jax.errors import InputError

TOLERANCE = 0.02


def resolve_shares(
    stores: Sequence[StoreConfig], token_NM: np.ndarray, modalities: Sequence[Modality], check: bool = True
) -> np.ndarray:
    """Share of each modality's tokens that every store supplies.

    Quotas are taken at their ratio (they may add up to a little more than 1, the slack). A store with a stated share
    gets what its documents' ratio implies for the other modalities; what is left of a modality is split among the
    stores that state none, in proportion to their tokens, the last modality first and text last.

    Args:
      stores: the mixture, N stores.
      token_NM: tokens of each modality in each store.
      modalities: names and quotas.
      check: False accepts contradictions (evaluation on some of the stores).

    Returns:
      share_NM, float64; 0 where a store has no tokens of a modality.

    Raises:
      InputError: shares, quotas and the documents' own ratio contradict each other by more than 2%.
    """
    token_NM = np.asarray(token_NM, np.float64)
    total_N = token_NM.sum(1)
    if check:
        _check_stated(stores, token_NM, modalities)
    quota_M = np.array([m.quota for m in modalities])
    goal_M = quota_M / quota_M.sum()
    # part_N: tokens of a store, as a share of all tokens; NaN while unknown.
    part_N = np.full(len(stores), np.nan)
    for n, store in enumerate(stores):
        estimates = [
            (share * goal_M[m] * total_N[n] / token_NM[n, m], token_NM[n, m])
            for m, modality in enumerate(modalities)
            if (share := store.share.get(modality.name)) is not None and token_NM[n, m]
        ]
        if estimates:
            part_N[n] = max(estimates, key=lambda e: e[1])[0]
    for m in reversed(range(len(modalities))):
        known_N = ~np.isnan(part_N)
        free_N = ~known_N & (token_NM[:, m] > 0)
        if free_N.any():
            left = goal_M[m] - (part_N[known_N] * token_NM[known_N, m] / total_N[known_N]).sum()
            part_N[free_N] = max(left, 0) * total_N[free_N] / token_NM[free_N, m].sum()
    part_NM = np.nan_to_num(part_N)[:, None] * token_NM / np.maximum(total_N, 1)[:, None]
    if check:
        _check_quotas(stores, token_NM, part_NM, modalities)
    return part_NM / np.maximum(part_NM.sum(0), 1e-12)


def _check_stated(stores, token_NM, modalities) -> None:
    """What can be seen without the quotas: a modality nobody has, a share of nothing, shares that miss 1."""
    for m, modality in enumerate(modalities):
        name = modality.name
        if not token_NM[:, m].sum():
            raise InputError(f"data.stores: no store has tokens of {name}; add one that does")
        for n, store in enumerate(stores):
            if store.share.get(name) and not token_NM[n, m]:
                raise InputError(
                    f"data.stores: {store.name} has a share of {store.share[name]:g} of {name} but no such tokens; "
                    f"set it to 0 or leave it out"
                )
        stated = [s.share.get(name) for n, s in enumerate(stores) if token_NM[n, m]]
        if all(share is not None for share in stated) and abs(sum(stated) - 1) > TOLERANCE:
            last = [s for n, s in enumerate(stores) if token_NM[n, m]][-1]
            right = 1 - (sum(stated) - last.share[name])
            remedy = f"set that of {last.name} to {right:.3f}" if right >= 0 else "make them add up to 1"
            raise InputError(f"data.stores: the shares of {name} add up to {sum(stated):.3f}; {remedy}")


def _check_quotas(stores, token_NM, part_NM, modalities) -> None:
    """What the shares make must be what they state, and must fit under the quotas."""
    quota_M = np.array([m.quota for m in modalities])
    goal_M = quota_M / quota_M.sum()
    implied_NM, supplied_M = part_NM / goal_M, part_NM.sum(0) / goal_M
    for n, store in enumerate(stores):
        for m, modality in enumerate(modalities):
            stated = store.share.get(modality.name)
            if stated is not None and abs(stated - implied_NM[n, m]) > TOLERANCE:
                raise InputError(
                    f"data.stores: {store.name} has a share of {stated:g} of {modality.name}, but its documents' own "
                    f"ratio and its other share make that {implied_NM[n, m]:.3f}; set this or leave it out"
                )
    for m, modality in enumerate(modalities):
        stating = [n for n, store in enumerate(stores) if store.share.get(modality.name)]
        if stating and quota_M.sum() <= 1 + TOLERANCE and abs(supplied_M[m] - 1) > TOLERANCE:
            n, rest = stating[-1], supplied_M[m] - stores[stating[-1]].share[modality.name]
            raise InputError(
                f"data.stores: with a share of {stores[n].share[modality.name]:g} of {modality.name} in "
                f"{stores[n].name} all stores supply {supplied_M[m]:.3f} of what the quotas ask; "
                + (f"set it to {1 - rest:.3f}" if rest <= 1 else f"lower the share of other stores by {rest - 1:.3f}")
            )
    mixture_M = part_NM.sum(0) / part_NM.sum()
    if (mixture_M > quota_M * (1 + TOLERANCE)).any():
        fitting = ", ".join(
            f"{m.name} {np.ceil(part * 1000) / 1000:.3f}" for m, part in zip(modalities, mixture_M, strict=True)
        )
        raise InputError(
            f"data.modalities: the quotas {', '.join(f'{m.name} {m.quota:g}' for m in modalities)} contradict the "
            f"documents of {', '.join(s.name for s in stores)}; quotas of {fitting} would fit, or other data.stores"
        )
