"""The routing rules whose tokens choose, in slow NumPy: loops over tokens and experts, float64, nothing of the package.

Each function answers for one token: ({expert: gate}, weight of the token's own input), from its logits and what the
rule's state and options say.
"""

import math

import numpy as np
from oracles import mix, sigmoid


def softmax(logit_E):
    shifted = [math.exp(x - max(logit_E)) for x in logit_E]
    return [x / sum(shifted) for x in shifted]


def best(value_E, count):
    """Numbers of the highest values, equal ones in order."""
    return sorted(range(len(value_E)), key=lambda e: (-value_E[e], e))[:count]


def affinities(rule, logit_E):
    return softmax(logit_E) if rule.gates == "softmax" else [sigmoid(x) for x in logit_E]


def token_choice(rule, logit_E, state, token, experts):
    affinity_E = affinities(rule, logit_E)
    bias_E = [0.0] * experts
    if rule.bias_rate:  # towards the mean by the load of the update before
        load_E = [taken / max(state["eligible"], 1) for taken in state["taken_E"]]
        mean = sum(load_E) / experts
        steps = [np.sign(load - mean) for load in load_E]
        bias_E = [float(b) - rule.bias_rate * step for b, step in zip(state["bias_E"], steps, strict=True)]
    chosen = best([a + b for a, b in zip(affinity_E, bias_E, strict=True)], rule.top)
    total = sum(affinity_E[e] for e in chosen) if rule.normalise and rule.top > 1 else 1.0
    return {e: affinity_E[e] / total for e in chosen}, 0.0


def top_p(rule, logit_E, state, token, experts):
    chance_E, share, chosen, sum_so_far = softmax(logit_E), float(state["share"]), {}, 0.0
    if state["eligible"] > 0:
        mean = sum(float(taken) for taken in state["taken_E"]) / float(state["eligible"])
        share = min(max(share - rule.rate * (mean - rule.mean), 0.01), 0.99)
    for e in best(chance_E, experts):
        if sum_so_far < share:
            chosen[e] = chance_E[e]
        sum_so_far += chance_E[e]
    return chosen, 0.0


def remoe(rule, logit_E, state, token, experts):
    return {e: x for e, x in enumerate(logit_E) if x > 0}, 0.0


def null(rule, logit_E, state, token, experts):
    chance_X = softmax(logit_E)
    chosen = best(chance_X, rule.top)
    copies = range(experts + rule.zero, experts + rule.zero + rule.copy)
    return {e: chance_X[e] for e in chosen if e < experts}, sum(chance_X[e] for e in chosen if e in copies)


def by_hash(rule, logit_E, state, token, experts):
    first = (mix(mix(token["id"]) ^ rule.seed)) % experts
    return {(first + k) % experts: 1 / rule.top for k in range(rule.top)}, 0.0


def at_random(rule, logit_E, state, token, experts):
    """As at inference."""
    place = mix((mix(token["id"] + 1) + token["position"]) & 0xFFFFFFFF)
    draws = [mix((place + e) & 0xFFFFFFFF) >> 8 for e in range(experts)]
    return dict.fromkeys(best(draws, rule.top), 1 / rule.top), 0.0


def sinkhorn(rule, logit_E, state, token, experts):
    """At the prices that `sinkhorn_prices` found for the routing group."""
    ranked = [x - price for x, price in zip(logit_E, token["prices"], strict=True)]
    return {e: sigmoid(logit_E[e]) for e in best(ranked, rule.top)}, 0.0


def sinkhorn_prices(rule, logits, experts):
    price_E = [0.0] * experts
    for _ in range(rule.iterations if len(logits) >= experts else 0):
        shares = [softmax([x - p for x, p in zip(row, price_E, strict=True)]) for row in logits]
        price_E = [p + math.log(max(sum(row[e] for row in shares), 1e-9)) for e, p in enumerate(price_E)]
    return price_E


