"""Opens a dataset of the hub or of a local folder, for planning its parts and for reading them."""

from typing import Any

from stages.errors import StageFailed, Transient
from stages.external.documents import HubDataset, LocalDataset


def open_dataset(source: HubDataset | LocalDataset) -> Any:
    """Open a `datasets.Dataset`; one of the hub is downloaded into the hub's cache.

    Raises:
        StageFailed: it cannot be opened; `Transient` where the hub cannot be reached.
    """
    import datasets
    import httpx

    datasets.disable_progress_bars()
    try:
        if isinstance(source, LocalDataset):
            return datasets.load_from_disk(str(source.folder()))
        return datasets.load_dataset(source.id, source.config, split=source.split, revision=source.revision)
    except (ConnectionError, httpx.HTTPError) as error:
        raise Transient(f"cannot download {source!r}: {error}; check the network and HF_TOKEN") from error
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise StageFailed(
            f"cannot open {source!r} ({type(error).__name__}: {error}); check id, config, split and revision"
        ) from error
