"""Train faster by back-propagating only the samples that matter, chosen by an early exit of the model itself."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from earlysift.checks import check
    from earlysift.config import SiftConfig
    from earlysift.exits import ExitHead, truncated
    from earlysift.families import Family
    from earlysift.ledger import Ledger
    from earlysift.schedules import anneal, constant, warmup
    from earlysift.selectors import Selection
    from earlysift.sifter import Sifter
else:  # a name brings torch with it, which takes seconds; `earlysift --help` needs none

    def __getattr__(name):
        from importlib import import_module

        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"earlysift.{home}"), name)
        raise AttributeError(f"module 'earlysift' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


_HOMES = {
    "checks": ("check",),
    "config": ("SiftConfig",),
    "exits": ("ExitHead", "truncated"),
    "families": ("Family",),
    "ledger": ("Ledger",),
    "schedules": ("anneal", "constant", "warmup"),
    "selectors": ("Selection",),
    "sifter": ("Sifter",),
}

__all__ = [
    "ExitHead",
    "Family",
    "Ledger",
    "Selection",
    "SiftConfig",
    "Sifter",
    "anneal",
    "check",
    "constant",
    "truncated",
    "warmup",
]
