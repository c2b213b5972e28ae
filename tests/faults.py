"""What befalls a run: signals and a full disk at the nth call of a function, and numbers that turn bad at a step."""

import os
import resource
import signal
import time

import torch

from earlysift import scorers

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SLOW = "slow"  # for so long
_SLOW_S = 1.0
DISK_FULL = "disk full"  # for files above this size
_LARGEST_FILE = 100_000
_PLACES = ("/earlysift/", "/accelerate/accelerator.py", "/utils/data/dataloader.py")
_struck_s = []


def watcher(name, count, what, after_s=0.0, times=1):
    """For ``sys.setprofile``: strike at a call of a function, and print a line per finished checkpoint.

    The function is given by its name, or by file and name, as ``scorers.py:named``.
    """
    file, _, name = name.rpartition(":")
    places = (f"/{file}",) if file else _PLACES

    def watch(frame, event, argument):
        nonlocal count
        called = frame.f_code
        if event == "return" and called.co_name == "_save_checkpoint" and "/earlysift/" in called.co_filename:
            os.write(1, b"saved\n")
        if event == "call" and called.co_name == name and any(place in called.co_filename for place in places):
            count -= 1
            if count == 0:
                strike(what, after_s, times)

    return watch


def strike(what, after_s, times):
    """Send this process signals, now or some time later by another process; leave it no disk; or let it wait."""
    _struck_s.append(time.monotonic())
    struck = os.getpid()
    if what == DISK_FULL:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, resource.RLIM_INFINITY))
    elif what == SLOW:
        time.sleep(_SLOW_S)
    elif not after_s:
        for _ in range(times):
            os.kill(struck, what)
            time.sleep(0.05)  # else two signals of a kind may be one
    elif os.fork() == 0:
        time.sleep(after_s)
        if os.getppid() == struck:
            os.kill(struck, what)
        os._exit(0)


def since_struck_s():
    """Seconds since the process was struck, or None."""
    return time.monotonic() - _struck_s[-1] if _struck_s else None


def faulty(cls, place, value, step, rank=0):
    """A Trainer in which one number turns bad before an optimizer step, on one rank; it notes the weights before it."""
    value = float(value)

    class Faulty(cls):
        _bad = False
        before = None

        def get_batch_samples(self, *args):
            if self.state.global_step + 1 == step:
                self._bad = self.args.process_index == rank
                with torch.no_grad():
                    if self._bad and place in _NUMBERS:
                        _NUMBERS[place](self.accelerator.unwrap_model(self.model)).fill_(value)
                if self._bad and place == "score":
                    self.sifter._runner.approximation = scorers.custom(
                        lambda model, pool: torch.full((len(pool["input_ids"]),), value)
                    )
                if self._bad and place == "gradient":
                    _layer(self.model).weight.register_hook(lambda gradient: torch.full_like(gradient, value))
                self.before = {name: held.clone() for name, held in self.model.state_dict().items()}
            return super().get_batch_samples(*args)

        def compute_loss(self, model, *args, **kwargs):
            loss = super().compute_loss(model, *args, **kwargs)
            added = {"loss": 1.0, "auxiliary loss": _layer(self.model).weight.square().mean()}.get(place)
            return loss + value * added if self._bad and added is not None else loss

    return Faulty


def _layer(model):
    """The end of the last layer, behind every exit."""
    return model.bert.encoder.layer[-1].output.dense


_NUMBERS = {  # what is poisoned of a BERT
    "input": lambda model: model.bert.embeddings.word_embeddings.weight[1],
    "weight": lambda model: _layer(model).weight[0, 0],
    "exit head": lambda model: model.cls.predictions.transform.dense.weight[0, 0],  # the shared one
}
PLACES = ("input", "weight", "score", "loss", "gradient", "exit head", "auxiliary loss")
