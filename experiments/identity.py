"""The identity of a run: the fields of its configuration that change its result.

Hashes of the identity name run folders and rows, so they have to last. Field names do not change
when a class or a key moves, a field whose value is its default is left out, and numbers are
compared by value. A field may be added at any time if its default means what was done before.
`VERSION` changes when the meaning of a field changes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

VERSION = 1

# Lasting names for the classes that configurations name. A user's own class keeps its path.
KINDS = {
    "models.resnet.ResNet": "resnet",
    "models.rnn.RNNLanguageModel": "rnn_language_model",
    "models.rnn.PixelGRU": "pixel_gru",
    "models.decoder.Decoder": "decoder",
    "models.pair_classifier.PairClassifier": "pair_classifier",
    "models.image_models.torchvision_resnet": "torchvision_resnet",
    "models.image_models.VisionTransformer": "vit",
    "experiments.data.images.load_hub_images": "images",
    "experiments.data.images.load_digits": "digits",
    "experiments.data.image_folder.load_image_folder": "image_folder",
    "experiments.data.text.load_hub_text": "text",
    "experiments.data.text.load_topics": "topics",
    "experiments.data.pairs.load_hub_pairs": "pairs",
    "experiments.data.grammar.load_grammar": "grammar",
    "highway_bp.Backprop": "bp",
    "highway_bp.FixedPoint": "fixed_point",
    "highway_bp.Highway": "highway",
    "highway_bp.TruncatedBPTT": "truncated_bptt",
    "highway_bp.MGRIT": "mgrit",
    "highway_bp.schedules.Constant": "constant",
    "highway_bp.schedules.Milestones": "milestones",
    "highway_bp.schedules.Linear": "linear",
    "highway_bp.schedules.Cosine": "cosine",
    "highway_bp.schedules.BpEvery": "bp_every",
    "highway_bp.schedules.Adaptive": "adaptive",
}

# A field with the value given here is left out; all other fields are always there.
DEFAULTS: dict[str, Any] = {
    "trainer.channels_last": "auto",
    "continue_from": None,
    "model.downsampling": "paper",
    "model.carry": "gate",
    "model.dropout": 0.0,
    "model.pretrained": None,
    "data.config": None,
    "data.validation": 0,
    "data.column": "text",
    "data.train_limit": None,
    "data.eval_limit": None,
    "optim.steps": None,
    "optim.epochs": None,
    "optim.warmup_steps": 0,
    "optim.warmup_lr": 0.01,
    "optim.clip": None,
    "grad.gamma": 0.0,
    "grad.group_size": 1,
    "grad.tolerance": None,
    "schedule": "constant",
    "parallel": None,  # the value that `_parallel` returns
}

# Keys that do not change a result, or count in another form; a group stands for all its keys.
LEFT_OUT = {
    "k",
    "gamma",
    "seed",
    "steps",
    "advise",
    "device",
    "run_root",
    "logger",
    "diagnostics",
    "parallel",
    "trainer",
    "data.root",
    "data.cache_dir",
    "data.workers",
    "data.train.rows",
    "data.test.rows",
}


def identity(cfg: DictConfig, device: str) -> dict[str, Any]:
    """Return the identity of a run on a kind of device (cpu, cuda): fields by name.

    The root keys k and gamma count only if the gradient method uses them. So runs of
    backpropagation with different k or gamma are the same run.
    """
    found = dict(flat(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))
    if found.get("steps") is not None:  # `steps` overrides the recipe's length
        found["optim.steps"] = found["steps"]
    if found.get("optim.steps") is not None:
        found["optim.epochs"] = None
    counting = {k: v for k, v in found.items() if not {k, k.partition(".")[0]} & LEFT_OUT}
    fields = {key.removesuffix("._target_"): _value(key, v) for key, v in counting.items()}
    fields |= {
        "precision": precision_of(cfg.trainer, device),
        "trainer.channels_last": cfg.trainer.channels_last,
        "parallel": _parallel(cfg.parallel),
    }
    kept = {n: value for n, value in fields.items() if n not in DEFAULTS or value != DEFAULTS[n]}
    return {"version": VERSION, **kept}


def config_hash(fields: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits; runs with different fields have different ones."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def setup_hash(fields: Mapping[str, Any]) -> str:
    """Return the hash without gradient method, schedule and carry. Runs that share this hash may be
    compared."""
    method = ("grad", "schedule", "model.carry")
    shared = {n: v for n, v in fields.items() if not {n, n.partition(".")[0]} & set(method)}
    return config_hash(shared)


def precision_of(trainer: Mapping[str, Any], device: str) -> str:
    """float32, tf32 or bfloat16: amp "auto" is bfloat16 autocast on CUDA and none on a CPU."""
    amp = device == "cuda" if trainer["amp"] == "auto" else trainer["amp"]
    if amp:
        return "bfloat16"
    return "tf32" if trainer["tf32"] and device == "cuda" else "float32"


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield keys with dots, and values; {"model": {"depth": 20}} gives "model.depth"."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value(key: str, value: Any) -> Any:
    """Return a whole number as a float, so that 1 equals 1.0, and a class as its lasting name."""
    if key.endswith("._target_"):
        return KINDS.get(value, value)
    if isinstance(value, list):
        return [_value("", each) for each in value]
    return float(value) if type(value) is int else value


def _parallel(parallel: DictConfig) -> dict[str, Any] | None:
    """Return what counts of processes that share the layers; each is a group, exact inside."""
    given = OmegaConf.to_container(parallel, resolve=True)
    if not given["layers"]:
        return None
    return {
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "sizes": given["sizes"],
        # batch normalisation depends on these
        **{key: given[key] for key in ("data", "micro_batches") if given[key] != 1},
    }
