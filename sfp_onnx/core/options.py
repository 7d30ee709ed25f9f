"""What the user may set."""

from __future__ import annotations

from dataclasses import dataclass

from .types import Align


@dataclass(frozen=True)
class BanditOptions:
    """What the user may set for the scores ``bandit:*``.

    ``pulls`` per arm (5 if neither is given) or ``budget`` in seconds; ``pull_batch`` images per pull; ``epsilon`` and ``temperature`` of
    the policies of those names; ``reward`` (None: by the kind of model); ``masked_by``: what stands for a masked channel, "zero" or its
    "mean" over the images of the search (what folding the mean into the biases of its readers leaves of the damage); ``rounds``: remove
    a share, pull again on the pruned model; ``round_repair``: "none", "bias" or "lstsq" between rounds;
    ``pull_memory``: bytes of activations to keep; ``state``: file to resume from; ``traces``: file for pulls, means and intervals per arm.
    """

    pulls: int | None = None
    budget: float | None = None
    pull_batch: int = 8
    epsilon: float = 0.1
    temperature: float = 0.05
    reward: str | None = None
    masked_by: str = "zero"
    rounds: int = 1
    round_repair: str = "none"
    pull_memory: int = 2**30
    state: str | None = None
    traces: str | None = None


@dataclass(frozen=True)
class ScoreOptions:
    """What the user may set for scores: the norm ``p`` of `magnitude`, the ``seed`` of everything random, and for class profiles the
    ``probe`` ("sgd" or "ridge") and the side ``pool`` to which maps are pooled; ``bandit`` for the scores ``bandit:*``. ``memory``: as
    that of `RepairOptions`, for `obs`; it changes no result."""

    p: int = 2
    seed: int = 0
    probe: str = "sgd"
    pool: int = 4
    bandit: BanditOptions | None = None
    memory: int = 2 * 10**9


@dataclass(frozen=True)
class PlanOptions:
    """How to choose what leaves.

    Exactly one of ``ratio`` (share of every group, 0 .. 1) and ``targets`` ("macs=50%", "latency=5ms") is given.
    ``allocation`` is "uniform" (the same share of every group), "global" (one ranking over all groups), "solve" (least estimated
    error under all targets) or "default" (solve with a latency, memory or ``max_drop``, or the score `obs`; else uniform). ``keep``
    and ``only`` are regular expressions on names of nodes or of their weights: layers that match ``keep`` keep all outputs; with
    ``only``, a group may shrink only if all layers that make it match. ``align``: kept widths are multiples of it; "16:4": of 16,
    and below 16 of 4; "16:1:12": of 16, and below 12 any; None: any. "auto" is the staircase of the device's convolutions,
    "default" is "auto" with a latency target and else "16:1:12" (solved) or "4:1:12", so that plans for counted targets do not
    depend on the machine. ``threads``, ``batch``, ``provider`` say how latency is measured; ``device_profile`` is a file with a
    profile measured elsewhere. ``max_drop`` ("1%") is how much ``metric`` ("module:function"; default top-1, or agreement with the
    original without labels) may fall on data to judge on, or else calibration data that are held out from scoring; alone, it asks
    for the smallest model that holds it. The drop must hold with a ``confidence`` (one-sided; 0.5: as measured).
    ``profile_budget``: seconds of wall time in which the model's layers are timed.
    """

    ratio: float | None = None
    targets: tuple[str, ...] = ()
    allocation: str = "default"
    keep: str | None = None
    only: str | None = None
    min_channels: int = 1
    align: Align | int | str | None = "default"
    threads: int = 0
    batch: int = 1
    provider: str = "cpu"
    device_profile: str | None = None
    max_drop: str | None = None
    metric: str | None = None
    confidence: float = 0.95
    profile_budget: float = 60.0

    def __post_init__(self) -> None:
        """Read the alignment."""
        object.__setattr__(self, "align", Align.parse(self.align))


@dataclass(frozen=True)
class RepairOptions:
    """How the remaining weights are re-fitted.

    ``fit``: "lstsq" (weights and biases), "bias", or "bn" (statistics of BatchNormalization).
    ``rows_per_input``: rows of the least-squares problem per input of a layer;
    ``least_positions``: at least so many positions of each sample; ``ridges``: strengths tried, relative to the mean variance of the
    inputs; ``memory``: bytes of activations and of the widest layer's matrices held in memory; the rest goes to a
    temporary file. ``force``: keep a repair that took the model away from the original on held-out samples.
    """

    fit: str = "lstsq"
    force: bool = False
    seed: int = 0
    rows_per_input: float = 128.0
    least_positions: int = 4
    ridges: tuple[float, ...] = (1e-6, 1e-3, 1e-2, 1e-1)
    memory: int = 2 * 10**9
