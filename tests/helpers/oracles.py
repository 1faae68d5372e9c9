"""Slow, obvious NumPy references: loops over groups, modalities, experts, tokens; float64."""

import math
from fractions import Fraction

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mix(bits: int) -> int:
    """The finaliser of MurmurHash3."""
    bits = ((bits ^ bits >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ bits >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ bits >> 16


def jitter(seed: int, row: int, position: int, expert: int) -> float:
    """The tie-breaking term of `routing.score_of`, in Python integers: 0 to 1."""
    place = mix((mix(int(row) + 1) + int(position)) & 0xFFFFFFFF)
    return (mix(place ^ mix((seed + expert * 0x9E3779B9) & 0xFFFFFFFF)) >> 8) / 2**24


def chosen(rank_T, eligible_T, capacity: Fraction) -> list[int]:
    """Tokens that one expert takes: the k best eligible ones, equal ranks to the lower token."""
    tokens = [t for t in range(len(rank_T)) if eligible_T[t]]
    return sorted(tokens, key=lambda t: (-rank_T[t], t))[: math.ceil(len(tokens) * capacity)]


def moma_ffn(x_GTD, modality_GT, groups, weights, *, capacity=None, rank_jitter=None, dy_GTD=None):
    """Paper Eq. 1, and its gradient by hand.

    Args:
      modality_GT: -1 on padding. groups: (name, modalities, experts) each; one expert has no router and gate 1, so a
        shared expert of some modalities is a group of one.
      weights: by group name, and "shared", which every token passes: dictionaries gate_EDF, up_EDF, down_EFD,
        router_DE.
      capacity: share that an expert takes; 1/experts if None. rank_jitter: (group, token, expert) -> float.
      dy_GTD: gradient of the output; None for no gradient.

    Returns:
      (y_GTD, taken: {(group name, g, expert): tokens}, gradient: {"x": ..., group name: {...}}).
    """
    x_GTD = np.asarray(x_GTD, np.float64)
    weights = {n: {k: np.asarray(v, np.float64) for k, v in w.items()} for n, w in weights.items()}
    y_GTD, taken = np.zeros_like(x_GTD), {}
    gradient = {"x": np.zeros_like(x_GTD)} | {
        n: {k: np.zeros_like(v) for k, v in w.items()} for n, w in weights.items()
    }
    for g in range(x_GTD.shape[0]):
        for name, modalities, experts in groups:
            w, eligible_T = weights[name], [m in modalities for m in modality_GT[g]]
            for e in range(experts):
                tokens = [t for t in range(len(eligible_T)) if eligible_T[t]]
                if experts > 1:
                    rank_T = x_GTD[g] @ w["router_DE"][:, e]
                    if rank_jitter:
                        rank_T = rank_T + [rank_jitter(g, t, e) for t in range(len(rank_T))]
                    share = Fraction(1, experts) if capacity is None else Fraction(capacity).limit_denominator(10000)
                    tokens = chosen(rank_T, eligible_T, share)
                taken[name, g, e] = tokens
                for t in tokens:
                    _one_token(x_GTD, y_GTD, dy_GTD, g, t, e, w, gradient, gradient[name], routed=experts > 1)
        if "shared" in weights:
            for t in range(x_GTD.shape[1]):
                _one_token(x_GTD, y_GTD, dy_GTD, g, t, 0, weights["shared"], gradient, gradient["shared"], routed=False)
    return y_GTD, taken, gradient


def _one_token(x_GTD, y_GTD, dy_GTD, g, t, e, w, gradient, dw, routed):
    """Adds gate * SwiGLU_e(x) to y, and the gradients that follow from dy."""
    x = x_GTD[g, t]
    gate = sigmoid(x @ w["router_DE"][:, e]) if routed else 1.0
    a, b = x @ w["gate_EDF"][e], x @ w["up_EDF"][e]
    s = sigmoid(a)
    out = (s * a * b) @ w["down_EFD"][e]
    y_GTD[g, t] += gate * out
    if dy_GTD is None:
        return
    dy = np.asarray(dy_GTD[g, t], np.float64)
    dh = w["down_EFD"][e] @ (gate * dy)
    da, db = dh * b * (s + a * s * (1 - s)), dh * s * a
    dw["down_EFD"][e] += np.outer(s * a * b, gate * dy)
    dw["gate_EDF"][e] += np.outer(x, da)
    dw["up_EDF"][e] += np.outer(x, db)
    gradient["x"][g, t] += w["gate_EDF"][e] @ da + w["up_EDF"][e] @ db
    if routed:
        dlogit = (dy @ out) * gate * (1 - gate)
        dw["router_DE"][:, e] += x * dlogit
        gradient["x"][g, t] += w["router_DE"][:, e] * dlogit


def rotary(x_K, position, theta, scaling=None):
    """One head's vector turned by its position; channel k pairs with k + K/2.

    scaling: factor, low, high, positions (Llama 3.1), by the length of a channel's wave.
    """
    half, out = len(x_K) // 2, np.zeros(len(x_K))
    for k in range(half):
        frequency = theta ** (-2 * k / len(x_K))
        if scaling is not None:
            wave, slow = 2 * np.pi / frequency, frequency / scaling.factor
            if wave > scaling.positions / scaling.low:
                frequency = slow
            elif wave > scaling.positions / scaling.high:
                share = (scaling.positions / wave - scaling.low) / (scaling.high - scaling.low)
                frequency = (1 - share) * slow + share * frequency
        angle = position * frequency
        out[k] = x_K[k] * np.cos(angle) - x_K[k + half] * np.sin(angle)
        out[k + half] = x_K[k + half] * np.cos(angle) + x_K[k] * np.sin(angle)
    return out


def attention(x_SD, segment_S, position_S, weights, **settings):
    """One row through the attention sub-layer: QK-norm, rotary positions, earlier tokens of the same document.

    weights: query_DHK, key_DHK, value_DHK, out_HKD, and query_norm, key_norm: {scale_HK, bias_HK}, {scale_K} or
    nothing.
    """
    return attention_by_modality(x_SD, segment_S, position_S, ["all"] * len(x_SD), {"all": weights}, **settings)


def attention_by_modality(x_SD, segment_S, position_S, name_S, weights, *, theta=10000.0, epsilon=1e-5, scaling=None):
    """`attention` where each token is projected, in and out, by its own modality's weights: `weights` by the names that
    `name_S` has of the tokens."""
    x_SD, y_SD = np.asarray(x_SD, np.float64), np.zeros(np.shape(x_SD))
    _, heads, width = np.shape(weights[name_S[0]]["query_DHK"])
    share = heads // np.shape(weights[name_S[0]]["key_DHK"])[1]  # heads of queries for one of keys

    def projected(s, h, which):
        own = weights[name_S[s]]
        v, norm = x_SD[s] @ np.asarray(own[f"{which}_DHK"], np.float64)[:, h], own.get(f"{which}_norm", {})
        if "scale_HK" in norm:
            v = (v - v.mean()) / np.sqrt(v.var() + epsilon) * norm["scale_HK"][h] + norm["bias_HK"][h]
        elif norm:
            v = v / np.sqrt((v**2).mean() + epsilon) * norm["scale_K"]
        return rotary(v, position_S[s], theta, scaling)

    for h in range(heads):
        of = {"query": h, "key": h // share}
        q, k = ([projected(s, head, which) for s in range(len(x_SD))] for which, head in of.items())
        for s in range(len(x_SD)):
            seen = [r for r in range(s + 1) if segment_S[r] == segment_S[s]]
            score = np.array([q[s] @ k[r] / np.sqrt(width) for r in seen])
            weight = np.exp(score - score.max())
            values = np.array([x_SD[r] @ weights[name_S[r]]["value_DHK"][:, h // share] for r in seen])
            y_SD[s] += (weight / weight.sum()) @ values @ weights[name_S[s]]["out_HKD"][h]
    return y_SD


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def layer(rows, weights, groups, *, norm, group_rows, rank_jitter):
    """Rows through one Chameleon layer.

    Args:
      rows: for each row (x_SD, segment_S, position_S, modality_S, place_S: where in the row each token was at first).
      weights: attention, ffn and the two norms. rank_jitter: (row, place, expert) -> float.

    Returns:
      x_SD of each row.
    """

    def attention(xs):
        return [oracle_row(x, row, weights["attention"]) for x, row in zip(xs, rows, strict=True)]

    def ffn(xs):
        out = []
        for start in range(0, len(rows), group_rows):
            mine = range(start, start + group_rows)
            address = [(r, place) for r in mine for place in rows[r][4]]
            y_1TD, _, _ = moma_ffn(
                np.concatenate([xs[r] for r in mine])[None],
                np.concatenate([rows[r][3] for r in mine])[None],
                groups,
                weights["ffn"],
                rank_jitter=lambda _, t, e, address=address: rank_jitter(*address[t], e),
            )
            out += np.split(y_1TD[0], np.cumsum([len(xs[r]) for r in mine])[:-1])
        return out

    xs = [np.asarray(row[0], np.float64) for row in rows]
    for body, scale in ((attention, weights["attention_norm"]["scale_D"]), (ffn, weights["ffn_norm"]["scale_D"])):
        ys = body([rms_norm(x, scale) for x in xs] if norm == "pre" else xs)
        xs = [x + (y if norm == "pre" else rms_norm(y, scale)) for x, y in zip(xs, ys, strict=True)]
    return xs


def oracle_row(x_SD, row, weights):
    return attention(x_SD, row[1], row[2], weights) if len(x_SD) else x_SD


def skipping_layer(rows, weights, routers, groups, *, share, depth_jitter, over=1, most=10**9, **of_layer):
    """A layer that some tokens enter (paper section 2.3): x + gate * (layer(x) - x) for them, x for the others.

    Args:
      routers: (router_D, modalities) each; one lets floor(share * count) of its modalities' tokens of `over` rows in,
        and the first `most` that it lets into a row enter.
      depth_jitter: (row, place) -> float. of_layer: of `layer`. Others as there.

    Returns:
      (x_SD of each row, the tokens of each row that entered).
    """
    gate_of = [{} for _ in rows]
    for router_D, modalities in routers:
        logits = [np.asarray(row[0], np.float64) @ np.asarray(router_D, np.float64) for row in rows]
        for first in range(0, len(rows), over):
            unit = range(first, min(first + over, len(rows)))
            tokens = [(r, s) for r in unit for s in range(len(logits[r])) if rows[r][3][s] in modalities]
            rank = {(r, s): logits[r][s] + depth_jitter(r, rows[r][4][s]) for r, s in tokens}
            tokens.sort(key=lambda token: (-rank[token], token))
            for r, s in tokens[: math.floor(share * len(tokens))]:
                gate_of[r][s] = sigmoid(logits[r][s])
    entered = [sorted(own)[:most] for own in gate_of]
    gates = [[own[s] for s in chosen] for own, chosen in zip(gate_of, entered, strict=True)]
    inner = [tuple(np.asarray(part)[own] for part in row) for row, own in zip(rows, entered, strict=True)]
    xs = [np.array(row[0], np.float64) for row in rows]
    for x, own, gate, y in zip(xs, entered, gates, layer(inner, weights, groups, **of_layer), strict=True):
        x[own] += np.asarray(gate)[:, None] * (y - x[own])
    return xs, entered
