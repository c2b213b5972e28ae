"""Predictions, not measurements: time of work from its FLOPs, and what selection adds on many ranks.

Run as a script, this file prints the table of docs/scaling.md. `bench_scale.py` compares the predictions with measured
times. Letters: W ranks, R candidates per rank, b = keep R kept rows per rank.
"""

import math
from typing import Any, Literal, NamedTuple

_SCORE_BYTES = 4
_HEADER_BYTES = 16  # number of candidates and layout of the pool, which ranks compare before they exchange rows
_BACKWARD_SHARE = 2 / 3  # of a step; gradients are reduced during the backward pass


class TimeLaw(NamedTuple):
    """Time of work on one machine from its FLOPs: ``ms = per_flop_ms * flops + per_pass_ms * passes`` (`time_law`)."""

    per_flop_ms: float
    per_pass_ms: float

    def ms(self, flops: float, passes: int = 1) -> float:
        """Time of the given FLOPs, spread over the given number of passes."""
        return self.per_flop_ms * flops + self.per_pass_ms * passes


def time_law(small: tuple[float, float], large: tuple[float, float]) -> TimeLaw:
    """Calibrate FLOPs to a machine by timing one kind of pass (a step, or scoring) at two sizes.

    Every pass has a fixed cost, however small it is: kernel launches, reading the weights, the optimizer's update.

    Args:
        small: FLOPs of the smaller pass, and its time in ms.
        large: FLOPs of the larger pass, and its time in ms.

    Returns:
        The line through both. If noise would make one of its parts negative, that part is 0 and the line passes
        through the larger pass only.

    Raises:
        ValueError: If the larger pass has no more FLOPs than the smaller one.

    Example:
        >>> law = time_law((1e9, 30.0), (4e9, 90.0))
        >>> round(law.ms(2e9)), round(law.ms(8e9, passes=2))
        (50, 180)
    """
    (small_flops, small_ms), (large_flops, large_ms) = small, large
    if not 0 < small_flops < large_flops:
        raise ValueError(f"Expected two sizes, the smaller one first, got {small_flops:g} and {large_flops:g} FLOPs.")
    slope = (large_ms - small_ms) / (large_flops - small_flops)
    per_flop_ms = min(max(slope, 0.0), large_ms / large_flops)
    return TimeLaw(per_flop_ms, large_ms - per_flop_ms * large_flops)


class Link(NamedTuple):
    """The connection between two ranks; where several lie in between, the slowest.

    Attributes:
        gb_per_s: Bandwidth of one rank in one direction, 10^9 bytes per second.
        latency_us: Time of an empty message.
    """

    gb_per_s: float
    latency_us: float


def all_gather_ms(total_bytes: float, ranks: int, link: Link) -> float:
    """Time of an all-gather.

    ``(W - 1) / W * bytes / bandwidth + ceil(log2 W) * latency``

    Args:
        total_bytes: Of all ranks together.
        ranks: W.
        link: Between ranks.

    Returns:
        Milliseconds; 0 for one rank.

    Example:
        >>> all_gather_ms(1e9, 4, Link(gb_per_s=100, latency_us=5))
        7.51

    Reference:
        Thakur, Rabenseifner and Gropp, 2005, Optimization of collective communication operations in MPICH.
    """
    transfer_ms = (ranks - 1) / ranks * total_bytes / link.gb_per_s * 1e-6
    return transfer_ms + math.ceil(math.log2(ranks)) * link.latency_us * 1e-3


def all_reduce_ms(size_bytes: float, ranks: int, link: Link) -> float:
    """Time of an all-reduce of ``size_bytes`` per rank: a reduce-scatter and an all-gather, which take equally long."""
    return 2 * all_gather_ms(size_bytes, ranks, link)


def moved_rows(kept: int, keep: float, ranks: int) -> float:
    """Expected rows that a rank receives from others when the W b best candidates of all ranks are kept.

    ``sqrt(b (1 - keep) (W - 1) / W / (2 pi))``: how many of them a rank holds is hypergeometric, here approximated by a
    normal distribution; a rank that holds more than b gives the rest away. Assumes random pools of equal difficulty.

    Args:
        kept: b.
        keep: b / R.
        ranks: W.

    Returns:
        Rows per step, 0 for one rank.

    Example:
        >>> round(moved_rows(kept=32, keep=0.5, ranks=1024), 2)
        1.59
    """
    return math.sqrt(kept * (1 - keep) * (ranks - 1) / ranks / (2 * math.pi))


