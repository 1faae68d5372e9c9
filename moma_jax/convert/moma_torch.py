"""A model exported by `moma convert to-folder`, in PyTorch: logits of whole sequences under causal routing.

    python moma_torch.py FOLDER 0 1203 77 5        # the ten likeliest ids after these, with their log-probabilities
    model = Moma("FOLDER"); logits_BSV = model.logits(token_BS)

It needs torch and safetensors. It is written to be read, and for others to be checked against: float32, no cache, one
document in each row. Names of arrays end in their axes: B rows, S positions, D width, H heads, K channels of a head,
E experts, F hidden size, V ids. README.md has the layout of the tensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot, silu


class Moma:
    """The model in a folder, on one device."""

    def __init__(self, folder: str, device: str = "cpu"):
        root = Path(folder)
        self.config = json.loads((root / "config.json").read_text())
        if self.config["format_version"] != 1:
            raise ValueError(f"{folder}: format {self.config['format_version']}; this file reads 1")
        self.weights = {}
        for file in sorted(root.glob("model*.safetensors")):
            self.weights |= {name: value.to(device, torch.float32) for name, value in load_file(file).items()}
        self.modality_V = torch.zeros(self.config["vocabulary_size"], dtype=torch.long, device=device)
        for number, modality in enumerate(self.config["modalities"]):
            for start, stop in modality["ranges"]:
                self.modality_V[start:stop] = number

    @torch.no_grad()
    def logits(self, token_BS: torch.Tensor) -> torch.Tensor:
        """Logits (B, S, V), float32, of ids (B, S), each row one document from its beginning."""
        token_BS = token_BS.to(self.modality_V.device)
        modality_BS = self.modality_V[token_BS]
        angles = self.rotary_angles(token_BS.shape[1])
        table_VD = self.weights["embedding.kernel_VD"]
        x_BSD = table_VD[token_BS]
        for number in range(self.config["layers"]):
            layer = below(self.weights, f"layers.{number}.")
            enters_BS, gate_BS = self.entering(x_BSD, layer, modality_BS)
            y_BSD = self.layer(x_BSD, layer, modality_BS, enters_BS, angles)
            x_BSD = torch.where(enters_BS[..., None], x_BSD + gate_BS[..., None] * (y_BSD - x_BSD), x_BSD)
        x_BSD = self.rms_norm(x_BSD, self.weights["final_norm.scale_D"])
        return x_BSD @ self.weights.get("unembedding.kernel_DV", table_VD.T)

    def entering(self, x_BSD, layer, modality_BS):
        """Who enters a layer, and its weight there: everyone, but in front of every second layer of mod+."""
        enters_BS, gate_BS = (torch.zeros(modality_BS.shape, dtype=kind) for kind in (torch.bool, torch.float32))
        enters_BS, gate_BS = enters_BS.to(x_BSD.device), gate_BS.to(x_BSD.device)
        routers = [group for group in self.config["depth_groups"] if f"depth.{group['name']}.router_DE" in layer]
        for group in routers:
            own_BS = torch.isin(modality_BS, torch.tensor(group["modalities"], device=x_BSD.device))
            decision = self.config["depth_decision"]
            enters_BS1, gate_BS1 = self.decide(x_BSD, layer, "depth.", group["name"], decision)
            own_BS &= enters_BS1[..., 0]
            enters_BS, gate_BS = enters_BS | own_BS, torch.where(own_BS, gate_BS1[..., 0], gate_BS)
        return (enters_BS, gate_BS) if routers else (~enters_BS, gate_BS + 1)

    def layer(self, x_BSD, layer, modality_BS, enters_BS, angles):
        """Attention and experts, each with its norm before it (pre) or behind it (swin)."""

        def attend(y_BSD):
            return self.attention(y_BSD, below(layer, "attention."), modality_BS, enters_BS, angles)

        def experts(y_BSD):
            return self.experts(y_BSD, layer, modality_BS)

        def scale_of(own):
            return own["scale_D"].expand(*modality_BS.shape, -1)

        for body, name in ((attend, "attention_norm"), (experts, "ffn_norm")):
            scale = self.owned(below(layer, f"{name}."), modality_BS, scale_of)
            if self.config["norm"] == "pre":
                x_BSD = x_BSD + body(self.rms_norm(x_BSD, scale))
            else:
                x_BSD = x_BSD + self.rms_norm(body(x_BSD), scale)
        return x_BSD

    def attention(self, x_BSD, weights, modality_BS, enters_BS, angles):
        """Causal attention to tokens that entered; heads of queries share those of keys, side by side."""

        def projected(name):
            def of(own):
                y_BSHK = torch.einsum("bsd,dhk->bshk", x_BSD, own[f"{name}_DHK"])
                return y_BSHK if name == "value" else rotate(self.qk_norm(y_BSHK, below(own, f"{name}_norm.")), angles)

            return self.owned(weights, modality_BS, of)

        q_BSHK, k_BSHK, v_BSHK = (projected(name) for name in ("query", "key", "value"))
        share = q_BSHK.shape[2] // k_BSHK.shape[2]
        k_BSHK, v_BSHK = (x.repeat_interleave(share, dim=2) for x in (k_BSHK, v_BSHK))
        score_BHQS = torch.einsum("bqhk,bshk->bhqs", q_BSHK, k_BSHK) * q_BSHK.shape[-1] ** -0.5
        earlier_QS = torch.ones(score_BHQS.shape[-2:], dtype=torch.bool, device=x_BSD.device).tril()
        seen_B1QS = (earlier_QS & enters_BS[:, None, :])[:, None]
        weight_BHQS = torch.softmax(score_BHQS.masked_fill(~seen_B1QS, torch.finfo(torch.float32).min), dim=-1)
        y_BSHK = torch.einsum("bhqs,bshk->bqhk", weight_BHQS, v_BSHK)
        return self.owned(weights, modality_BS, lambda own: torch.einsum("bshk,hkd->bsd", y_BSHK, own["out_HKD"]))

    def owned(self, weights, modality_BS, run):
        """What `run(weights)` gives each token: under the weights of all, or of its own modality where it has some."""
        if not self.config["by_modality"]:
            return run(weights)
        found = None
        for number, modality in enumerate(self.config["modalities"]):
            y = run(below(weights, f"{modality['name']}."))
            here = (modality_BS == number).reshape(*modality_BS.shape, *[1] * (y.ndim - 2))
            found = torch.where(here, y, torch.zeros_like(y) if found is None else found)
        return found

    def experts(self, x_BSD, layer, modality_BS):
        """The feed-forward layer: every group's experts on the tokens of its modalities that enter them."""
        y_BSD = torch.zeros_like(x_BSD)
        for group in self.config["groups"]:
            name = group["name"]
            gate_EDF, up_EDF, down_EFD = (
                layer[f"ffn.{name}.{matrix}"] for matrix in ("gate_EDF", "up_EDF", "down_EFD")
            )
            own_BS1 = torch.isin(modality_BS, torch.tensor(group["modalities"], device=x_BSD.device))[..., None]
            if group["routed"]:
                enters_BSE, weight_BSE = self.decide(x_BSD, layer, "ffn.", name, self.config["decision"])
            else:
                enters_BSE, weight_BSE = torch.ones_like(own_BS1), torch.ones_like(own_BS1, dtype=torch.float32)
            weight_BSE = torch.where(own_BS1 & enters_BSE, weight_BSE, 0.0)
            for e in range(len(gate_EDF)):
                hidden_BSF = silu(x_BSD @ gate_EDF[e]) * (x_BSD @ up_EDF[e])
                y_BSD += weight_BSE[..., e, None] * (hidden_BSF @ down_EFD[e])
        return y_BSD

    def decide(self, x_BSD, layer, where, name, decision):
        """(enters, weight), (B, S, E): which experts a token enters by itself, and how much they count."""
        router, state = below(layer, f"{where}{name}."), below(layer, f"state.{name}.")
        logit_BSE = x_BSD @ router["router_DE"]
        if decision["kind"] == "top":
            sigmoid = decision["gates"] == "sigmoid"
            affinity_BSE = torch.sigmoid(logit_BSE) if sigmoid else torch.softmax(logit_BSE, dim=-1)
            rank_BSE = affinity_BSE + state.get("bias_E", 0.0)
            chosen_BSK = torch.sort(rank_BSE, dim=-1, descending=True, stable=True).indices[..., : decision["top"]]
            enters_BSE = one_hot(chosen_BSK, logit_BSE.shape[-1]).bool().any(-2)
            weight_BSE = torch.where(enters_BSE, affinity_BSE, 0.0)
            if decision["normalise"]:
                weight_BSE = weight_BSE / weight_BSE.sum(-1, keepdim=True).clamp(min=1e-9)
            return enters_BSE, weight_BSE
        if decision["kind"] == "auxiliary":
            auxiliary = below(layer, f"{where}{name}_auxiliary.")
            enters_BSE = silu(x_BSD @ auxiliary["in_DA"]) @ auxiliary["out_AE"] > 0
        else:
            enters_BSE = logit_BSE >= state["threshold_E"]
        return enters_BSE, torch.sigmoid(logit_BSE)

    def rms_norm(self, x_BSD, scale):
        """Root-mean-square norm over the width."""
        return x_BSD * torch.rsqrt(x_BSD.square().mean(-1, keepdim=True) + self.config["norm_epsilon"]) * scale

    def qk_norm(self, x_BSHK, norm):
        """LayerNorm of each head by its own scale and bias, RMSNorm by one scale, or nothing, by what there is."""
        if "scale_K" in norm:
            return self.rms_norm(x_BSHK, norm["scale_K"])
        if not norm:
            return x_BSHK
        centred = x_BSHK - x_BSHK.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.config["norm_epsilon"])
        return normed * norm["scale_HK"] + norm["bias_HK"]

    def rotary_angles(self, positions: int):
        """Cosine and sine (S, 1, K/2) of the rotary angles, slowed as in Llama 3.1 where the config says so."""
        width, scaling, device = self.config["head_width"], self.config["rope_scaling"], self.modality_V.device
        channel_K = torch.arange(0, width, 2, dtype=torch.float32, device=device)
        frequency_K = self.config["rope_theta"] ** -(channel_K / width)
        if scaling is not None:
            turns_K = scaling["positions"] / (2 * torch.pi) * frequency_K
            kept_K = ((turns_K - scaling["low"]) / (scaling["high"] - scaling["low"])).clamp(0, 1)
            frequency_K = frequency_K * (kept_K + (1 - kept_K) / scaling["factor"])
        angle_S1K = (torch.arange(positions, device=device)[:, None] * frequency_K)[:, None]
        return torch.cos(angle_S1K), torch.sin(angle_S1K)


def rotate(x_BSHK, angles):
    """Rotary positions; channel k pairs with k + K/2."""
    (cos_S1K, sin_S1K), (first, second) = angles, x_BSHK.chunk(2, dim=-1)
    return torch.cat([first * cos_S1K - second * sin_S1K, second * cos_S1K + first * sin_S1K], dim=-1)


def below(tensors: dict, prefix: str) -> dict:
    """The tensors whose names begin so, by the rest of their names."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


if __name__ == "__main__":
    logits_BSV = Moma(sys.argv[1]).logits(torch.tensor([[int(word) for word in sys.argv[2:]]]))
    chance_V = torch.log_softmax(logits_BSV[0, -1], 0)
    for chance, number in zip(*chance_V.topk(min(10, len(chance_V))), strict=True):
        print(f"{int(number)}\t{float(chance):.4f}")
