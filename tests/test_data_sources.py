"""Data of torchdata and `datasets`: a run cut within an epoch goes on as if never cut, and ids stay with samples."""

import itertools
import pickle

import pytest
import torch
from torch import Generator

import models
from earlysift import Sifter
from earlysift.datasets import WithIds

stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
from torchdata.stateful_dataloader.sampler import RandomSampler, StatefulDistributedSampler  # noqa: E402, after the skip

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries: deprecations, more workers than cores

COUNT, POOL, EPOCHS = 44, 8, 3


def rows():
    states, labels = models.mostly_learnt(Generator().manual_seed(0), COUNT)
    return [{"states": state, "labels": label} for state, label in zip(states, labels, strict=True)]


def table(**columns):
    """The same rows as Arrow."""
    states, labels = models.mostly_learnt(Generator().manual_seed(0), COUNT)
    return datasets.Dataset.from_dict({"states": states.tolist(), "labels": labels.tolist(), **columns})


def numbered():
    return table(number=list(range(COUNT)))


def in_epochs(dataset, workers):
    """A loader whose order depends on the number of the epoch alone."""
    sampler = StatefulDistributedSampler(dataset, num_replicas=1, rank=0, seed=0)
    return loader(dataset, workers, sampler=sampler), sampler.set_epoch


def loader(dataset, workers, **options):
    return stateful.StatefulDataLoader(dataset, batch_size=POOL, num_workers=workers, **options)


def from_list(folder, workers):
    return in_epochs(WithIds(rows(), "number"), workers)


def by_generator(folder, workers):
    dataset = WithIds(rows(), "number")
    sampler = RandomSampler(dataset, generator=Generator().manual_seed(1))
    return loader(dataset, workers, sampler=sampler), lambda epoch: None


def arrow(folder, workers):
    if not folder.exists():
        table().save_to_disk(folder)
    return in_epochs(WithIds(datasets.load_from_disk(folder).with_format("torch"), "number"), workers)


def stream(folder, workers):
    dataset = numbered().to_iterable_dataset(num_shards=4).with_format("torch")
    return loader(dataset, workers), dataset.set_epoch


def parquet(folder, workers):
    files = [str(folder / f"{part}.parquet") for part in range(2)]
    if not folder.exists():
        folder.mkdir()
        for part, file in enumerate(files):
            numbered().shard(2, part, contiguous=True).to_parquet(file)
    dataset = datasets.load_dataset("parquet", data_files=files, streaming=True, split="train")
    dataset = dataset.map(lambda row: {"labels": row["labels"]}).with_format("torch")
    return loader(dataset, workers), dataset.set_epoch


SOURCES = [from_list, by_generator, arrow, stream, parquet]


def trained(source, state=None):
    """Picks of every step, checkpoints after every step, and the weights at the end."""
    data, set_epoch = source
    model = models.ladder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sifter = Sifter(model, keep=0.5, kept=POOL // 2, score="memory", sample_id="number", family=models.LADDER)
    parts = {"model": model, "optimizer": optimizer, "sifter": sifter, "data": data}
    epoch = 0
    if state is not None:
        saved = pickle.loads(state)
        epoch = saved.pop("epoch")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    picks, states = [], []
    for now in range(epoch, EPOCHS):
        set_epoch(now)
        for pool in data:
            sifter.loss(sifter.sift(pool)).backward()
            optimizer.step()
            optimizer.zero_grad()
            picks.append(sifter.ids.tolist())
            states.append(pickle.dumps({"epoch": now, **{name: part.state_dict() for name, part in parts.items()}}))
    return picks, states, model.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_cut_anywhere_makes_the_picks_of_one_that_was_not(source, workers, tmp_path):
    picks, states, weights = trained(source(tmp_path / "data", workers))
    per_epoch = len(picks) // EPOCHS
    assert per_epoch >= COUNT // POOL
    for cut in (1, per_epoch - 1, 2 * per_epoch - 2):
        again, _, ours = trained(source(tmp_path / "data", workers), states[cut])
        assert again == picks[cut + 1 :]
        assert all(torch.equal(ours[name], value) for name, value in weights.items())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_an_id_stays_with_its_sample_and_no_two_samples_share_one(source, workers, tmp_path):
    data, set_epoch = source(tmp_path / "data", workers)
    expected = {n: row["states"].tolist() for n, row in enumerate(rows())}
    for epoch in range(2):
        set_epoch(epoch)
        found = [
            (number, state)
            for pool in data
            for number, state in zip(pool["number"].tolist(), pool["states"].tolist(), strict=True)
        ]
        assert len(found) == COUNT
        assert dict(found) == expected


# What docs/data.md says cannot be done; should one of these fail, the page can say better.


def order(source, state=None, first=0):
    """Numbers by epoch, and the state of the loader after the first two pools."""
    data, set_epoch = source
    if state is not None:
        data.load_state_dict(state)
    read, saved = [], None
    for epoch in range(first, 2):
        set_epoch(epoch)
        read.append([])
        for number, pool in enumerate(data):
            read[-1] += pool["number"].tolist()
            if (epoch, number) == (0, 1):
                saved = data.state_dict()
    return read, saved


def resumed(make):
    """The order of two epochs, and that of a loader that goes on after two pools."""
    whole, saved = order(make())
    rest, _ = order(make(), saved)
    return [whole[0][2 * POOL :], whole[1]], rest


def test_a_buffer_that_shuffles_a_stream_is_not_saved():
    def shuffled(size, workers=0):
        dataset = numbered().to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=size).with_format("torch")
        return loader(dataset, workers), dataset.set_epoch

    whole, rest = resumed(lambda: shuffled(20))
    assert rest != whole
    whole, rest = resumed(lambda: shuffled(1))  # the order of the shards alone
    assert rest == whole
    with pytest.raises(IndexError):
        resumed(lambda: shuffled(1, workers=2))


def test_shuffling_by_the_loaders_own_generator_loses_the_order_of_the_next_epoch():
    def shuffled():
        data = loader(WithIds(rows(), "number"), 0, shuffle=True, generator=Generator().manual_seed(1))
        return data, lambda epoch: None

    whole, rest = resumed(shuffled)
    assert rest[0] == whole[0]
    assert rest[1] != whole[1]


def test_a_stream_that_is_not_told_its_epoch_goes_on_where_it_was_in_every_epoch():
    def stream():
        dataset = numbered().to_iterable_dataset(num_shards=4).with_format("torch")
        return loader(dataset, 0), lambda epoch: None

    whole, rest = resumed(stream)
    assert rest[0] == whole[0]
    assert rest[1] != whole[1]


def test_numbers_counted_while_a_stream_is_read_repeat_themselves_in_several_processes():
    def counted(workers):
        dataset = table().to_iterable_dataset(num_shards=4).with_format("torch")
        return loader(dataset.map(lambda row, index: {"number": index}, with_indices=True), workers)

    alone, together = (
        list(itertools.chain.from_iterable(pool["number"].tolist() for pool in counted(workers))) for workers in (0, 2)
    )
    assert alone == list(range(COUNT))
    assert len(set(together)) < len(together) == COUNT
