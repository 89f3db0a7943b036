"""The Hugging Face hub: which names may be of it, and whether it can be reached."""

import re

_SECONDS = 5.0


def is_hub_id(text: str) -> bool:
    """Whether a text may name a repository of the hub: `name` or `organisation/name`."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text) is not None and text[-5:] != ".json"


def out_of_reach(hub_id: str, file: str, revision: str | None = None) -> str | None:
    """Return why the hub does not answer, asked once for a file; None if it does, be it no.

    Its own client asks six times, for half a minute, before it looks into its cache.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(hub_id, file, revision=revision), timeout=_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # whatever the HTTP client of this version of the hub's raises
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None