def selection_ms(
    *,
    ranks: int,
    link: Link,
    kept: int,
    keep: float,
    scope: Literal["local", "global"] = "local",
    row_bytes: float = 0.0,
    tensors: int = 2,
    scored_bytes: float = 0.0,
) -> dict[str, float]:
    """Communication that selection adds to one step; uniform training has none of it.

    Args:
        ranks: W.
        link: Between ranks.
        kept: b.
        keep: b / R.
        scope: As in `earlysift.Sifter`: local selects per rank and exchanges nothing.
        row_bytes: Size of one candidate, all tensors of the pool together.
        tensors: Number of tensors in the pool; each is sent separately.
        scored_bytes: Size of the weights that scoring uses if they are sharded (FSDP2): embeddings, the first layers
            and the head, in the precision they are gathered in. 0 if every rank holds the model (DDP).

    Returns:
        Milliseconds by ``weights``, ``scores`` and ``rows``.

    Example:
        >>> spent = selection_ms(ranks=8, link=Link(50, 10), kept=32, keep=0.5, scope="global", row_bytes=2048)
        >>> {name: round(ms, 3) for name, ms in spent.items()}
        {'weights': 0.0, 'scores': 0.06, 'rows': 0.02}
    """
    exchanges = ranks > 1 and scope == "global"
    candidates = round(kept / keep)
    headers, scores = (all_gather_ms(ranks * size, ranks, link) for size in (_HEADER_BYTES, _SCORE_BYTES * candidates))
    rows = moved_rows(kept, keep, ranks) * row_bytes / link.gb_per_s * 1e-6 + tensors * link.latency_us * 1e-3
    return {
        "weights": all_gather_ms(scored_bytes, ranks, link) if scored_bytes else 0.0,
        "scores": headers + scores if exchanges else 0.0,
        "rows": rows if exchanges else 0.0,
    }


def overhead(
    *, step_ms: float, score_ms: float, communication_ms: float, gradient_bytes: float, ranks: int, link: Link
) -> float:
    """Predicted time that selection adds, as a share of the uniform step on the same number of ranks.

    ``(score + communication) / (step + waiting for gradients)``. Gradients are reduced during the backward pass, two
    thirds of a step; a step waits only for what takes longer. The slower the links, the smaller the *share* of scoring,
    because uniform training then waits for gradients, too.

    Args:
        step_ms: Training step of a rank, without communication.
        score_ms: Scoring of its pool.
        communication_ms: Sum of what `selection_ms` returns.
        gradient_bytes: Gradients of a rank, in the precision they are reduced in.
        ranks: W.
        link: Between ranks.

    Example:
        >>> overhead(step_ms=100, score_ms=5, communication_ms=0, gradient_bytes=0, ranks=1, link=Link(50, 10))
        0.05
    """
    waited_ms = max(0.0, all_reduce_ms(gradient_bytes, ranks, link) - _BACKWARD_SHARE * step_ms)
    return (score_ms + communication_ms) / (step_ms + waited_ms)


def main() -> None:
    """Print the overhead of BERT base for three kinds of links: the table of docs/scaling.md."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from earlysift import costs
    from earlysift.anatomy import find_anatomy

    kept, keep, length, masked = 32, 0.5, 128, 0.15
    assumed_flops_per_s = 0.4 * 312e12  # 40 % of the bfloat16 peak of an A100
    row_bytes = 2 * 8 * length  # input_ids and labels, int64
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig())
    anatomy = find_anatomy(model)
    weights = sum(weight.numel() for weight in model.parameters())
    scored = weights - sum(weight.numel() for layer in list(anatomy.layers)[1:] for weight in layer.parameters())

    def time_ms(rows: int, law: costs.FlopsLaw) -> float:
        return law.flops(rows=rows, length=length, labelled=round(masked * rows * length)) / assumed_flops_per_s * 1e3

    step_ms = 3 * time_ms(kept, costs.flops_law(anatomy))
    score_ms = time_ms(round(kept / keep), costs.flops_law(anatomy, 1, skips_unlabelled=True))
    print(f"BERT base: a step of {kept} takes {step_ms:.1f} ms,", end=" ")
    print(f"scoring {kept / keep:.0f} at depth 1 takes {score_ms:.2f} ms")

    within_node = Link(450, 5)
    links = {  # between 8 ranks of a node, and between nodes
        "NVLink, then 400 Gb/s": (within_node, Link(50, 10)),
        "NVLink, then 100 Gb/s": (within_node, Link(12.5, 20)),
        "10 Gb/s Ethernet": (Link(1.25, 50), Link(1.25, 50)),
    }
    kinds: dict[str, dict[str, Any]] = {
        "DDP": {},
        "DDP, global": {"scope": "global"},
        "FSDP2": {"scored_bytes": 2 * scored},
    }
    print("links                  ranks", *(f"{kind:>12}" for kind in kinds))
    for name, (near, far) in links.items():
        for ranks in (1, 8, 64, 1024):
            link = near if ranks <= 8 else far
            shares = []
            for options in kinds.values():
                spent = selection_ms(ranks=ranks, link=link, kept=kept, keep=keep, row_bytes=row_bytes, **options)
                share = overhead(
                    step_ms=step_ms,
                    score_ms=score_ms,
                    communication_ms=sum(spent.values()),
                    gradient_bytes=4 * weights,
                    ranks=ranks,
                    link=link,
                )
                shares.append(f"{share:12.1%}")
            print(f"{name:22} {ranks:5}", *shares)


if __name__ == "__main__":
    main()
