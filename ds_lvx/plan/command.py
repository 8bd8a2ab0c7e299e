"""``ds-lvx plan``: what a training step will take on a cluster, before anybody has one."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_lvx.plan import profile, report
from ds_lvx.plan.cards import CARDS, card
from ds_lvx.plan.cluster import ACROSS_LATENCY_S, WITHIN_LATENCY_S, Cluster, Link, from_card
from ds_lvx.plan.generation import generations
from ds_lvx.plan.models import model
from ds_lvx.plan.scenario import TRAINED, Scenario
from ds_lvx.plan.search import plan
from ds_lvx.plan.units import bytes_per_s, count, seconds

_SETTINGS = {
    "zero": "zero_stage",
    "recompute": "recompute",
    "checkpointing": "checkpointing",
    "loss-tiles": "loss_tiles",
    "train": "trains",
    "lora_r": "lora_r",
    "load_in_4bit": "load_in_4bit",
    "freeze_vision": "freeze_vision",
}
"""Of a `Scenario`, by the names of their options; of generation it is the stage alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ds-lvx plan``."""
    _add_scenario(parser)
    _add_cluster(parser)
    group = parser.add_argument_group("measuring this machine")
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="measure kernels and links here, and keep the result for later plans and for auto",
    )
    group.add_argument("--ranks", type=int, help="to measure with; default: one a GPU, or 2")
    group.add_argument(
        "--network",
        metavar="RATE[,LATENCY]",
        help="measure over an emulated network, such as 200mbit (needs root)",
    )
    group.add_argument("--quick", action="store_true", help="tiny shapes, to try it")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON, not text")
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="speed-up over ring attention by S_q / S_kv"
    )


def _add_scenario(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is trained")
    group.add_argument("--model", help="name on the Hugging Face hub, or path of a config.json")
    group.add_argument("--text", default="4096", help="text tokens of a sample (64K is 65,536)")
    visual = group.add_mutually_exclusive_group()
    visual.add_argument("--frames", help="frames of a sample")
    visual.add_argument("--visual-tokens", help="of a sample, such as 100M, in place of --frames")
    group.add_argument(
        "--generate", metavar="N", help="no training: N new tokens with the visual keys sharded"
    )
    group.add_argument(
        "--zero", type=int, help="ZeRO stage, 0 to 3 (default: 3; with --generate 0)"
    )
    both = argparse.BooleanOptionalAction
    group.add_argument(
        "--recompute", action=both, help="lvx projects K and V again in backward (default: yes)"
    )
    group.add_argument("--checkpointing", action=both, help="checkpoint the layers (default: yes)")
    group.add_argument(
        "--loss-tiles", type=int, help="pieces of a rank's text for logits and loss (default: 1)"
    )
    group.add_argument(
        "--train", choices=TRAINED, help="all weights (default), or cross-attention alone"
    )
    group = parser.add_argument_group("as launch/finetune.py has them")
    group.add_argument(
        "--lora_r", type=int, help="rank of LoRA in the projections of the text's attention"
    )
    flag: dict[str, Any] = {"action": "store_true", "default": None}
    group.add_argument("--load_in_4bit", **flag, help="the linear layers of the text")
    group.add_argument("--freeze_vision", **flag, help="leave the vision tower as it is")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on what")
    group.add_argument("--gpus", type=int, default=8, help="in all")
    group.add_argument("--gpus-per-node", type=int, default=8)
    source = group.add_mutually_exclusive_group()
    source.add_argument("--card", help=f"one of {', '.join(CARDS)}")
    source.add_argument("--profile", type=Path, metavar="FILE", help="written by --calibrate")
    group.add_argument("--within", metavar="RATE", help="a GPU's link in its node, as 300GB/s")
    group.add_argument("--within-latency", metavar="TIME", help="as 10us")
    group.add_argument("--across", metavar="RATE", help="a node's link to others, as 25GB/s")
    group.add_argument("--across-latency", metavar="TIME", help="as 20us")
    group.add_argument("--group", type=int, help="ranks that share a sample; default: the best")


def run(options: argparse.Namespace) -> int:
    """Plan or calibrate; the exit status."""
    if options.calibrate:
        return _calibrate(options)
    scenario, cluster = _scenario_of(options), _cluster_of(options)
    found: report.Found
    if options.generate is None:
        found = plan(scenario, cluster, group=options.group)
        if options.plot is not None:
            try:
                report.save_plot(scenario, cluster, found.best.ranks, options.plot)
            except ModuleNotFoundError as error:
                raise ValueError(f"--plot: {error}; pip install 'ds_lvx[plots]'") from error
    elif options.plot is not None:
        raise ValueError("--plot: got it with --generate, which has none; leave one of them out")
    else:
        new_tokens = count(options.generate, what="--generate")
        found = generations(scenario, cluster, new_tokens=new_tokens, group=options.group)
    if options.json:
        print(json.dumps(report.as_record(scenario, cluster, found), indent=1))
    else:
        print(report.as_text(scenario, cluster, found))
    return 0


def _scenario_of(options: argparse.Namespace) -> Scenario:
    if options.model is None:
        raise ValueError("--model: got none; expected a name, or the path of a config.json")
    wanted = model(options.model)
    if options.visual_tokens is not None:
        tokens = count(options.visual_tokens, what="--visual-tokens")
        if wanted.frame_tokens == 0:
            raise ValueError(
                f"--visual-tokens: got {tokens:,} of {wanted.name}, whose frames take no tokens; "
                "expected --frames"
            )
        frames = -(-tokens // wanted.frame_tokens)
    else:
        frames = count(options.frames or "1", what="--frames")
    return Scenario(
        model=wanted.with_frames(frames),
        text_tokens=count(options.text, what="--text"),
        frames=frames,
        **_settings(options),
    )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of a `Scenario` that the options give.

    Raises:
        ValueError: those of training beside ``--generate``.
    """
    given = {
        field: getattr(options, name.replace("-", "_"))
        for name, field in _SETTINGS.items()
        if getattr(options, name.replace("-", "_")) is not None
    }
    if options.generate is None:
        return given
    stage = {"zero_stage": given.pop("zero_stage", 0)}
    if given:
        names = ", ".join(f"--{name}" for name, field in _SETTINGS.items() if field in given)
        raise ValueError(f"{names}: got it with --generate, which trains nothing; leave it out")
    return stage


