"""Fixtures that several test files share."""

import gc
import importlib.util
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import torch

import pretraining

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# No test fails because the machine is busy, and every run tries the same examples.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


@pytest.fixture
def process_group(tmp_path):
    """A gloo process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    gc.collect()  # reducers must go before their group
    torch.distributed.destroy_process_group()


@pytest.fixture
def no_waiting():
    """A context in which an operation that makes the host wait for the GPU raises."""

    def switch(mode):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it does not know all such operations
            torch.cuda.set_sync_debug_mode(mode)

    @contextmanager
    def forbidden():
        switch("error")
        try:
            yield
        finally:
            switch("default")

    return forbidden


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=0)
        yield running
        running.close()


@pytest.fixture
def recorded():
    """A backend for torch.compile that compiles nothing, and the graphs that it was given."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    yield backend, graphs
    torch.compiler.reset()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with text, and models of two layers to train on it."""
    folder = tmp_path_factory.mktemp("data")
    pretraining.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of processes that train: nothing is cached outside, and both source and tests are found."""
    path = os.pathsep.join(map(str, (pretraining.SOURCE, Path(__file__).parent)))
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, **pretraining.SECRETS, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache}


@pytest.fixture(scope="session")
def launch(environment, tmp_path_factory):
    """Run commands of ``earlysift`` in processes: see `pretraining.starter`."""
    with pretraining.starter(environment, tmp_path_factory.mktemp("output")) as run:
        yield run


@pytest.fixture(scope="session")
def start(data, launch):
    """Run ``earlysift pretrain`` in a process; gives exit code, what it printed, and what it printed as errors."""

    def run(out, *options, model="model.json", **told):
        return launch(["pretrain", *pretraining.arguments_for(data, out, model), *options], **told)

    return run


@pytest.fixture(scope="session")
def uncut(start, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("uncut") / "run"
    code, said, err = start(out)
    assert code == 0, err
    assert re.search(r"Trained 12 steps: accuracy [\d.]+%, loss [\d.]+", said)
    return out


@pytest.fixture
def copy(uncut, tmp_path):
    """A copy of that run, to be tampered with."""
    return Path(shutil.copytree(uncut, tmp_path / "run"))


@pytest.fixture(scope="module")
def results_page():
    """The script that writes docs/results.md, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("results_page", BENCHMARKS / "results_page.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def trl():
    """TRL, where it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("trl")
