"""Tensors in memory as a store, and exact sizes of files that are not laid out."""

import random

import pytest
import tensor_files
import torch
from safetensors.torch import load_file, save

from lorashrink.errors import InputError
from lorashrink.files.header import Arrangement, Sizes
from lorashrink.files.in_memory import MemoryStore, sha256_tensors
from lorashrink.files.writing import save_tensors

LETTERS = 'aéß"\\'


def test_a_store_in_memory_reads_what_a_file_would_hold(tmp_path):
    tensors = tensor_files.zoo()
    store = MemoryStore("zoo", tensors, {"a": "b"})
    save_tensors(tmp_path / "copy.safetensors", {}, store.metadata, source=store)
    loaded = load_file(tmp_path / "copy.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        tensor_files.assert_same(loaded[name], tensor)
    assert store.nbytes == (tmp_path / "copy.safetensors").stat().st_size


def test_rows_of_a_tensor_in_memory_are_read():
    tensor = torch.arange(12.0).reshape(4, 3).T  # not contiguous
    store = MemoryStore("rows", {"a": tensor}, {})
    assert store.read("a", (1, 3)).equal(tensor[1:3])


def test_what_is_read_does_not_change_the_tensor_in_memory():
    tensor = torch.ones(3)
    MemoryStore("ones", {"a": tensor}, {}).read("a").zero_()
    assert tensor.equal(torch.ones(3))


@pytest.mark.parametrize("value", [1.5, torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.complex128)])
def test_what_no_file_can_hold_is_refused(value):
    with pytest.raises(InputError, match="key"):
        MemoryStore("bad", {"key": value}, {})


def test_the_hash_depends_on_numbers_metadata_and_context():
    def digest(value=1.0, metadata=None, context=""):
        return sha256_tensors(MemoryStore("one", {"a": torch.tensor([value])}, metadata or {}), context)

    assert digest() == digest()
    assert len({digest(), digest(2.0), digest(metadata={"a": "b"}), digest(context="r=4")}) == 4


@pytest.mark.parametrize("seed", range(20))
def test_sizes_without_a_layout_are_those_of_the_reference_writer(seed):
    generator = random.Random(seed)
    dtypes = (torch.float16, torch.float32, torch.int8)
    tensors = {
        f"{generator.choice(LETTERS)}{number}": torch.zeros(
            [generator.choice((0, 1, 9, 10, 333)) for _ in range(generator.randint(0, 2))],
            dtype=generator.choice(dtypes),
        )
        for number in range(generator.randint(1, 30))
    }
    infos = MemoryStore("some", tensors, {}).tensors
    sizes = Sizes(infos.items())
    names = [name for name in infos if generator.random() < 0.7]
    metadata = {"kéy": "välue"} if seed % 2 else {}
    groups = [sizes.group({name: infos[name] for name in names[start::3]}) for start in range(3)]
    expected = len(save({name: tensors[name] for name in names}, metadata or None))
    assert sizes.size(groups, metadata) == expected
    arrangement = Arrangement({name: infos[name] for name in names})
    assert len(arrangement.header(metadata)) + arrangement.nbytes == expected