def _cluster_of(options: argparse.Namespace) -> Cluster:
    """A profile or a card, and links."""
    if options.card is None and options.profile is None:
        raise ValueError(
            f"--card: got neither a card nor a profile; expected --card with one of {list(CARDS)}, "
            "or --profile with a file that ds-lvx plan --calibrate wrote"
        )
    if options.profile is not None:
        known = profile.read(options.profile)
    else:
        known = from_card(card(options.card), gpus=1)
    known = known.with_gpus(options.gpus, options.gpus_per_node)
    links: dict[str, Any] = {}
    for side, latency_s in (("within", WITHIN_LATENCY_S), ("across", ACROSS_LATENCY_S)):
        rate, latency = getattr(options, side), getattr(options, f"{side}_latency")
        rate_s = getattr(known, side).shift.bytes_per_s
        if rate is not None:
            rate_s = bytes_per_s(rate, what=f"--{side}")
        if latency is not None:
            latency_s = seconds(latency, what=f"--{side}-latency")
        if rate is not None or latency is not None:
            links[side] = Link.of(rate_s, latency_s)
    return replace(known, **links)


def _calibrate(options: argparse.Namespace) -> int:
    from ds_lvx.compare.harness import Ranks, RunError
    from ds_lvx.compare.network import NetworkError
    from ds_lvx.plan import calibrate

    where = Ranks.here(options.ranks, network=options.network, otherwise=2)
    print(f"measuring on {where.count} ranks ...", file=sys.stderr)
    try:
        record = calibrate.calibrate(where, quick=options.quick)
    except (RunError, NetworkError) as error:
        print(f"ds-lvx plan: {error}", file=sys.stderr)
        return 1
    if options.quick and options.profile is None:
        raise ValueError("--quick: got no --profile FILE; its result must not serve later plans")
    path = calibrate.write(record, options.profile)
    print(json.dumps(record["cluster"], indent=1) if options.json else f"written to {path}")
    return 0
