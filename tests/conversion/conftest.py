"""What the tests of conversion on disk share."""

from pathlib import Path

import pytest

from tests.families import dense_model, tiny_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of three layers in many small shards, with a tokenizer."""
    folder = tmp_path_factory.mktemp("stock") / "dense"
    dense_model("llama", num_hidden_layers=3).save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder
