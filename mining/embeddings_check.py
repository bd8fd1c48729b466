"""Whether the embeddings have the bytes that their store was sealed with, looked at once for all processes that make a table.

Who has looked leaves word in the ranks' folder; whoever finishes the table looks itself where nobody has, as when rank 0 never came
or ended because it found damage.
"""

from pathlib import Path

from tqdm import tqdm

from mining.embedding_store import EmbeddingStore
from mining.manifest import write_json_atomically

CHECKED_NAME = "embeddings_checked.json"


def check_embeddings(store: EmbeddingStore, folder: Path, *, show_progress: bool = False) -> None:
    """Compare all arrays with their checksums and leave word in `folder`; ValueError names the file that differs."""
    num_bytes = sum((store.path / f"{name}.npy").stat().st_size for name in store.manifest["arrays"])
    with tqdm(
        total=num_bytes,
        desc="checking embeddings",
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        # A small store is checked at once, without a word.
        delay=1.0,
        leave=False,
        disable=not show_progress,
    ) as bar:
        store.verify_contents(tell=bar.update)
    write_json_atomically(folder / CHECKED_NAME, {"embeddings_fingerprint": store.fingerprint})


def is_checked(folder: Path) -> bool:
    """A process that made this table has compared the embeddings with their checksums."""
    return (folder / CHECKED_NAME).is_file()
