"""diffugpt_varlen.py from the weights of GPT-2 or DiffuGPT, and its own weights for `transformers`.

    python lab/pretrained.py --init-from gpt2 --data fineweb --out out/gpt2
    python lab/pretrained.py --init-from diffugpt-s --data tinystories --rows docs --seq-len 512
    python lab/pretrained.py sample --out out/gpt2 --prompt "Once upon a time"
    python lab/pretrained.py export out/diffugpt_varlen out/export

The commands train, sample and eval are those of diffugpt_varlen.py. n_layer, n_head and n_embd are
the checkpoint's; the embedding gets rows for PAD and M, and loses positions beyond --seq-len. What
a run began with is needed once: its own checkpoint holds everything for sample, eval and --resume.

export writes config.json and model.safetensors, as GPT2LMHeadModel.from_pretrained and --init-from
read them. (E2) transformers shifts nothing: its logits at an input are about the next token.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/pretrained.py`
import common
import diffugpt_varlen as script
from common import UserError
from data.prepare import hint

HUB = {"gpt2": "openai-community/gpt2", "diffugpt-s": "diffusionfamily/diffugpt-s",
       "diffugpt-m": "diffusionfamily/diffugpt-m",
       **{f"gpt2-{size}": f"openai-community/gpt2-{size}" for size in ("medium", "large", "xl")}}
MASK_IDS = {"diffugpt-s": 10541, "diffugpt-m": 50257}  # their masks, in the paper's repository
GPT2 = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False)  # what the network of the script computes


@dataclass
class Config(script.Config):
    tokenizer: str = "gpt2"  # must be the checkpoint's
    out: str = "out/pretrained"  # run folder
    lr: float = 3e-4  # peak learning rate
    init_from: str = "gpt2"  # gpt2[-medium|-large|-xl], diffugpt-s|-m, or a folder
    mask_id: int | None = None  # token whose vector M begins with; None: its own mask, or the mean
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw: one rate for all; muon: the script's
    weight_decay: float = 0.01  # of adamw

    def problems(self):
        bad = super().problems()
        if self.init_from in ("parent", "scratch"):
            bad.append(f"--init-from {self.init_from} is for diffugpt_varlen.py: choose "
                       f"{', '.join(HUB)}, or a folder")
        return bad


# ---- load ----------------------------------------------------------------------------------------
def find_folder(name):
    """The folder of a checkpoint, fetched from the hub if `name` is one of HUB."""
    if Path(name).is_dir():
        return Path(name)
    if name not in HUB:
        raise UserError(f"--init-from {name} is no folder and no known checkpoint: choose "
                        f"{', '.join(HUB)}, or a folder")
    with hint(f"cannot fetch {HUB[name]}", "fetch its config.json and model.safetensors where "
              "there is a network, and name their folder"):
        from huggingface_hub import snapshot_download
        files = ["config.json", "model.safetensors"]
        return Path(snapshot_download(HUB[name], allow_patterns=files))


def read_checkpoint(folder):
    """config.json (a dict), and the tensors of model.safetensors in float32 under the names that
    GPT2LMHeadModel gives them. Conv1D keeps (in, out) like the file: nothing is transposed."""
    with hint(f"no GPT-2 in {folder}", "it needs config.json and model.safetensors, as "
              "`save_pretrained` or `python lab/pretrained.py export` write them"):
        card = json.loads((folder / "config.json").read_text("utf-8"))
        tensors = load_file(folder / "model.safetensors")
        wrong = [key for key, value in GPT2.items() if card.get(key, value) != value]
    if wrong:
        raise UserError(f"{folder} is not a GPT-2: its {' and '.join(wrong)} is another")
    weights, same = {}, {"embed_tokens.weight": "wte.weight", "lm_head.weight": "wte.weight"}
    for key, value in tensors.items():
        name = re.sub(r"^(transformer|denoise_model)\.", "", key)
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):  # buffers; c_attn.bias is a weight
            continue
        name, value = f"transformer.{same.get(name, name)}", value.float()
        if not torch.equal(weights.setdefault(name, value), value):
            raise UserError(f"{folder} has a head of its own, or two values of {name}: only tied "
                            "weights can be loaded")
    return card, weights


def set_sizes(cfg, card, weights, folder):
    """Write the checkpoint's n_layer, n_head and n_embd into cfg."""
    width = weights["transformer.wte.weight"].shape[1]
    blocks = {key.split(".")[2] for key in weights if key.startswith("transformer.h.")}
    sizes = dict(n_layer=len(blocks), n_head=card.get("n_head", width // 64), n_embd=width)
    if card.get("n_layer", len(blocks)) != len(blocks) or not blocks:
        raise UserError(f"{folder} has {len(blocks)} blocks, its config.json says "
                        f"{card.get('n_layer', 'nothing')}: the file is not whole")
    if sizes["n_head"] not in range(1, width + 1) or width % (2 * sizes["n_head"]):
        raise UserError(f"{folder} is not a GPT-2: n_head {sizes['n_head']} of its config.json "
                        f"does not suit its width {width}")
    for key, value in sizes.items():
        if getattr(cfg, key) not in (value, getattr(Config, key)):
            raise UserError(f"{folder} has {key} {value}: leave --{key.replace('_', '-')} and "
                            "--preset out")
        setattr(cfg, key, value)


def load_pretrained(cfg, tokenizer):
    """The weights that cfg.init_from names, for the script's Model; the sizes are written into cfg.
    Rows of the embedding: V tokens, PAD, M. The last two begin with what the checkpoint has for
    them, M with --mask-id, or as the mean of all tokens."""
    folder, V = find_folder(cfg.init_from), cfg.vocab_size
    card, weights = read_checkpoint(folder)
    table, positions = (weights.get(f"transformer.{k}.weight") for k in ("wte", "wpe"))
    if table is None or positions is None or table.dim() != 2:
        raise UserError(f"{folder} is not a GPT-2: it has no token or position embeddings")
    fingerprint = card.get("tokenizer", tokenizer.fingerprint)  # of an export
    if not V <= len(table) <= V + 2 or fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder} has {len(table)} tokens of another tokenizer than the "
                        f"{tokenizer.name} of these data, which has {V}: choose the --tokenizer "
                        "it was trained with (gpt2 for GPT-2)")
    if len(positions) <= cfg.seq_len:
        raise UserError(f"{folder} has {len(positions)} positions, one for BOS: --seq-len must be "
                        f"at most {len(positions) - 1}")
    set_sizes(cfg, card, weights, folder)
    pad, mask = card.get("pad_token_id"), cfg.mask_id
    if mask is None:
        mask = card.get("mask_token_id", MASK_IDS.get(cfg.init_from))
    if mask is not None and mask not in range(len(table)):
        raise UserError(f"--mask-id {mask} is no token of {folder}: choose 0 to {len(table) - 1}")
    if pad not in range(V, len(table)) or pad == mask:
        pad = None  # a token that others use for padding is not a PAD that ends documents
    rows = [table[:V].mean(0) if i is None else table[i] for i in (pad, mask)]
    weights["transformer.wte.weight"] = torch.cat((table[:V], torch.stack(rows)))
    weights["transformer.wpe.weight"] = positions[:cfg.seq_len + 1].clone()
    return weights, folder


def init_model(cfg, Model, data, device):
    """The model a run begins with. Every tensor must be there, no other, and of the right shape."""
    if cfg.resume:
        return Model(cfg).to(device)
    weights, folder = load_pretrained(cfg, data.tokenizer)
    with torch.device("meta"):
        model = Model(cfg)
    wanted = model.state_dict()
    wrong = {name for name in wanted.keys() | weights.keys() if name not in wanted
             or name not in weights or wanted[name].shape != weights[name].shape}
    if wrong:
        raise UserError(f"{folder} does not fit a GPT-2 of {cfg.n_layer} blocks and width "
                        f"{cfg.n_embd}: missing, unknown or of another shape are "
                        f"{', '.join(sorted(wrong)[:3])}")
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def make_optimizers(model, cfg):
    """--optimizer adamw: one rate for all, as in Gong et al. (appendix B), for large checkpoints;
    muon: those of the script."""
    if cfg.optimizer == "muon":
        return script.make_optimizers(model, cfg)
    return [torch.optim.AdamW([dict(params=list(model.parameters()), scale=1.0)], cfg.lr,
                              betas=(0.9, 0.999), weight_decay=cfg.weight_decay)]


# ---- export --------------------------------------------------------------------------------------
def export(out, target):
    """Write the run in `out` as a GPT2LMHeadModel into the folder `target`."""
    cfg = common.load_config(Config, out)
    model, tokenizer = common.load_model(script.Model, cfg, "cpu")
    V, target = cfg.vocab_size, Path(target)
    card = dict(GPT2, model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=V + 2,
                n_positions=cfg.seq_len + 1, n_embd=cfg.n_embd, n_layer=cfg.n_layer,
                n_head=cfg.n_head, tie_word_embeddings=True, bos_token_id=cfg.bos,
                eos_token_id=cfg.eos, tokenizer=tokenizer.fingerprint)
    if cfg.pipeline == "diffusion":
        card |= dict(pad_token_id=V, mask_token_id=V + 1)
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise UserError(f"{target} is not empty: choose another folder")
    tensors = save(model.state_dict(), dict(format="pt"))
    common.replace(target / "model.safetensors", lambda file: file.write(tensors))
    common.replace(target / "config.json", lambda file: file.write(json.dumps(card).encode()))
    print(f"{target}: config.json, model.safetensors")


def main(argv):
    if argv[:1] == ["export"]:
        if len(argv) != 3:
            raise UserError("export needs two folders: a run, and one to write")
        return export(*argv[1:])
    return script.main(argv, Config, init_model=init_model, make_optimizers=make_optimizers)


if __name__ == "__main__":
    common.run_main(main)
