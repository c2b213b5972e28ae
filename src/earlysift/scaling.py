"""What selection adds on many ranks: communication by size, latency and bandwidth. Predictions, not measurements.

Letters: W ranks, R candidates of a rank, b = keep R kept per rank.
"""

import math
from typing import Literal, NamedTuple

_SCORE_BYTES = 4
_HEAD_BYTES = 16  # number of candidates and layout of the pool, which ranks compare before they exchange rows
_BACKWARD_SHARE = 2 / 3  # of a step, under which its gradients travel


class Link(NamedTuple):
    """What connects a rank with the next one; of several, the slowest on the way.

    Attributes:
        gb_per_s: Bandwidth of one rank in one direction, 10^9 bytes per second.
        latency_us: Time of an empty message.
    """

    gb_per_s: float
    latency_us: float


def all_gather_ms(total_bytes: float, ranks: int, link: Link) -> float:
    """Time until every rank has what all ranks hold together.

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
    return (ranks - 1) / ranks * total_bytes / link.gb_per_s * 1e-6 + math.ceil(
        math.log2(ranks)
    ) * link.latency_us * 1e-3


def all_reduce_ms(size_bytes: float, ranks: int, link: Link) -> float:
    """Time of a sum over all ranks: as much as gathering twice (reduce, then gather).

    Args:
        size_bytes: Of one rank's summand.
        ranks: W.
        link: Between ranks.
    """
    return 2 * all_gather_ms(size_bytes, ranks, link)


def moved_rows(kept: int, keep: float, ranks: int) -> float:
    """Expected rows that a rank takes from others where the W b best candidates of all ranks are kept.

    ``sqrt(b (1 - keep) (W - 1) / W / (2 pi))``: how many of them a rank holds is hypergeometric, here taken as normal;
    what it holds beyond b it gives away. Pools are random: none is harder than another by design.

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
    """What ranks tell each other for selection in one step; uniform training needs none of it.

    Args:
        ranks: W.
        link: Between ranks.
        kept: b.
        keep: b / R.
        scope: As in `earlysift.Sifter`: local selects per rank and exchanges nothing.
        row_bytes: Of one candidate, all tensors of the pool together.
        tensors: Of the pool; each travels by itself.
        scored_bytes: Weights that scoring uses and that are sharded (FSDP2): embeddings, the first layers and the head,
            in the precision they are gathered in. 0 where every rank holds the model (DDP).

    Returns:
        Milliseconds by ``weights``, ``scores`` and ``rows``.

    Example:
        >>> spent = selection_ms(ranks=8, link=Link(50, 10), kept=32, keep=0.5, scope="global", row_bytes=2048)
        >>> {name: round(ms, 3) for name, ms in spent.items()}
        {'weights': 0.0, 'scores': 0.06, 'rows': 0.02}
    """
    together = ranks > 1 and scope == "global"
    candidates = round(kept / keep)
    heads, scores = (all_gather_ms(ranks * size, ranks, link) for size in (_HEAD_BYTES, _SCORE_BYTES * candidates))
    rows = moved_rows(kept, keep, ranks) * row_bytes / link.gb_per_s * 1e-6 + tensors * link.latency_us * 1e-3
    return {
        "weights": all_gather_ms(scored_bytes, ranks, link) if scored_bytes else 0.0,
        "scores": heads + scores if together else 0.0,
        "rows": rows if together else 0.0,
    }


def overhead(
    *, step_ms: float, score_ms: float, communication_ms: float, gradient_bytes: float, ranks: int, link: Link
) -> float:
    """Predicted time that selection adds, as a share of the uniform step on as many ranks.

    ``(score + communication) / (step + waiting for gradients)``; gradients travel while the backward pass runs, two
    thirds of a step, and only what takes longer is waited for. The slower the links, the smaller the *share* of
    scoring: uniform training then waits for gradients, too.

    Args:
        step_ms: Training step of a rank, without communication.
        score_ms: Scoring of its pool.
        communication_ms: What `selection_ms` says, summed up.
        gradient_bytes: Gradients of a rank, as they are reduced.
        ranks: W.
        link: Between ranks.

    Example:
        >>> overhead(step_ms=100, score_ms=5, communication_ms=0, gradient_bytes=0, ranks=1, link=Link(50, 10))
        0.05
    """
    waited_ms = max(0.0, all_reduce_ms(gradient_bytes, ranks, link) - _BACKWARD_SHARE * step_ms)
    return (score_ms + communication_ms) / (step_ms + waited_ms)