ORACLES = {
    "token_choice": token_choice, "top_p": top_p, "remoe": remoe, "null": null, "hash": by_hash, "random": at_random,
    "sinkhorn": sinkhorn,
}  # fmt: skip


def losses(name, rule, logits, choices, state, experts):
    """The rule's losses of one routing group's eligible tokens: their logits, and what they chose before any drop."""
    count = max(len(logits), 1)
    if name in ("hash", "random", "sinkhorn"):
        return {}
    if name == "remoe":
        weight = math.exp(float(state["log_weight"]))
        if state["eligible"] > 0:
            mean = sum(float(taken) for taken in state["taken_E"]) / float(state["eligible"])
            weight *= rule.factor ** np.sign(mean - rule.mean)
        load_E = [sum(e in chosen for chosen in choices) * experts / (rule.mean * count) for e in range(experts)]
        gate_E = [sum(chosen.get(e, 0.0) for chosen in choices) / count for e in range(experts)]
        return {"l1": weight * sum(load * gate for load, gate in zip(load_E, gate_E, strict=True))}
    if name == "token_choice":
        chances = [affinities(rule, x) for x in logits]
        chances = [[a / sum(row) for a in row] for row in chances]
    else:
        chances = [softmax(x) for x in logits]
    taken = [float(sum(e in chosen for chosen in choices)) for e in range(experts)]
    if name == "null":
        nulls = rule.zero + rule.copy
        fell = sum(sum(e >= experts for e in best(x, rule.top)) for x in logits)
        taken += [fell / nulls] * nulls
    share = [t / max(sum(taken), 1) for t in taken]
    mean_chance = [sum(row[e] for row in chances) / count for e in range(len(taken))]
    balance = rule.balance * len(taken) * sum(s * c for s, c in zip(share, mean_chance, strict=True))
    if name == "token_choice":
        z = sum(math.log(sum(math.exp(v) for v in x)) ** 2 for x in logits) / count
        return {"balance": balance, "z": rule.z * z}
    if name == "top_p":
        nats = sum(-sum(c * math.log(c) for c in row) for row in chances) / count
        return {"balance": balance, "entropy": rule.entropy * nats}
    return {"balance": balance}


def layer(name, rule, x_GTD, tokens, groups, weights, states, slots, rows):
    """(y_GTD, losses) of an FFN: every group's tokens choose, slots go to them by position and then row, the rest is
    dropped.

    Args:
      tokens: modality_GT (-1 on padding), id_GT, position_GT. groups: (name, modalities, experts). weights: by group.
      slots: of one expert, by group. rows: of a routing group.
    """
    y_GTD, total = np.zeros_like(x_GTD), {}
    length = x_GTD.shape[1] // rows
    order = [r * length + s for s in range(length) for r in range(rows)]
    for g in range(len(x_GTD)):
        for own, modalities, experts in groups:
            w, used, logits, choices = weights[own], [0] * experts, [], []
            mine = [t for t in order if tokens["modality"][g, t] in modalities]
            prices = sinkhorn_prices(rule, x_GTD[g, mine] @ w["router_DE"], experts) if name == "sinkhorn" else None
            for t in mine:
                x = x_GTD[g, t]
                logit_E = list(x @ w["router_DE"]) if "router_DE" in w else []
                token = {key: int(tokens[key][g, t]) for key in ("id", "position")} | {"prices": prices}
                chosen, copied = ORACLES[name](rule, logit_E, states[own], token, experts)
                logits.append(logit_E)
                choices.append(chosen)
                y_GTD[g, t] += copied * x
                for e, gate in chosen.items():
                    if used[e] < slots[own]:
                        used[e] += 1
                        y_GTD[g, t] += gate * swiglu(x, w, e)
            for key, value in losses(name, rule, logits, choices, states[own], experts).items():
                total[key] = total.get(key, 0.0) + value / len(x_GTD)
    return y_GTD, total


def swiglu(x, w, e):
    a, b = x @ w["gate_EDF"][e], x @ w["up_EDF"][e]
    return (a * sigmoid(a) * b) @ w["down_EFD"][e]
